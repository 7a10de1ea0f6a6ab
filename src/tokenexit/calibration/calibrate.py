"""`calibrate`: from a wish to thresholds, with what was reached and what is promised.

A *budget* (mean multiply-adds, or milliseconds) is met on all images. A *bound* on what is lost is tested: the path of
thresholds is fixed on one part of the images and tested on the others, an image being the unit. Neither needs labels,
but for the error and mIoU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenexit.calibration import guarantee
from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.budget import Met, cap_shares, meet_budget
from tokenexit.calibration.dense_pass import (
    Costs,
    DensePass,
    compose,
    context_price,
    live_counts,
    with_limits,
)
from tokenexit.calibration.drift import Usual
from tokenexit.calibration.latency import latency_on_this_machine, timed_runs
from tokenexit.calibration.path import Path, build_path, even_path, place_where
from tokenexit.calibration.runs import (
    Bench,
    Reference,
    Run,
    dense_reference,
    error,
    labelled,
    true_run,
    truth_reference,
)
from tokenexit.calibration.saved import Calibration
from tokenexit.calibration.temperature import fit_temperature
from tokenexit.cost import GIGA
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, Method, MethodLike, ThresholdMethod, as_method, spec_of
from tokenexit.methods.thresholded import calibratable

Average = Literal["pixels", "classes"]
Unit = Literal["budget", "budget_gmacs", "latency_ms"]
What = Literal["max_disagreement", "max_error_increase", "max_miou_drop"]
UNITS, WHAT = get_args(Unit), get_args(What)

PATH_SHARE = 0.3
"""Share of the images on which a path to be tested is fixed."""
LEAST_PATH_IMAGES = 4
PRICES = (0.0, 0.01, 0.03, 0.1)
"""Multiples of `context_price` that paths are built with."""
COMPARED_IMAGES = 32
"""Images on which paths are compared by true runs."""
SCOUTS = 6
"""True runs that relate places on the path to what is lost, before anything is tested."""
RATIOS = (0.05, 0.1, 0.2, 0.3, *(0.35 + 0.05 * i for i in range(14)), 1.1, 1.25, 1.5)
"""Where the path is tested: losses that the scouts expect, over the bound."""


AIM = 0.7
"""Share of a bound that a test on several hundred images lets pass, about: where paths are compared."""


@dataclass(frozen=True)
class Budget:
    """Mean cost over images at most `value`: a share of dense multiply-adds, GMACs, or milliseconds on this machine."""

    unit: Unit
    value: float

    def __post_init__(self) -> None:
        if not 0.0 < self.value < math.inf:
            raise ConfigError(f"{self.unit}={self.value:g} must be above 0.")
        if self.unit == "budget" and self.value > 1.0:
            share = f"{self.value / 100:g}, or {self.value:g}%" if self.value <= 100 else "0.6, or 60%"
            raise ConfigError(f"budget={self.value:g} must be a share of dense, at most 1: write {share}.")


@dataclass(frozen=True)
class Bound:
    """What may be lost: `value` in [0, 1] of the pixels, or points of mIoU.

    what: "max_disagreement" with dense (no labels), "max_error_increase" over dense (an image where the error falls
        counts as 0), or "max_miou_drop", an estimate.
    average: of one image's error, over "pixels" or over the "classes" that its reference has.
    clip: the largest loss that an image counts with.
    images_above: bound the share of images that lose more than `value`, instead of the mean.
    in_expectation: conformal risk control, a promise on average and without a confidence.
    """

    what: What
    value: float
    confidence: float = 0.9
    average: Average = "pixels"
    clip: float = 1.0
    images_above: float | None = None
    in_expectation: bool = False

    def __post_init__(self) -> None:
        if self.what == "max_miou_drop":
            if self.images_above is not None or self.in_expectation or self.clip != 1.0:
                raise ConfigError("max_miou_drop is estimated: images_above, in_expectation and clip do not apply.")
            if not 0.0 < self.value < 100.0:
                raise ConfigError(f"max_miou_drop={self.value:g} must be points between 0 and 100.")
        elif not 0.0 < self.value < 1.0:
            raise ConfigError(f"{self.what}={self.value:g} is a share of pixels: give one between 0 and 1.")
        if not 0.0 < self.confidence < 1.0:
            raise ConfigError(f"confidence={self.confidence:g} must be between 0 and 1.")
        if not 0.0 < self.clip <= 1.0:
            raise ConfigError(f"clip={self.clip:g} must be in (0, 1]: it is an image's largest loss.")
        if self.what != "max_miou_drop" and self.value >= self.clip:
            raise ConfigError(f"{self.what}={self.value:g} says nothing of losses clipped at {self.clip:g}: lower it.")
        if self.images_above is not None:
            if not 0.0 < self.images_above < 1.0:
                raise ConfigError(f"images_above={self.images_above:g} is a share of images between 0 and 1.")
            if self.in_expectation or self.clip != 1.0:
                raise ConfigError("images_above counts images: in_expectation and clip do not apply.")

    @property
    def needs_labels(self) -> bool:
        return self.what != "max_disagreement"

    @property
    def alpha(self) -> float:
        """The bound on the mean of losses scaled to [0, 1]."""
        return self.images_above if self.images_above is not None else self.value / self.clip

    def needed_images(self) -> int:
        """Images to test on without which no outcome could pass."""
        if self.what == "max_miou_drop":
            return 2
        if self.in_expectation:
            return guarantee.needed_images_in_expectation(self.alpha)
        return guarantee.needed_images(self.alpha, self.confidence)

    def losses(self, run: Run, dense: Run | None) -> Tensor:
        """Per image, `(n,)` in [0, 1]: the clipped loss over its bound `clip`, or whether it exceeds `value`."""
        loss = error(run.confusion, self.average)
        if self.what == "max_error_increase":
            assert dense is not None, "compared with the dense model's error"
            loss = (loss - error(dense.confusion, self.average)).clamp(min=0.0)
        if self.images_above is not None:
            return (loss > self.value).double()
        return loss.clamp(max=self.clip) / self.clip


Wish = Budget | Bound


def wish_of(options: Mapping[str, Any]) -> Wish:
    """The wish among options by name: exactly one of those of `Budget` and `Bound`, and what goes with a bound."""
    asked = {name: options[name] for name in (*UNITS, *WHAT) if options.get(name) is not None}
    if len(asked) != 1:
        raise ConfigError(f"{len(asked)} wishes are given: give one of {', '.join((*UNITS, *WHAT))}.")
    ((name, value),) = asked.items()
    own = {f.name: options[f.name] for f in fields(Bound) if options.get(f.name) is not None and f.name in options}
    if name in WHAT:
        return Bound(name, value, **own)
    default = Bound("max_disagreement", 0.5)
    extra = [key for key in own if own[key] != getattr(default, key)]
    if extra:
        raise ConfigError(f"{extra[0]} belongs to a bound, and {name} is a budget: leave it out.")
    return Budget(name, value)


def calibrate(
    bench: Bench,
    method: MethodLike,
    wish: Wish,
    *,
    average: Average = "classes",
    cap: float | None = None,
    seed: int = 0,
    temperatures: bool = False,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Choose thresholds for `wish`, one per exit, and say what they reach on these images.

    method: DToP or DoViT, or its name or specification; its thresholds are replaced, its other options stay.
    average: what the path of thresholds keeps, agreement over "pixels", or over "classes" so that rare ones are
    guarded. cap: no image may cost more than this share of its dense multiply-adds. seed: of the split into parts.
    temperatures: fit those of the exit heads first, to the labels of the images that fix the path. about: where the
    images are from.

    Raises `ConfigError` in one sentence for wishes out of reach, with what is in reach, and for too few images, with
    how many are needed.
    """
    rule = calibratable(as_method(method))
    if rule.cap is not None:
        raise ConfigError("a method that has a cap keeps it: calibrate one without, and give the cap as cap=.")
    if cap is not None and cap <= 0.0:
        raise ConfigError(f"cap={cap:g} must be above 0: it is a share of dense multiply-adds.")
    if len(bench) == 0:
        raise ConfigError("there are no images to calibrate on: give some.")
    if isinstance(wish, Bound) and wish.needs_labels:
        bench = labelled(bench)
    if temperatures:
        part = bench if isinstance(wish, Budget) else bench.part(split(len(bench), wish, seed)[0])
        fit = fit_temperature(part)
        rule = replace(rule, temperature=fit)
        say(f"temperatures: {'/'.join(map(str, fit))}")
    if isinstance(wish, Budget):
        chosen = _for_budget(bench, rule, wish, average, cap)
    else:
        chosen = _for_bound(bench, rule, wish, average, cap, seed, say)
    asked = {f.name: getattr(wish, f.name) for f in fields(wish)}
    asked = {asked.pop("unit", None) or asked.pop("what"): asked.pop("value"), **asked}
    return Calibration(
        asked={**asked, "path_keeps_agreement_over": average, "cap": cap, "precision": bench.precision},
        promise=chosen.promise,
        method=spec_of(chosen.method),
        reached=chosen.reached,
        images={**(about or {}), **chosen.images},
        usual=Usual.of(chosen.run.histograms),
        model=bench.model.fingerprint(),
    )


@dataclass(frozen=True)
class _Chosen:
    method: Method[Any]
    run: Run
    reached: dict[str, Any]
    images: dict[str, Any]
    promise: str


class Planner:
    """Paths of a method on some images, one of them in use, and costs at its places as the dense pass predicts them."""

    def __init__(self, bench: Bench, method: ThresholdMethod[Any], average: Average) -> None:
        self.model, self.method = bench.model, method
        exits, depth = bench.model.config.exits, bench.model.config.backbone.depth
        never = with_limits(method, (0.0,) * len(exits))
        next(bench.part([0]).forward(never, "first image"))  # a method that cannot run on the model says so here
        self.dense = DensePass.of(bench, method)
        self.costs = Costs(self.model, method, self.dense.grids)
        prices = [price * context_price(exits, depth) for price in PRICES]

        def costs_of(dense: DensePass) -> Costs:
            return Costs(self.model, method, dense.grids)

        greedy = [build_path(self.dense, method, costs_of, average, price) for price in prices]
        self.paths = [*greedy, even_path(len(exits))]
        self.path: Path = greedy[0]

    def live(self, place: float) -> Tensor:
        return live_counts(self.dense, compose(self.dense, self.method, self.path.at(place)))

    def share(self, place: float) -> float:
        return self.costs.share(self.live(place))

    def at(self, place: float) -> ThresholdMethod[Any]:
        return with_limits(self.method, self.path.at(place))

    def disagreement(self, place: float) -> float:
        """Share of samples that differ from dense, as the dense pass predicts it."""
        stage = compose(self.dense, self.method, self.path.at(place))
        return self.dense.losses("pixels").gather(0, stage[None]).sum().item()

    def compare(self, bench: Bench, reference: Reference, share: float, average: Average) -> None:
        """Use the path that keeps most agreement with `reference`, dense labels, at this share of dense compute.

        What the loss of context does differs from model to model and cannot be seen on a dense pass, so paths that
        send tokens away earlier or later are compared by true runs, on a few images.
        """
        places = torch.linspace(0, len(bench) - 1, min(len(bench), COMPARED_IMAGES)).round().long().tolist()
        few, said = bench.part(places), reference.part(places)

        def measured(place: float) -> tuple[float, Run]:
            run = true_run(few, self.at(place), said, "comparing paths")
            return run.share, run

        losses: list[float] = []
        for path in self.paths:
            self.path = path
            met = meet_budget(share, self.path.end, self.share, measured, tolerance=0.02, runs=3)
            losses.append(2.0 if met is None else error(met.run.confusion, average).mean().item())
        self.path = self.paths[losses.index(min(losses))]

    def hold_to(self, cap: float, place: float) -> None:
        """From now on with a cap, shared out over exits as it binds least at this place."""
        shares = cap_shares(self.costs, self.live(place), cap)
        self.method = replace(self.method, cap=shares)


# ---------------------------------------------------------------------------------------------------------- budgets


def _for_budget(
    bench: Bench, method: ThresholdMethod[Any], wish: Budget, average: Average, cap: float | None
) -> _Chosen:
    model = bench.model
    planner = Planner(bench, method, average)
    reference = dense_reference(bench)
    dense_mean = planner.costs.dense.double().sum().item() / len(bench)
    exits, depth = model.config.exits, model.config.backbone.depth
    scale = {"budget": 1.0, "budget_gmacs": dense_mean / GIGA, "latency_ms": 0.0}[wish.unit]
    unit = {"budget": "of dense multiply-adds", "budget_gmacs": "GMACs", "latency_ms": "ms"}[wish.unit]
    end = planner.path.end

    if wish.unit == "latency_ms":
        if model.preprocessing.window is not None:
            raise ConfigError("latency_ms is for pictures taken whole, and this model takes windows: ask for a budget.")
        clock = latency_on_this_machine(model, method, bench.precision)

        def modelled(place: float) -> float:
            return clock.ms(planner.live(place), exits, depth).mean().item()

        # The model is of parts timed alone; one true run says by what factor the whole is off.
        times = timed_runs(bench, planner.at(end / 2))
        factor = sum(times) / len(times) / modelled(end / 2)

        def predicted(place: float) -> float:
            return factor * modelled(place)

        def measured(place: float) -> tuple[float, Run | None]:
            times = timed_runs(bench, planner.at(place))
            return sum(times) / len(times), None
    else:

        def predicted(place: float) -> float:
            return planner.share(place) * scale

        def measured(place: float) -> tuple[float, Run | None]:
            run = true_run(bench, planner.at(place), reference, "true run")
            return run.share * scale, run

    least = predicted(end)
    if cap is None and least > wish.value:
        raise ConfigError(_out_of_reach(wish, least, unit, exits))
    if cap is not None:
        planner.hold_to(cap, place_where(predicted, wish.value, end))
    planner.compare(bench, reference, planner.share(place_where(predicted, wish.value, end)), average)
    end = planner.path.end
    met: Met[Any] | None = meet_budget(wish.value, end, predicted, measured)
    if met is None:
        raise ConfigError(_out_of_reach(wish, measured(end)[0], unit, exits))
    chosen = planner.at(met.place)
    run = met.run if met.run is not None else true_run(bench, chosen, reference, "true run")
    reached = {
        **_figures(run, planner, met.place),
        "pixels_unlike_dense": error(run.confusion, "pixels").mean().item(),
        "pixels_unlike_dense_mean_over_classes": error(run.confusion, "classes").mean().item(),
    }
    words = f"{met.reached:.4g} {unit}"
    if wish.unit == "latency_ms":
        reached |= {"latency_ms_mean": met.reached, "latency_ms_predicted": met.predicted}
    promise = (
        f"The mean over these {len(bench)} images is {words}, with {1 - reached['pixels_unlike_dense']:.2%} of pixels "
        "as the dense model has them. A figure of these images: others like them differ by sampling, here by a "
        f"standard error of {reached['share_of_dense_standard_error']:.2g} of dense."
    )
    promise += _cap_words(cap) + fall_off_note(reached["pixels_unlike_dense"], len(bench))
    return _Chosen(chosen, run, reached, {"count": len(bench)}, promise)


def _out_of_reach(wish: Budget, least: float, unit: str, exits: Sequence[int]) -> str:
    least = math.ceil(least * 1e3) / 1e3
    return (
        f"{wish.unit}={wish.value:g} is out of reach: with exits after blocks {', '.join(map(str, exits))} this model "
        f"takes at least {least:g} {unit}, when all tokens leave as early as they can; ask for {least:g} or more."
    )


def _cap_words(cap: float | None) -> str:
    if cap is None:
        return ""
    return f" No image costs more than {cap:g} of its dense multiply-adds, on grids as large as these or larger."


# ------------------------------------------------------------------------------------------------------------ bounds


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
    count = guarantee.fixed_sequence(len(places), lambda j: trial.passes(planner.at(places[j])))
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
            return guarantee.controls_expectation(self._envelope.mean().item(), n, wish.alpha), figures
        if wish.images_above is not None:
            p = guarantee.binomial(round(mean * n), n, wish.alpha).item()
        else:
            p = guarantee.hoeffding_bentkus(mean, n, wish.alpha).item()
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
            bound = guarantee.smallest_bound(mean, n, wish.confidence) * wish.clip
        return (
            f"{asked} is out of reach: with the most careful exits {n} images support a bound of {bound:.4g}; ask for "
            "that or more, give more images, or use --method dense."
        )

    def _drop(self, run: Run) -> tuple[float, float, float]:
        assert self.dense is not None, "mIoU is compared with the dense model's"
        return guarantee.bootstrap_drop(self.dense.confusion, run.confusion, self.wish.confidence)


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


# --------------------------------------------------------------------------------------------------------- figures


def _figures(run: Run, planner: Planner, place: float) -> dict[str, Any]:
    """Costs at the chosen place by the true run, beside what the dense pass predicted for them."""
    return {
        **costs_of(run),
        "dense_pass_share_of_dense": planner.share(place),
        "dense_pass_pixels_unlike_dense": planner.disagreement(place),
    }


def costs_of(run: Run) -> dict[str, Any]:
    """What a true run cost, over its images."""
    return {
        "share_of_dense": run.share,
        "share_of_dense_standard_error": run.share_error,
        "gmacs_mean": run.macs.double().mean().item() / GIGA,
        "share_of_dense_largest": (run.macs.double() / run.dense_macs).max().item(),
        "live_after_exit": [round(x, 5) for x in (run.live.double() / run.tokens[:, None]).mean(0).tolist()],
    }
