"""Weights of other libraries, and their modules, become models of this one."""

from tokenexit.conversion.opening import open_source

__all__ = ["open_source"]
