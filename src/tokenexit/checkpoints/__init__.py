"""Weights from elsewhere: read the file, find it on the hub, map it onto the backbone."""

from tokenexit.checkpoints.files import read_state_dict, read_tensors
from tokenexit.checkpoints.load import LoadReport, load_backbone
from tokenexit.hub.fetch import resolve_weights

__all__ = ["LoadReport", "load_backbone", "read_state_dict", "read_tensors", "resolve_weights"]
