"""A page to try a model on, and the HTTP API behind it."""
