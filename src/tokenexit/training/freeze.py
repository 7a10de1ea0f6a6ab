"""Freeze parts of a model: they get no gradient, and stay in evaluation mode, so that their buffers stay the same."""

from __future__ import annotations

from tokenexit.errors import ConfigError
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import Freeze

FROZEN: dict[Freeze, tuple[str, ...]] = {
    "none": (),
    "backbone": ("backbone",),
    "all_but_exit_heads": ("backbone", "decode_head"),
}
"""Parts of an `ExitSegmenter`; its final norm belongs to the backbone."""


def training_mode(model: ExitSegmenter, freeze: Freeze) -> None:
    """Set training mode for the parts that are trained. Without a trained parameter in front of a head, autograd builds
    no graph through the backbone. Raises `ConfigError` if nothing is left."""
    model.train()
    for name in FROZEN[freeze]:
        model.get_submodule(name).eval().requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze={freeze} leaves nothing to train, as the model has no exits: name some.")
