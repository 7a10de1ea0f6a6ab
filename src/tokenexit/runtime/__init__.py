"""Files, caches, processes and precision of a machine; nothing here knows of models."""
