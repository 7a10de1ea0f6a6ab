"""`ThresholdMethod` is the base of methods whose tokens leave where an exit head is confident enough.

A method of this kind supplies how an exit scores tokens (`grade`), which of them leave (`decide`), and, in its own
`at_exit`, what becomes of them. `decide` is pure, so that calibration applies the very same rule to scores that
it recorded on a dense pass.

Legend: P graded patch tokens in packed order, cells = all patches of all images, B images, K classes, E exits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar, get_args

import torch
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing
from tokenexit.errors import ConfigError
from tokenexit.heads import Head, HeadOutput
from tokenexit.methods.base import ExitRecord, Method, ModelView, PerExit, State, Threshold, Thresholds, option
from tokenexit.methods.selection import Score, exceeds, keep_at_most, on_boundary, retain_top_k, windows_of

NEVER = 1.0
"""The threshold at which no token leaves: scores are at most 1 and the comparison is strict."""

T = TypeVar("T", bound=Threshold)


def per_exit(value: float | Sequence[T], num_exits: int, name: str = "threshold") -> tuple[float | T, ...]:
    """Return one value, such as a threshold, for every exit. Raises `ConfigError` for a list of another length."""
    values = (value,) * num_exits if isinstance(value, int | float) else tuple(value)
    if len(values) != num_exits:
        raise ConfigError(
            f"{name} has {len(values)} values for {num_exits} exits: give one number, or one for each exit."
        )
    return values


def of_exit(value: float | Sequence[T], n: int) -> float | T:
    """Return the value for exit `n`, from one for all exits or one for each."""
    return value if isinstance(value, int | float) else value[n]


def threshold_of_tokens(threshold: Threshold, label: Tensor) -> float | Tensor:
    """Return the threshold of every token: the exit's only one, or `(P,)`, that of the predicted class `label (P,)`."""
    if isinstance(threshold, int | float):
        return threshold
    table = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float32)
    return table if table.ndim == 0 else table.to(label.device).index_select(0, label)


def per_class(threshold: Thresholds) -> bool:
    """Return whether some exit has a threshold for each class."""
    if isinstance(threshold, int | float):
        return False
    return any(tau.ndim > 0 if isinstance(tau, Tensor) else not isinstance(tau, int | float) for tau in threshold)


def label_of_thresholds(threshold: Thresholds) -> str:
    """Write thresholds as `0.95`, `0.98/0.9`, or, with one for each class, as their range `0.9-0.998 per class`."""
    exits: Sequence[Any] = (threshold,) if isinstance(threshold, int | float) else threshold
    if not per_class(threshold):
        return "/".join(f"{tau:g}" for tau in exits)
    values = [tau for exit in exits for tau in ((exit,) if isinstance(exit, int | float) else exit)]
    return f"{min(values):g}-{max(values):g} per class"


@dataclass(frozen=True)
class Graded:
    """Scores and classes of P patch tokens at an exit, image after image in raster order.

    Attributes:
        score: `(P,)` in [0, 1].
        label: `(P,)` int64, the predicted class.
        packing: which rows belong to which image.
        grids: (rows, columns) of patches of every image.
        num_classes: number K of classes.
        last_label: `(cells,)` int64, the class of each patch when it was last computed; None where no rule needs it.
        position: `(P,)` cell of each row, None where the rows are all cells.
        earlier: `(P,)` scores at the previous exit, None at the first or where no rule needs them.
    """

    score: Tensor
    label: Tensor
    packing: Packing
    grids: tuple[Grid, ...]
    num_classes: int
    last_label: Tensor | None = None
    position: Tensor | None = None
    earlier: Tensor | None = None

    def most_confident(self, candidate: Tensor, k: int) -> Tensor:
        """Return the k most confident of `candidate (P,)` in each image and class, `(P,)` bool."""
        image = None if len(self.grids) == 1 else self.packing.image_index()
        return retain_top_k(candidate, self.score, self.label, image, self.num_classes, k)

    def most_confident_in_windows(self, candidate: Tensor, side: int) -> Tensor:
        """Return the most confident of `candidate (P,)` in each window of `side` x `side` patches, `(P,)` bool."""
        window = windows_of(self.grids, side, self.score.device)
        window = window if self.position is None else window.index_select(0, self.position)
        return retain_top_k(candidate, self.score, window, None, 1, 1)  # windows of two images are never one

    def on_boundary(self) -> Tensor:
        """Return which tokens lie beside a patch of another class, `(P,)` bool."""
        assert self.last_label is not None, "a method that guards boundaries keeps labels"
        cells = on_boundary(self.last_label, self.grids)
        return cells if self.position is None else cells.index_select(0, self.position)


@dataclass(frozen=True)
class ThresholdMethod(Method[State]):
    """The base of methods in which a token may leave where its score is strictly above a threshold.

    Attributes:
        threshold: one for all exits or one for each; in place of an exit's number, one for each class: a token is
            compared with that of its predicted class (class-based thresholding).
        threshold_warmup: share of the training over which thresholds fall from 1 to their value.
        cap: for each exit the share in [0, 1] of an image's tokens that may go on, the least confident; a limit on
            every image's compute.
        score: what is compared with the threshold: the best class's "probability", its "margin" over the second, or one
            minus the "entropy" over its maximum.
        temperature: of the exit heads' softmax, one for all exits or one for each; it moves scores and no prediction.
        boundary_guard: a token beside one of another predicted class, as each was when last computed, stays; a cap
            takes precedence.
        decodes_grid: whether the decode head reads the features of all patches, and not those of live ones alone.
    """

    calibrates: ClassVar[bool] = True
    offered: ClassVar[bool] = True
    always_named: ClassVar[tuple[str, ...]] = ("threshold",)
    decodes_grid: ClassVar[bool]

    threshold: Thresholds = option(
        0.95,
        "threshold of all exits, or one for each as 0.98/0.9/0.8, an exit's for all "
        "classes or one for each as 0.9,0.99,0.95",
    )
    threshold_warmup: float = option(
        0.0, "share of the training over which thresholds fall from 1 to their value", kw_only=True
    )
    cap: tuple[float, ...] | None = option(
        None, "share of an image's tokens that may go on after each exit, as 0.7/0.5/0.3", kw_only=True
    )
    score: Score = option(
        "probability",
        "score that thresholds are compared with",
        kw_only=True,
        choices=("probability", "margin", "entropy"),
    )
    temperature: PerExit = option(1.0, "temperature of the exit heads' softmax: 1.5, or 1.8/1.5/1.2", kw_only=True)
    boundary_guard: bool = option(False, "no exits where predicted classes meet", kw_only=True)

    def __post_init__(self) -> None:
        check_thresholds(self.threshold)
        check_cap(self.cap)
        check_score(self.score)
        check_temperature(self.temperature)
        check_share("threshold_warmup", self.threshold_warmup)

    @property
    def thresholds(self) -> Thresholds:
        return self.threshold

    @property
    def scores_grid(self) -> bool:
        """Whether exit heads score every patch of the grid, and not live ones alone."""
        return False

    @property
    def seen_on(self) -> float:
        """Share of the tokens that leave which stay keys and values of those that go on."""
        return 0.0

    @property
    def adapts_stopped(self) -> bool:
        """Whether the decode head reads tokens that left through a model's stage adapters, where it has them."""
        return False

    @property
    def contexts(self) -> tuple[Self, ...]:
        """The same with other tokens kept as context, for a plan to choose from; none where there is no choice."""
        return ()

    def with_thresholds(self, thresholds: Thresholds) -> Self:
        return replace(self, threshold=thresholds)

    def at(self, progress: float) -> Self:
        if self.threshold_warmup == 0.0:
            return self
        return replace(self, threshold=warmed_up(self.threshold, progress, self.threshold_warmup))

    def check(self, model: ModelView) -> None:
        check_threshold_sizes(self.threshold, model.num_exits, model.num_classes)
        check_cap_length(self.cap, model.num_exits)
        per_exit(self.temperature, model.num_exits, "temperature")

    def for_export(self) -> Method[Any]:
        if self.cap is not None:
            raise ConfigError("a cap counts tokens on the host and cannot be exported: calibrate without --cap.")
        if self.boundary_guard:
            raise ConfigError("boundary_guard cannot be exported: calibrate without it.")
        return self

    def option_label(self, name: str) -> str:
        return label_of_thresholds(self.threshold) if name == "threshold" else super().option_label(name)

    @abstractmethod
    def grade(self, n: int, head: Head | ExitRecord, out: HeadOutput, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        """Return score and class of the tokens that an exit head saw: `(P,)` fp32, and `(P,)` int64.

        Classes are zeros where none of the method's rules needs them. Called by `at_exit` and by the dense pass of
        calibration.

        Args:
            n: the exit, from 0.
            head: the exit head, or the record of its run: how logits are to be read.
            out: the output of the head.
            grids: (rows, columns) of patches of every image.
        """

    @abstractmethod
    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        """Return which tokens leave at exit `n`: `(P,)` bool, a subset of `live (P,)`. Pure: the rule and no more."""

    def confident(self, n: int, graded: Graded) -> Tensor:
        """Return the tokens whose score is strictly above their threshold: `(P,)` bool."""
        return exceeds(graded.score, threshold_of_tokens(of_exit(self.threshold, n), graded.label))

    def guard(self, graded: Graded, leaves: Tensor) -> Tensor:
        """Return `leaves (P,)` without tokens on a boundary, if boundaries are guarded."""
        return leaves & ~graded.on_boundary() if self.boundary_guard else leaves

    def limit(self, n: int, graded: Graded, leaves: Tensor, live: Tensor) -> Tensor:
        """Return `leaves (P,)` and, if there is a cap, the most confident of the live tokens beyond it."""
        if self.cap is None:
            return leaves
        limits = cap_limits(self.cap, n, graded.grids, graded.score.device)
        return live & keep_at_most(leaves | ~live, graded.score, graded.packing.image_index(), limits)


def blocks_of_live_tokens(method: Method[Any], model: ModelView) -> int:
    """Count the blocks that a token which left is spared.

    They are those of the backbone, and further ones in the decode head (EoMT) where it is given live tokens alone.
    """
    inner = method.inner
    alone = isinstance(inner, ThresholdMethod) and not inner.decodes_grid
    return model.backbone.depth + (model.decode_head.joint_blocks if alone else 0)


def calibratable(method: Method[Any]) -> ThresholdMethod[Any]:
    """Return the method as one whose thresholds can be chosen on a dense pass.

    Raises `ConfigError` for one that has none, and for one in which images decide for each other.
    """
    if not isinstance(method, ThresholdMethod) or not method.calibrates:
        raise ConfigError(f"method '{method.name}' has no thresholds to calibrate: choose one that has, such as dtop.")
    if not method.batch_independent:
        raise ConfigError("batch_mode='mean' lets images decide for each other: calibrate with batch_mode='exact'.")
    return method


def check_thresholds(threshold: Thresholds) -> None:
    """Reject thresholds that no score can meet."""
    if isinstance(threshold, str) or not isinstance(threshold, int | float | Sequence):
        raise ConfigError(f"threshold must be a number, got {threshold!r}: give one in [0, 1], or one for each exit.")
    for exit in (threshold,) if isinstance(threshold, int | float) else threshold:
        for value in exit if isinstance(exit, list | tuple) else (exit,):
            if isinstance(value, Tensor):
                continue
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise ConfigError(f"threshold must be in [0, 1], got {value}: scores are; use 1 for 'never'.")


def check_threshold_sizes(threshold: Thresholds, num_exits: int, num_classes: int) -> None:
    """Reject thresholds for another number of exits or classes."""
    for n, tau in enumerate(per_exit(threshold, num_exits)):
        if not isinstance(tau, int | float | Tensor) and len(tau) != num_classes:
            raise ConfigError(
                f"threshold of exit {n + 1} has {len(tau)} values for {num_classes} classes: "
                "give one number, or one for each class."
            )


def warmed_up(threshold: Thresholds, progress: float, warmup: float) -> Thresholds:
    """Return thresholds in training: they fall linearly from 1 to their value over its share `warmup`.

    `tau(i) = 1 - min(1, i / T) (1 - tau)` with `i / T = progress / warmup` (`do_vit.py` of DoViT's release).
    """
    done = min(1.0, progress / warmup) if warmup > 0 else 1.0

    def now(tau: Threshold) -> Threshold:
        if isinstance(tau, int | float | Tensor):
            return 1.0 - done * (1.0 - tau)
        return tuple(1.0 - done * (1.0 - t) for t in tau)

    if isinstance(threshold, int | float):
        return 1.0 - done * (1.0 - threshold)
    return tuple(map(now, threshold))


def check_score(score: str) -> None:
    """Reject unknown score names."""
    if score not in get_args(Score):
        raise ConfigError(f"score must be probability, margin or entropy, got '{score}': choose one.")


def check_temperature(temperature: PerExit) -> None:
    """Reject temperatures that are no positive numbers."""
    if isinstance(temperature, str) or not isinstance(temperature, int | float | Sequence):
        raise ConfigError(f"temperature must be a number, got {temperature!r}: give one above 0, or one for each exit.")
    for value in (temperature,) if isinstance(temperature, int | float) else temperature:
        if not isinstance(value, int | float) or not 0.0 < value < float("inf"):
            raise ConfigError(f"temperature must be a number above 0, got {value}: 1 leaves scores as they are.")


def check_cap(cap: Sequence[float] | None) -> None:
    """Reject caps outside [0, 1]."""
    if cap is None:
        return
    if isinstance(cap, str | int | float) or not all(0.0 <= share <= 1.0 for share in cap):
        raise ConfigError(
            f"cap must be a share in [0, 1] for each exit, got {cap!r}: give those of an image's tokens to go on."
        )


def check_cap_length(cap: Sequence[float] | None, num_exits: int) -> None:
    """Reject a cap for another number of exits."""
    if cap is not None and len(cap) != num_exits:
        raise ConfigError(f"cap has {len(cap)} values for {num_exits} exits: give one share for each exit.")


def cap_limits(cap: Sequence[float], n: int, grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Return how many patch tokens of each image may go on after exit `n`: `(B,)` int64."""
    return torch.tensor([int(cap[n] * h * w + 1e-9) for h, w in grids], device=device)


def check_share(name: str, value: float) -> None:
    """Reject shares outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be in [0, 1], got {value}: it is a share.")
