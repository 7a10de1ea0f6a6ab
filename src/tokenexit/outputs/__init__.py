"""What is made of outputs: losses."""
