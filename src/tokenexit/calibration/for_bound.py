"""Thresholds for a bound: the path is fixed on one part of the images and tested on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenexit.calibration import risk_control
from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import (
    CalibrationSet,
    Reference,
    TrueRun,
    dense_reference,
    error,
    true_run,
    truth_reference,
)
from tokenexit.calibration.planner import Outcome, Planner, cap_sentence, figures_of
from tokenexit.calibration.targets import Average, Bound
from tokenexit.calibration.threshold_path import position_where
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, Method, ThresholdMethod
from tokenexit.reducers import Reducer

PATH_SHARE = 0.3
"""Share of the images on which a path to be tested is fixed."""
LEAST_PATH_IMAGES = 4
PILOT_RUNS = 6
"""True runs that relate positions on the path to what is lost, before anything is tested."""
RATIOS = (0.05, 0.1, 0.2, 0.3, *(0.35 + 0.05 * i for i in range(14)), 1.1, 1.25, 1.5)
"""Losses over the bound, as pilot runs expect them, at which the path is tested."""

PILOT_FRACTION = 0.7
"""Share of a bound that a test on several hundred images lets pass, about: where paths are compared."""


def for_bound(
    calibration_set: CalibrationSet,
    method: ThresholdMethod[Any],
    target: Bound,
    average: Average,
    cap: float | None,
    seed: int,
    say: Callable[[str], None],
    by: Reducer | None = None,
) -> Outcome:
    """Choose the cheapest position on the path that passes the tests of the bound, one after the other.

    by: what merges tokens beside the method; what it loses alone is tested first.
    Raises `ConfigError` where not even the first passes, and for too few images.
    """
    path_part, test_part = split(len(calibration_set), target, seed)
    pilot, test = calibration_set.part(path_part), calibration_set.part(test_part)
    planner = Planner(pilot, method, average, by=by)
    if cap is not None:
        planner.hold_to(cap, planner.path.end / 2)
    positions = positions_to_test(planner, SequentialTest.on(pilot, target))
    say(f"path fixed on {len(pilot)} images, testing up to {len(positions)} positions on {len(test)} others")

    sequential_test = SequentialTest.on(test, target)
    count = risk_control.fixed_sequence(
        len(positions), lambda j: sequential_test.passes(planner.method_at(positions[j]))
    )
    if count == 0:
        raise ConfigError(sequential_test.out_of_reach("" if by is None else "merge less, "))
    position, run, figures = positions[count - 1], sequential_test.accepted, sequential_test.figures
    assert run is not None, "some position was accepted"
    reached = {**figures_of(run, planner, position), **figures, "places_tested": min(count + 1, len(positions))}
    images = {"count": len(calibration_set), "path": len(pilot), "test": len(test), "seed": seed}
    guarantee = guarantee_of(target, len(test), figures) + cap_sentence(cap)
    if not target.needs_labels:  # else runs are compared with the truth, and the bound is on what that says
        guarantee += fall_off_note(error(run.confusion, "pixels").mean().item(), len(test))
    return Outcome(planner.method_at(position), run, reached, images, guarantee)


def split(count: int, target: Bound, seed: int) -> tuple[list[int], list[int]]:
    """Images that fix the path and those it is tested on, disjoint, drawn at random.

    Raises `ConfigError` where no outcome of the test could pass, with the number of images that could.
    """
    needed = target.needed_images()
    path = min(max(round(PATH_SHARE * count), LEAST_PATH_IMAGES), count - needed)
    if path < LEAST_PATH_IMAGES:
        kind = "in expectation" if target.in_expectation else f"at confidence {target.confidence:g}"
        raise ConfigError(
            f"{target.what}={target.value:g} {kind} needs at least {needed} images to test on, even if "
            "nothing is lost on "
            f"any of them, and {LEAST_PATH_IMAGES} more to fix the path; there are {count}: give "
            f"{needed + LEAST_PATH_IMAGES} or more, or ask for less."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:path]), sorted(order[path:])


def positions_to_test(planner: Planner, sequential_test: SequentialTest) -> list[float]:
    """Positions in order on the path that saves most, denser where pilot runs expect to lose what the bound allows.

    sequential_test: on images that are not tested. The path is chosen by what it costs where pilot runs lose
        `PILOT_FRACTION` of the bound.
    """
    spots, seen = fix_path(planner, sequential_test)
    positions = [0.0]
    for position in sorted({*spots, *(crossing(spots, seen, wanted) for wanted in RATIOS)}):
        if position > positions[-1] + 1e-2:
            positions.append(position)
    return positions[1:] if loses_nothing_at_first(planner) and len(positions) > 1 else positions


def loses_nothing_at_first(planner: Planner) -> bool:
    """Return whether all tokens go on to the end at the first position, which nobody needs to test then."""
    return planner.by is None and planner.method.last_exit is None and planner.method.cap is None


def fix_path(planner: Planner, sequential_test: SequentialTest) -> tuple[list[float], list[float]]:
    """Use the path that costs least where pilot runs lose `PILOT_FRACTION` of the bound; return its `pilot_runs`."""
    found = []
    for path in planner.paths:
        planner.path = path
        spots, seen = pilot_runs(planner, sequential_test)
        position = crossing(spots, seen, PILOT_FRACTION)
        found.append((planner.mac_ratio(position), path, spots, seen))
    _, planner.path, spots, seen = min(found, key=lambda one: one[0])
    return spots, seen


def pilot_runs(planner: Planner, sequential_test: SequentialTest) -> tuple[list[float], list[float]]:
    """Positions evenly spaced in predicted compute, and the losses there over the bound, made to rise.

    At the first position nobody leaves; beside merging, a stop or a cap something is lost there, too.
    """
    first, last = planner.mac_ratio(0.0), planner.mac_ratio(planner.path.end)
    spots, seen = [0.0], [0.0 if loses_nothing_at_first(planner) else sequential_test.ratio(planner.method_at(0.0))]
    for i in range(PILOT_RUNS):
        spot = position_where(planner.mac_ratio, first + (last - first) * (i + 1) / PILOT_RUNS, planner.path.end)
        if spot > spots[-1]:
            spots.append(spot)
            seen.append(max(seen[-1], sequential_test.ratio(planner.method_at(spot))))
        if seen[-1] > RATIOS[-1]:
            break
    return spots, seen


def crossing(spots: Sequence[float], seen: Sequence[float], wanted: float) -> float:
    """The position at which a rising line through the points first reaches `wanted`; the last one if it does not."""
    if seen[0] >= wanted:
        return spots[0]
    for i in range(1, len(spots)):
        if seen[i] >= wanted:
            rise = seen[i] - seen[i - 1]
            return spots[i - 1] + (spots[i] - spots[i - 1]) * ((wanted - seen[i - 1]) / rise if rise > 0 else 0.0)
    return spots[-1]


class SequentialTest:
    """Tests thresholds of a path, one after the other, on one set of images.

    dense: the true run of the dense model, where losses are compared with its own.
    """

    def __init__(
        self, calibration_set: CalibrationSet, target: Bound, reference: Reference, dense: TrueRun | None
    ) -> None:
        self.calibration_set, self.target, self.reference, self.dense = calibration_set, target, reference, dense
        self.accepted: TrueRun | None = None
        self.figures: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._envelope = torch.zeros(len(calibration_set), dtype=torch.float64)

    @classmethod
    def on(cls, calibration_set: CalibrationSet, target: Bound) -> SequentialTest:
        if not target.needs_labels:
            return cls(calibration_set, target, dense_reference(calibration_set), None)
        truth = truth_reference(calibration_set)
        return cls(calibration_set, target, truth, true_run(calibration_set, Dense(), truth, "dense"))

    def run(self, method: Method[Any]) -> TrueRun:
        return true_run(self.calibration_set, method, self.reference, "true run")

    def ratio(self, method: Method[Any]) -> float:
        """The loss of a method over the bound."""
        run = self.run(method)
        if self.target.what == "max_miou_drop":
            return self._drop(run)[0] / self.target.value
        return self.target.losses(run, self.dense).mean().item() / self.target.alpha

    def passes(self, method: Method[Any]) -> bool:
        run = self.run(method)
        passed, self._last = self.judge(run)
        if passed:
            self.accepted, self.figures = run, self._last
        return passed

    def judge(self, run: TrueRun) -> tuple[bool, dict[str, Any]]:
        """Judge a true run: whether it meets the target, and the figures that say so."""
        target, delta = self.target, 1 - self.target.confidence
        if target.what == "max_miou_drop":
            drop, low, high = self._drop(run)
            return high <= target.value, {"miou_drop": drop, "miou_drop_interval": [low, high]}
        losses = target.losses(run, self.dense)
        n, mean = len(losses), losses.mean().item()
        name = "share_of_images_above" if target.images_above is not None else "mean_loss"
        figures: dict[str, Any] = {name: mean * (target.clip if target.images_above is None else 1.0)}
        if target.in_expectation:
            self._envelope = torch.maximum(self._envelope, losses)
            figures["mean_of_largest_losses"] = self._envelope.mean().item() * target.clip
            return risk_control.controls_expectation(self._envelope.mean().item(), n, target.alpha), figures
        if target.images_above is not None:
            p = risk_control.binomial(round(mean * n), n, target.alpha).item()
        else:
            p = risk_control.hoeffding_bentkus(mean, n, target.alpha).item()
        return p <= delta, {**figures, "p_value": p}

    def out_of_reach(self, cure: str = "") -> str:
        """Say why not even the first position passed, and what would. cure: another one, with a comma behind it."""
        target, n = self.target, len(self.calibration_set)
        asked = f"{target.what}={target.value:g}"
        if target.what == "max_miou_drop":
            return (
                f"{asked} is out of reach: the most careful exits may lose {self._last['miou_drop_interval'][1]:.2f}."
            )
        if target.images_above is not None:
            share = self._last["share_of_images_above"]
            return (
                f"{asked} is out of reach on all but {target.images_above:g} of images: with the most careful exits "
                f"{share:.3f} of {n} exceed it; ask for a larger loss or share, {cure}or use --method dense."
            )
        mean = self._last["mean_loss"] / target.clip
        if target.in_expectation:
            bound = math.ceil((n * mean + 1) / (n + 1) * target.clip * 1e4) / 1e4
        else:
            bound = risk_control.smallest_bound(mean, n, target.confidence) * target.clip
        return (
            f"{asked} is out of reach: with the most careful exits {n} images support a bound of {bound:.4g}; ask for "
            f"that or more, give more images, {cure}or use --method dense."
        )

    def _drop(self, run: TrueRun) -> tuple[float, float, float]:
        assert self.dense is not None, "mIoU is compared with the dense model's"
        return risk_control.bootstrap_drop(self.dense.confusion, run.confusion, self.target.confidence)


def guarantee_of(target: Bound, n: int, figures: dict[str, Any]) -> str:
    """Say what holds, and what does not."""
    if target.what == "max_miou_drop":
        low, high = figures["miou_drop_interval"]
        return (
            f"An estimate, not a guarantee: on {n} images mIoU falls by {figures['miou_drop']:.2f} points, and the "
            f"bootstrap over images puts the fall between {low:.2f} and {high:.2f}, each end with "
            f"{target.confidence:g}."
        )
    per_image = {"pixels": "of an image's pixels", "classes": "of pixels, averaged over an image's classes,"}[
        target.average
    ]
    loss = {
        "max_disagreement": f"the share {per_image} that differ from the dense model",
        "max_error_increase": f"the increase of the share {per_image} that are wrong, over the dense model's "
        "(a decrease counts as none)",
    }[target.what]
    like = "Holds for images exchangeable with these, not for other cameras, weather or places."
    if target.images_above is not None:
        return (
            f"With confidence {target.confidence:g} over the draw of {n} test images, at most "
            f"{target.images_above:g} of "
            f"images like them have more than {target.value:g} as {loss}. {like}"
        )
    clipped = "" if target.clip == 1.0 else f", clipped at {target.clip:g} per image,"
    if target.in_expectation:
        return (
            f"On average over draws of {n} test images and of one more, {loss}{clipped} is at most {target.value:g} on "
            f"that image. No confidence: for these {n} images in particular the mean may be higher. {like}"
        )
    return (
        f"With confidence {target.confidence:g} over the draw of {n} test images, the mean over images like them of "
        f"{loss}{clipped} is at most {target.value:g}. It bounds the mean, not every image. {like}"
    )
