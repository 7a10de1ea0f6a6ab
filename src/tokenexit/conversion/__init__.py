"""Weights of other libraries become models of this one."""
