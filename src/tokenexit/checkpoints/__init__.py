"""Weight files are found and read, and loaded into a backbone with a report."""

from tokenexit.checkpoints.files import read_state_dict, read_tensors
from tokenexit.checkpoints.load import LoadReport, load_backbone
from tokenexit.hub.fetch import resolve_weights

__all__ = ["LoadReport", "load_backbone", "read_state_dict", "read_tensors", "resolve_weights"]
