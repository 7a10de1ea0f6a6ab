"""The version, written down here alone: `pyproject.toml` and the package read it."""

__version__ = "0.1.0"
