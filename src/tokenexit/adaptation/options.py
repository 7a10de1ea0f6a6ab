"""What a user may ask of `adapt`, and what does not go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenexit.calibration.latency import check_timed
from tokenexit.calibration.plans import Held
from tokenexit.calibration.targets import Average, Bound, Budget, CalibrationTarget
from tokenexit.errors import ConfigError
from tokenexit.heads import ModuleHead, build_head
from tokenexit.methods import DoViT, DToP, ThresholdMethod
from tokenexit.runtime.precision import Precision
from tokenexit.segmenter import ExitSegmenter

MOST_PHOTOS = 400

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]
"""Wraps each loop, given its title."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of `adapt` beside source, photos and target.

    Attributes:
        held: parts of the plan that are held fixed.
        exit_head: kind of the exit heads, one that looks at one token at a time.
        average: what the plan keeps, agreement over "pixels", or over "classes" so that rare ones count as much.
        limit: number of photos, drawn at random.
        seed: seed of the split, of fitting and of the draw.
        precision: precision of the forward pass.
        finetune: number of steps by which the whole model continues with its exits on; 0 for none.

    Raises:
        ConfigError: for a number out of range.
    """

    held: Held = field(default_factory=Held)
    exit_head: str = "fcn"
    average: Average = "classes"
    limit: int = MOST_PHOTOS
    seed: int = 0
    precision: Precision = "fp32"
    finetune: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}: it is a number of photos.")
        if self.finetune < 0:
            raise ConfigError(f"finetune must be at least 0, got {self.finetune}: it is a number of steps.")


def check_options(options: Options, target: CalibrationTarget, dense: ExitSegmenter) -> None:
    """Reject what this model cannot be adapted to, before anything is read or written.

    Raises:
        ConfigError: in one sentence that says why.
    """
    if dense.depth < 2:
        raise ConfigError("the backbone must have at least 2 blocks, got 1: there is no place for an exit.")
    _check_target(target, options, dense)
    places(dense, options.held)
    head = build_head(options.exit_head, dense.config.backbone.embed_dim, dense.config.num_classes)
    if not head.pointwise or head.kind != "softmax":
        raise ConfigError(
            f"exit_head must look at one token at a time, as fcn and linear do, got '{options.exit_head}'."
        )
    if options.finetune and (dense.decode_head.kind != "softmax" or isinstance(dense.decode_head, ModuleHead)):
        raise ConfigError(
            "finetune needs a decode head of this library that answers by softmax, as the exit heads do: leave it out."
        )


def _check_target(target: CalibrationTarget, options: Options, dense: ExitSegmenter) -> None:
    """Reject targets that plans are not made for, and a bound on a model that goes on changing."""
    if isinstance(target, Budget):
        if target.unit == "latency_ms":
            check_timed(dense)
        return
    if target.what != "max_disagreement" or target != Bound("max_disagreement", target.value, target.confidence):
        raise ConfigError("adapt bounds the mean share of pixels unlike dense alone: calibrate afterwards for others.")
    if options.finetune:
        raise ConfigError(
            "finetune goes with a budget: a bound is tested on the photos held back once, before it; leave one out."
        )


def places(dense: ExitSegmenter, held: Held) -> tuple[int, ...]:
    """Return the numbers of blocks behind which heads are fitted: all, or those that the user names.

    The last place is before the last block, or behind it where the decode head holds further blocks, which exits save.

    Raises:
        ConfigError: for a block that the backbone does not have.
    """
    depth, joint = dense.config.backbone.depth, dense.decode_head.joint_blocks
    last = depth if joint else depth - 1
    named = {*(held.exits or ()), *(() if held.depth in (None, depth) else (held.depth,))}
    wrong = sorted(n for n in named if n is not None and not 0 < n <= last)
    if wrong:
        behind = f", as queries join the last {joint} of {dense.depth} blocks" if joint else ""
        raise ConfigError(f"exits and depth must be between 1 and {last}{behind}, got {wrong[0]}: name other blocks.")
    if held.exits is not None and held.depth is not None:
        return tuple(sorted(n for n in named if n is not None)) or (last,)  # a survey has a place at least
    return tuple(range(1, last + 1))


def method_of(dense: ExitSegmenter) -> ThresholdMethod[Any]:
    """Return what exits do: DToP, and DoViT where the decode head reads the whole grid."""
    method: ThresholdMethod[Any] = DToP()
    if not dense.decode_head.takes_live_tokens:
        method = DoViT() if dense.config.backbone.class_token else DoViT(blend_weight=0.0)
    dense.check(method)
    return method
