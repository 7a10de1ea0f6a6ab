"""Results of a call: maps, windows, the ledger, losses."""
