"""Thresholds for a bound: the path is fixed on one part of the images and tested on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenexit.calibration import risk_control
from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import (
    Bench,
    Reference,
    Run,
    dense_reference,
    error,
    true_run,
    truth_reference,
)
from tokenexit.calibration.planner import Planner, _cap_words, _Chosen, _figures
from tokenexit.calibration.targets import Average, Bound
from tokenexit.calibration.threshold_path import place_where
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, Method, ThresholdMethod

PATH_SHARE = 0.3
"""Share of the images on which a path to be tested is fixed."""
LEAST_PATH_IMAGES = 4
SCOUTS = 6
"""True runs that relate places on the path to what is lost, before anything is tested."""
RATIOS = (0.05, 0.1, 0.2, 0.3, *(0.35 + 0.05 * i for i in range(14)), 1.1, 1.25, 1.5)
"""Where the path is tested: losses that the scouts expect, over the bound."""

AIM = 0.7
"""Share of a bound that a test on several hundred images lets pass, about: where paths are compared."""


def _for_bound(
    bench: Bench,
    method: ThresholdMethod[Any],
    wish: Bound,
    average: Average,
    cap: float | None,
    seed: int,
    say: Callable[[str], None],
) -> _Chosen:
    path_part, test_part = split(len(bench), wish, seed)
    scouts, test = bench.part(path_part), bench.part(test_part)
    planner = Planner(scouts, method, average)
    if cap is not None:
        planner.hold_to(cap, planner.path.end / 2)
    places = places_to_test(planner, Trial.on(scouts, wish))
    say(f"path fixed on {len(scouts)} images, testing up to {len(places)} places on {len(test)} others")

    trial = Trial.on(test, wish)
    count = risk_control.fixed_sequence(len(places), lambda j: trial.passes(planner.at(places[j])))
    if count == 0:
        raise ConfigError(trial.out_of_reach())
    place, run, figures = places[count - 1], trial.accepted, trial.figures
    assert run is not None, "some place was accepted"
    reached = {**_figures(run, planner, place), **figures, "places_tested": min(count + 1, len(places))}
    images = {"count": len(bench), "path": len(scouts), "test": len(test), "seed": seed}
    promise = promise_of(wish, len(test), figures) + _cap_words(cap)
    if not wish.needs_labels:  # else runs are compared with the truth, and the bound is on what that says
        promise += fall_off_note(error(run.confusion, "pixels").mean().item(), len(test))
    return _Chosen(planner.at(place), run, reached, images, promise)


def split(count: int, wish: Bound, seed: int) -> tuple[list[int], list[int]]:
    """Images that fix the path and those it is tested on, disjoint, drawn at random.

    Raises `ConfigError` where no outcome of the test could pass, with the number of images that could.
    """
    needed = wish.needed_images()
    path = min(max(round(PATH_SHARE * count), LEAST_PATH_IMAGES), count - needed)
    if path < LEAST_PATH_IMAGES:
        kind = "in expectation" if wish.in_expectation else f"at confidence {wish.confidence:g}"
        raise ConfigError(
            f"{wish.what}={wish.value:g} {kind} needs at least {needed} images to test on, even if nothing is lost on "
            f"any of them, and {LEAST_PATH_IMAGES} more to fix the path; there are {count}: give "
            f"{needed + LEAST_PATH_IMAGES} or more, or ask for less."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:path]), sorted(order[path:])


def places_to_test(planner: Planner, trial: Trial) -> list[float]:
    """Places in their order on the path that saves most, denser where scouts expect to lose what the bound allows.

    trial: on images that are not tested. The path is chosen by what it costs where scouts lose `AIM` of the bound.
    """
    found = []
    for path in planner.paths:
        planner.path = path
        spots, seen = scout(planner, trial)
        place = _crossing(spots, seen, AIM)
        found.append((planner.share(place), path, spots, seen))
    _, planner.path, spots, seen = min(found, key=lambda one: one[0])
    places = [0.0]
    for place in sorted({*spots, *(_crossing(spots, seen, wanted) for wanted in RATIOS)}):
        if place > places[-1] + 1e-2:
            places.append(place)
    return places[1:]


def scout(planner: Planner, trial: Trial) -> tuple[list[float], list[float]]:
    """Places evenly spaced in predicted compute, and what is lost there over the bound, made to rise."""
    first, last = planner.share(0.0), planner.share(planner.path.end)
    spots, seen = [0.0], [0.0]
    for i in range(SCOUTS):
        spot = place_where(planner.share, first + (last - first) * (i + 1) / SCOUTS, planner.path.end)
        if spot > spots[-1]:
            spots.append(spot)
            seen.append(max(seen[-1], trial.ratio(planner.at(spot))))
        if seen[-1] > RATIOS[-1]:
            break
    return spots, seen


def _crossing(spots: Sequence[float], seen: Sequence[float], wanted: float) -> float:
    """Where a rising line through the points first reaches `wanted`; the last spot if it does not."""
    for i in range(1, len(spots)):
        if seen[i] >= wanted:
            rise = seen[i] - seen[i - 1]
            return spots[i - 1] + (spots[i] - spots[i - 1]) * ((wanted - seen[i - 1]) / rise if rise > 0 else 0.0)
    return spots[-1]


class Trial:
    """Settings of a path put to the test, one after the other, on one set of images."""

    def __init__(self, bench: Bench, wish: Bound, reference: Reference, dense: Run | None) -> None:
        self.bench, self.wish, self.reference, self.dense = bench, wish, reference, dense
        self.accepted: Run | None = None
        self.figures: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._envelope = torch.zeros(len(bench), dtype=torch.float64)

    @classmethod
    def on(cls, bench: Bench, wish: Bound) -> Trial:
        if not wish.needs_labels:
            return cls(bench, wish, dense_reference(bench), None)
        truth = truth_reference(bench)
        return cls(bench, wish, truth, true_run(bench, Dense(), truth, "dense"))

    def run(self, method: Method[Any]) -> Run:
        return true_run(self.bench, method, self.reference, "true run")

    def ratio(self, method: Method[Any]) -> float:
        """What a setting loses over what it may."""
        run = self.run(method)
        if self.wish.what == "max_miou_drop":
            return self._drop(run)[0] / self.wish.value
        return self.wish.losses(run, self.dense).mean().item() / self.wish.alpha

    def passes(self, method: Method[Any]) -> bool:
        run = self.run(method)
        passed, self._last = self.judge(run)
        if passed:
            self.accepted, self.figures = run, self._last
        return passed

    def judge(self, run: Run) -> tuple[bool, dict[str, Any]]:
        """Whether the wish is granted at this setting, and the figures that say so."""
        wish, delta = self.wish, 1 - self.wish.confidence
        if wish.what == "max_miou_drop":
            drop, low, high = self._drop(run)
            return high <= wish.value, {"miou_drop": drop, "miou_drop_interval": [low, high]}
        losses = wish.losses(run, self.dense)
        n, mean = len(losses), losses.mean().item()
        name = "share_of_images_above" if wish.images_above is not None else "mean_loss"
        figures: dict[str, Any] = {name: mean * (wish.clip if wish.images_above is None else 1.0)}
        if wish.in_expectation:
            self._envelope = torch.maximum(self._envelope, losses)
            figures["mean_of_largest_losses"] = self._envelope.mean().item() * wish.clip
            return risk_control.controls_expectation(self._envelope.mean().item(), n, wish.alpha), figures
        if wish.images_above is not None:
            p = risk_control.binomial(round(mean * n), n, wish.alpha).item()
        else:
            p = risk_control.hoeffding_bentkus(mean, n, wish.alpha).item()
        return p <= delta, {**figures, "p_value": p}

    def out_of_reach(self) -> str:
        """Why not even the first setting passed, and what would."""
        wish, n = self.wish, len(self.bench)
        asked = f"{wish.what}={wish.value:g}"
        if wish.what == "max_miou_drop":
            return (
                f"{asked} is out of reach: the most careful exits may lose {self._last['miou_drop_interval'][1]:.2f}."
            )
        if wish.images_above is not None:
            share = self._last["share_of_images_above"]
            return (
                f"{asked} is out of reach on all but {wish.images_above:g} of images: with the most careful exits "
                f"{share:.3f} of {n} exceed it; ask for a larger loss or share, or use --method dense."
            )
        mean = self._last["mean_loss"] / wish.clip
        if wish.in_expectation:
            bound = math.ceil((n * mean + 1) / (n + 1) * wish.clip * 1e4) / 1e4
        else:
            bound = risk_control.smallest_bound(mean, n, wish.confidence) * wish.clip
        return (
            f"{asked} is out of reach: with the most careful exits {n} images support a bound of {bound:.4g}; ask for "
            "that or more, give more images, or use --method dense."
        )

    def _drop(self, run: Run) -> tuple[float, float, float]:
        assert self.dense is not None, "mIoU is compared with the dense model's"
        return risk_control.bootstrap_drop(self.dense.confusion, run.confusion, self.wish.confidence)


def promise_of(wish: Bound, n: int, figures: dict[str, Any]) -> str:
    """What holds, in words, and what does not."""
    if wish.what == "max_miou_drop":
        low, high = figures["miou_drop_interval"]
        return (
            f"An estimate, not a guarantee: on {n} images mIoU falls by {figures['miou_drop']:.2f} points, and the "
            f"bootstrap over images puts the fall between {low:.2f} and {high:.2f}, each end with {wish.confidence:g}."
        )
    per_image = {"pixels": "of an image's pixels", "classes": "of pixels, averaged over an image's classes,"}[
        wish.average
    ]
    loss = {
        "max_disagreement": f"the share {per_image} that differ from the dense model",
        "max_error_increase": f"the increase of the share {per_image} that are wrong, over the dense model's "
        "(a decrease counts as none)",
    }[wish.what]
    like = "Holds for images exchangeable with these, not for other cameras, weather or places."
    if wish.images_above is not None:
        return (
            f"With confidence {wish.confidence:g} over the draw of {n} test images, at most {wish.images_above:g} of "
            f"images like them have more than {wish.value:g} as {loss}. {like}"
        )
    clipped = "" if wish.clip == 1.0 else f", clipped at {wish.clip:g} per image,"
    if wish.in_expectation:
        return (
            f"On average over draws of {n} test images and of one more, {loss}{clipped} is at most {wish.value:g} on "
            f"that image. No confidence: for these {n} images in particular the mean may be higher. {like}"
        )
    return (
        f"With confidence {wish.confidence:g} over the draw of {n} test images, the mean over images like them of "
        f"{loss}{clipped} is at most {wish.value:g}. It bounds the mean, not every image. {like}"
    )
