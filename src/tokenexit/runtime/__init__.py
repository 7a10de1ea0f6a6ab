"""How files are read, kept and changed, and what a machine is asked: nothing here knows of models."""
