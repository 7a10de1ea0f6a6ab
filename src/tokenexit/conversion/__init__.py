"""Weights of other libraries to models of this one."""
