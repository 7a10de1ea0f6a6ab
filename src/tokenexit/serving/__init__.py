"""The server: a page to try a model, and the HTTP API behind it."""
