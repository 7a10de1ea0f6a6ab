"""The methods under test, each with its oracle. A new method joins the shared tests by a line in `CASES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from tests.helpers import SOFTMAX_TOKEN_HEADS, TOKEN_HEADS, choose_thresholds, tiny_segmenter
from tests.oracles import methods as oracle
from tests.oracles.methods import Answer, Weights
from tokenexit.methods import PAUMER, Cropr, Dense, DoViT, DToP, FixedRatio, Method, Truncated
from tokenexit.segmenter import ExitSegmenter

SOFTMAX_HEADS = (*SOFTMAX_TOKEN_HEADS, "setr_pup")


@dataclass(frozen=True)
class Case:
    """A method with some of its options.

    build: the method at these thresholds. oracle: what it must answer. heads: kinds it takes. exits: it has decisions.
    one_head: it runs that of an exit alone, so it needs an exit and records no stages.
    """

    build: Callable[[Sequence[float] | float], Method[Any]]
    oracle: Callable[[Weights, Sequence[Tensor], Sequence[float]], list[Answer]]
    heads: tuple[str, ...]
    exits: bool = True
    one_head: bool = False

    def thresholds(
        self, model: ExitSegmenter, images: Sequence[Tensor], shares: Sequence[float] = (0.5, 0.5)
    ) -> tuple[float, ...]:
        """Thresholds at which about these shares leave, well away from every score."""
        if not self.exits:
            return (1.0,) * len(model.config.exits)
        weights = Weights.of(model)
        return choose_thresholds(lambda taus: self.oracle(weights, images, taus), shares)


def _dense(weights: Weights, images: Sequence[Tensor], thresholds: Sequence[float]) -> list[Answer]:
    return [oracle.dense(weights, image) for image in images]


def by_class(thresholds: Any) -> Any:
    """A threshold of its own for each of 5 classes, from one for each exit; one number for all is left alone."""
    if isinstance(thresholds, float | int):
        return thresholds
    return tuple(tuple(t + (1.0 - t) * c / 100 for c in range(5)) for t in thresholds)


def dtop_case(
    k: int,
    finish: Any = "auto",
    heads: tuple[str, ...] = TOKEN_HEADS,
    given: Callable[[Any], Any] = tuple,
    **options: Any,
) -> Case:
    """given: what is made of one threshold for each exit."""
    return Case(
        lambda t: DToP(t if isinstance(t, float | int) else given(t), keep_per_class=k, finish=finish, **options),
        lambda w, images, t: [oracle.dtop(w, image, given(t), k, finish, **options) for image in images],
        heads,
    )


def ratio_case(ratios: tuple[float, ...], **options: Any) -> Case:
    def build(thresholds: Sequence[float] | float) -> Method[Any]:
        return FixedRatio(thresholds if isinstance(thresholds, float | int) else ratios, **options)

    def answers(weights: Weights, images: Sequence[Tensor], _: Sequence[float]) -> list[Answer]:
        return [oracle.dtop(weights, image, (1.0, 1.0), k=0, cap=ratios, **options) for image in images]

    return Case(build, answers, ("linear", "setr_naive", "atm"), exits=False)


def cropr_case(rate: float) -> Case:
    return Case(
        lambda t: Cropr(rate),
        lambda w, images, t: [oracle.cropr(w, image, rate) for image in images],
        ("cropr",),
        exits=False,
    )


def _truncated(after: int, weights: Weights, images: Sequence[Tensor], _: Sequence[float]) -> list[Answer]:
    """As many exits that nobody takes, then one that everybody takes."""
    thresholds = [1.0] * (after - 1) + [-1.0] * 2
    return [oracle.dtop(weights, image, thresholds[:2], k=0) for image in images]


def truncated_case(after: int) -> Case:
    return Case(lambda t: Truncated(after), partial(_truncated, after), TOKEN_HEADS, exits=False, one_head=True)


def dovit_case(
    heads: tuple[str, ...] = SOFTMAX_HEADS, given: Callable[[Any], Any] = lambda t: t, **options: Any
) -> Case:
    seen = {name: value for name, value in options.items() if name != "scoring"}  # scoring changes no answer
    return Case(lambda t: DoViT(given(t), **options), lambda w, i, t: oracle.dovit(w, i, given(t), **seen), heads)


def paumer_case() -> Case:
    def answers(weights: Weights, images: Sequence[Tensor], thresholds: Sequence[float]) -> list[Answer]:
        return oracle.dovit(weights, images, thresholds, score="entropy", blend_weight=0.0)

    return Case(lambda t: PAUMER(t), answers, ("fcn", "setr_pup"))


CASES: dict[str, Case] = {
    "dense": Case(lambda t: Dense(), _dense, (*TOKEN_HEADS, "setr_pup"), exits=False),
    "dtop": dtop_case(1),
    "dtop-keep-nobody": dtop_case(0),
    "dtop-frozen": dtop_case(2, "frozen", ("atm", "fcn")),
    "dtop-margin": dtop_case(1, heads=("atm", "fcn"), score="margin"),
    "dtop-entropy": dtop_case(1, heads=("fcn", "setr_naive"), score="entropy", temperature=1.5),
    "dtop-by-class": dtop_case(1, heads=("atm", "fcn"), given=by_class),
    "dtop-guarded": dtop_case(0, heads=("atm", "mask_transformer"), boundary_guard=True),
    "fixed-ratio": ratio_case((0.6, 0.3)),
    "fixed-ratio-rejoined": ratio_case((0.6, 0.3), rejoin=1),
    "cropr": cropr_case(0.3),
    "truncated": truncated_case(1),
    "truncated-late": truncated_case(2),
    "dovit": dovit_case(),
    "dovit-live": dovit_case(("linear", "fcn"), scoring="live"),
    "dovit-rejoined": dovit_case(("fcn", "setr_pup"), rejoin=1),
    "dovit-improving": dovit_case(("fcn", "setr_naive"), min_improvement=0.02),
    "dovit-margin": dovit_case(("fcn", "setr_naive"), score="margin", temperature=0.7),
    "dovit-by-class": dovit_case(("fcn", "setr_naive"), given=by_class),
    "dovit-guarded": dovit_case(("mask_transformer", "setr_naive"), boundary_guard=True),
    "dovit-guarded-live": dovit_case(("linear",), given=by_class, boundary_guard=True, scoring="live"),
    "paumer": paumer_case(),
}

BY_HEAD = [pytest.param(case, head, id=f"{name}-{head}") for name, case in CASES.items() for head in case.heads]
ALL_HEADS = [
    pytest.param(case, head, id=f"{name}-{head}")
    for name, case in CASES.items()
    if not case.one_head
    for head in case.heads
]
WITH_EXITS = [
    pytest.param(case, head, id=f"{name}-{head}") for name, case in CASES.items() if case.exits for head in case.heads
]
ONCE = [pytest.param(case, case.heads[0], id=name) for name, case in CASES.items()]


def model_for(head: str, **options: Any) -> ExitSegmenter:
    return tiny_segmenter(head, **options)
