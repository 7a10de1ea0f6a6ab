"""Errors that a user can cause and cure.

Each message is one sentence: what is wrong, with its name and value, and what to do.
"""


class TokenExitError(Exception):
    """The base of all errors in what a user gave; the command line prints the message and nothing else."""


class ConfigError(TokenExitError, ValueError):
    """An option or a combination of options that cannot work."""


class DataError(TokenExitError, ValueError):
    """An image, mask or dataset folder that cannot be used."""


class CheckpointError(TokenExitError, ValueError):
    """A weight file that is damaged, foreign, or does not fit the model."""
