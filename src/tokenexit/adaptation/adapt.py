"""`adapt`: exits for a trained dense model, from unlabelled photos.

    photos -> fit | choose | test
    fit:    one dense pass -> exit heads after every block, fitted to the dense model's own answers
    choose: dense passes at several sizes -> a plan of size, stop and exits, with thresholds, by true runs
    test:   what is said of it

Backbone and decode head stay as they are, so the dense prediction of the adapted model is that of the source, bit for
bit.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenexit.adaptation.features import Features, record_features
from tokenexit.adaptation.finetune import finetune
from tokenexit.adaptation.fit import FittedHead, fit_head
from tokenexit.adaptation.measure import Measured, measure
from tokenexit.adaptation.photos import FEW, PhotoSplit, split_photos, usable_photos
from tokenexit.calibration.agreement import FALL_OFF
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, drawn, error, true_run
from tokenexit.calibration.planner import costs_of
from tokenexit.calibration.plans import SIZES, Held, Plan, Survey, TriedPlan, choose_plan, search_plans, try_plan
from tokenexit.calibration.risk_control import best_bet, betting
from tokenexit.calibration.store import calibration_of
from tokenexit.calibration.targets import Average, Bound, Budget, CalibrationTarget, target_of
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.conversion.opening import open_source
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.photos import UnlabelledImages
from tokenexit.errors import ConfigError, DataError
from tokenexit.heads import Head, build_head
from tokenexit.inputs.sources import list_images
from tokenexit.methods import DoViT, DToP, Method, ThresholdMethod
from tokenexit.pretrained import CONFIG_FILE
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.notebook import Notebook
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

WORK = ".adapting"
"""Folder inside the destination that keeps what is not yet finished."""
MOST_PHOTOS = 400
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
"""Budgets of the curve, and those that a bound is tested at, from safe to daring."""
HOPELESS = 1.5
"""Loss on the photos to choose on, over the bound, from which on cheaper plans are not looked at."""

HALF, SMALL = 0.5, 200
"""Share of dense that exits are worth their trouble at, and number of tokens below which images are small."""

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


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
    """

    held: Held = field(default_factory=Held)
    exit_head: str = "fcn"
    average: Average = "classes"
    limit: int = MOST_PHOTOS
    seed: int = 0
    precision: Precision = "fp32"
    finetune: int = 0


@dataclass(frozen=True)
class Adaptation:
    """The adapted model with all that was found on the way.

    Attributes:
        model: the model, calibrated.
        dense: the model that was adapted, without exits.
        method: the plan with its thresholds, as the model runs it.
        split: how the photos were shared out.
        photos: paths of the photos, which the split counts.
        heads: for each block how well a token can be answered there.
        tried: plans that were run, the chosen one first.
        curve: what other budgets would give, as predicted.
        static_losses: for each size the predicted loss if all tokens stop after each block, and at the end.
        static_costs: the same for multiply-adds over dense ones.
        measured: figures on the photos that nothing was chosen on.
        shortfall: why the wish was not met; empty if it was.
        options: what was asked for beside the target.
        labelled: number of labelled images that plans were judged on; 0 where agreement with the dense model judged.
    """

    model: ExitSegmenter
    dense: ExitSegmenter
    method: Method[Any]
    split: PhotoSplit
    photos: tuple[Path, ...]
    heads: Mapping[int, FittedHead]
    tried: tuple[TriedPlan, ...]
    curve: tuple[tuple[float, Plan], ...]
    static_losses: Mapping[float, Sequence[float]]
    static_costs: Mapping[float, Sequence[float]]
    measured: Measured
    shortfall: str
    options: Options
    labelled: int


def adapt(
    source: ExitSegmenter | str | Path,
    images: str | Path | Sequence[str | Path],
    budget: float | None = None,
    *,
    max_disagreement: float | None = None,
    confidence: float = 0.9,
    out: str | Path | None = None,
    exits: Sequence[int] | None = None,
    size: float | None = None,
    depth: int | None = None,
    exit_head: str = "fcn",
    keep: Average = "classes",
    data: SegmentationDataset | None = None,
    finetune: int = 0,
    limit: int = MOST_PHOTOS,
    seed: int = 0,
    precision: Precision = "fp32",
    say: Callable[[str], None] = print,
) -> ExitSegmenter:
    """Make a trained dense segmenter cheaper, from photos without labels.

    Exit heads are fitted to the model's own answers; then the size of the image, the depth of the network and the exits
    are planned together. Backbone and decode head stay as they are, but for `finetune`.

    Args:
        source: a model (see `tokenexit.wrap` for modules of other libraries), a model folder, or weights that
            `tokenexit.convert` reads.
        images: photos, folders of them, or lists; at least 60.
        budget: largest mean multiply-adds, as a share of the dense model's.
        max_disagreement: in place of a budget, the largest share of pixels unlike the dense model's.
        confidence: probability with which that bound holds.
        out: folder for the model; with it, an interrupted call goes on. Without it nothing is saved.
        exits: number of blocks before each exit; chosen if not given, and an empty list for none.
        size: factor on the image's sides, at most 1; chosen if not given.
        depth: number of blocks after which everybody stops, the network's depth for no stop; chosen if not given.
        exit_head: kind of the exit heads, "fcn" or "linear".
        keep: unit in which agreement counts, "pixels", or "classes" so that rare ones count as much.
        data: images with labels by which the plan is chosen, in place of agreement with the dense model.
        finetune: number of steps by which the whole model continues with its exits on; 0 for none.
        limit: largest number of photos, drawn at random.
        seed: seed of all that is drawn.
        precision: precision of the forward pass.
        say: shows a line.

    Returns:
        The model, calibrated: `model.predict(image)` runs the plan. `model.calibration.guarantee` says what was
        measured on photos held back.

    Raises:
        ConfigError: for too few photos, with how many are needed; for a target out of reach; and for options that do
            not go together.
        CheckpointError: for a source that cannot be opened.
        DataError: if there are no photos.
    """
    target = target_of({"budget": budget, "max_disagreement": max_disagreement} | _own_confidence(budget, confidence))
    held = Held(size, depth, None if exits is None else tuple(exits))
    options = Options(held, exit_head, keep, limit, seed, precision, finetune)
    names = [images] if isinstance(images, str | Path) else list(images)
    found = adapt_model(
        open_source(source),
        [Path(name) for name in names],
        target,
        None if out is None else Path(out),
        options,
        labelled=data,
        say=say,
    )
    say(found.measured.sentence())
    return found.model


def _own_confidence(budget: float | None, confidence: float) -> dict[str, float]:
    """A confidence belongs to a bound alone."""
    return {} if budget is not None else {"confidence": confidence}


def adapt_model(
    dense: ExitSegmenter,
    images: Sequence[Path],
    target: CalibrationTarget,
    out: Path | None = None,
    options: Options | None = None,
    *,
    labelled: SegmentationDataset | None = None,
    about: Mapping[str, Any] | None = None,
    fewest: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda title: iter,
) -> Adaptation:
    """Adapt a model, and save it with its calibration in `out` if that is given; see `adapt`.

    labelled: images with labels to choose the plan on, in place of photos. fewest: photos without which there is no
        point in trying, if it is to be another number. Interrupted, a call with the same arguments goes on.
    """
    options = options or Options()
    dense = dense.with_exits(()).eval()
    if dense.config.backbone.depth < 2:
        raise ConfigError("the backbone must have at least 2 blocks, got 1: there is no place for an exit.")
    method = _method_of(dense)
    paths = usable_photos(_listed(images), dense.config.backbone.patch_size, say, progress("reading photos"))
    paths = [paths[n] for n in drawn(len(paths), options.limit, options.seed)]
    split = split_photos(len(paths), target, options.seed, **({} if fewest is None else {"fewest": fewest}))
    say(f"{len(paths)} photos: {split}")
    if len(paths) < FEW:
        say(f"warning: fewer than {FEW} photos: figures on the few that are held back are rough.")
    photos = CalibrationSet(
        dense, UnlabelledImages(paths, dense.classes), range(len(paths)), options.precision, progress
    )
    with _work_folder(out) as work:
        notebook = Notebook(work / "progress.json", _settings(dense, paths, target, options))
        heads = _fitted(photos.part(split.fit), work, notebook, options, say, progress)
        specs = [options.exit_head] * len(heads)
        everywhere = dense.with_exit_heads(tuple(heads), specs, [one.head for one in heads.values()]).eval()
        chosen_on = replace(photos.part(split.choose), model=everywhere)
        if labelled is not None:
            chosen_on = replace(chosen_on, data=labelled, indices=range(len(labelled)))
        tested_on = replace(photos.part(split.test), model=everywhere)
        sizes = SIZES if options.held.scale is None else tuple(dict.fromkeys((1.0, options.held.scale)))
        with inference(dense.device, options.precision):
            survey = Survey(chosen_on, method, options.average, sizes, labels=labelled is not None)
            tried, shortfall = _chosen(survey, tested_on, target, options, say)
            curve = tuple(_curve(survey, options.held))
        best, model = tried[0], everywhere.with_exits(tried[0].plan.places)
        if options.finetune:
            fit_on = [paths[n] for n in split.fit]
            best, model = _finetuned(survey, dense, best, model, fit_on, work / "finetune", options, say)
        with inference(dense.device, options.precision):
            measured = measure(
                replace(tested_on, model=model),
                best.method,
                dense,
                pilot=torch.zeros(1) if survey.labels else error(best.run.confusion, "pixels"),
                confidence=_confidence(target),
            )
        model.calibration = _calibration(model, best, target, options, measured, split, about or {})
        found = Adaptation(
            model,
            dense,
            best.method,
            split,
            tuple(paths),
            heads,
            (best, *tried[1:]),
            curve,
            survey.static_losses,
            survey.static_costs,
            measured,
            shortfall or _why_not(target, measured, model),
            options,
            0 if labelled is None else len(labelled),
        )
        if out is not None:
            _save(found, out)
    return found


def _save(found: Adaptation, out: Path) -> None:
    """Write model and card, and remove what was kept on the way."""
    try:
        found.model.save_pretrained(out, card=True)
        shutil.rmtree(out / WORK)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out.") from None


def _listed(images: Sequence[Path]) -> list[Path]:
    paths = list(list_images(images))
    if not paths:
        raise DataError(f"{', '.join(map(str, images))} hold no photos: name a folder that has some.")
    return paths


def _method_of(dense: ExitSegmenter) -> ThresholdMethod[Any]:
    """Return what exits do: DToP, and DoViT where the decode head reads the whole grid."""
    method: ThresholdMethod[Any] = DoViT() if dense.decode_head.needs_grid else DToP()
    dense.check(method)
    return method


def check_exit_head(spec: str, dense: ExitSegmenter) -> None:
    """Reject heads that cannot be fitted to loose tokens."""
    head = build_head(spec, dense.config.backbone.embed_dim, dense.config.num_classes)
    if not head.pointwise or head.kind != "softmax":
        raise ConfigError(f"exit_head must look at one token at a time, as fcn and linear do, got '{spec}'.")


@contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    """Yield the folder for what is not finished: inside `out`, where the next call finds it, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out.") from None
    yield out / WORK


def _settings(
    dense: ExitSegmenter, paths: Sequence[Path], target: CalibrationTarget, options: Options
) -> dict[str, Any]:
    """What decides features and fitted heads, so that another call does not go on with these."""
    photos = hashlib.sha256()
    for path in paths:
        photos.update(f"{path} {path.stat().st_size}\n".encode())
    kind = "budget" if isinstance(target, Budget) else f"{target.what}={target.value:g} at {target.confidence:g}"
    return {
        "source": dense.fingerprint(),
        "photos": photos.hexdigest()[:16],
        "split_for": kind,
        "exit_head": options.exit_head,
        "seed": options.seed,
        "precision": options.precision,
    }


# ------------------------------------------------------------------------------------------------------------- fit


def _fitted(
    photos: CalibrationSet,
    work: Path,
    notebook: Notebook,
    options: Options,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[int, FittedHead]:
    """Return the fitted head of every place, from the disk where an earlier call has fitted it."""
    dense = photos.model
    check_exit_head(options.exit_head, dense)
    blocks = _places(dense, options.held)
    features = record_features(photos, blocks, work / "features", seed=options.seed)
    heads: dict[int, FittedHead] = {}
    before: Head | None = None
    for block in progress("fitting exit heads")(blocks):
        heads[block] = _fitted_head(features, block, before, work, notebook, options)
        before = heads[block].head
    shares = ", ".join(f"{block}: {one.agreement:.1%}" for block, one in heads.items())
    say(f"tokens answered as the dense model does, by block: {shares}")
    for one in heads.values():
        one.head.to(dense.device)
    return heads


def _places(dense: ExitSegmenter, held: Held) -> tuple[int, ...]:
    """Return the numbers of blocks behind which heads are fitted: all, or those that the user names."""
    depth = dense.config.backbone.depth
    named = {*(held.exits or ()), *(() if held.depth in (None, depth) else (held.depth,))}
    wrong = sorted(n for n in named if n is not None and not 0 < n < depth)
    if wrong:
        raise ConfigError(f"exits and depth must be between 1 and {depth - 1}, got {wrong[0]}: name other blocks.")
    if held.exits is not None and held.depth is not None:
        return tuple(sorted(n for n in named if n is not None)) or (depth - 1,)  # a survey has a place at least
    return tuple(range(1, depth))


def _fitted_head(
    features: Features, block: int, before: Head | None, work: Path, notebook: Notebook, options: Options
) -> FittedHead:
    path = work / f"head{block:03}.safetensors"

    def fit() -> dict[str, Any]:
        one = fit_head(features, block, options.exit_head, start=before, seed=options.seed)
        with atomic_write(path) as unfinished:
            save_file(one.head.state_dict(), unfinished)
        return {name: value for name, value in vars(one).items() if name != "head"}

    figures = notebook.once(f"head {block}", fit)
    head = build_head(options.exit_head, features.channels, features.classes)
    head.load_state_dict(load_file(path))
    return FittedHead(head.eval(), **figures)


# ---------------------------------------------------------------------------------------------------------- choose


def _chosen(
    survey: Survey, tested_on: CalibrationSet, target: CalibrationTarget, options: Options, say: Callable[[str], None]
) -> tuple[list[TriedPlan], str]:
    """Return the plans that were run, the chosen one first, and why the wish was not met."""
    if isinstance(target, Budget):
        tried, shortfall = choose_plan(survey, target.value, options.held), ""
    else:
        tried, shortfall = _within_bound(survey, tested_on, target, options, say)
    said = (f"{one.plan}: {one.agreement:.1%} at {one.run.mac_ratio:.0%}" for one in tried)
    unit = "pixels that are right" if survey.labels else "pixels as dense has them"
    say(f"{unit}, and multiply-adds: {'; '.join(said)}")
    return tried, shortfall


def _within_bound(
    survey: Survey, tested_on: CalibrationSet, target: Bound, options: Options, say: Callable[[str], None]
) -> tuple[list[TriedPlan], str]:
    """Return the cheapest plan that passes the test of the bound, and why none does; plans go from safe to daring.

    Plans, their order and the bets are fixed on the photos to choose on, and tested on the others one after the other
    (fixed-sequence testing), so that the chance of accepting one whose loss is above the bound is at most
    1 - confidence.
    """
    candidates: list[TriedPlan] = []
    for budget in LADDER:
        plans = [plan for plan in search_plans(survey, budget, options.held) if plan.mac_ratio <= budget + 1e-9]
        one = next((found for found in (try_plan(survey, plan, budget) for plan in plans[:1]) if found), None)
        if one is None:
            break
        candidates.append(one)
        if target.losses(one.run, None).mean().item() > HOPELESS * target.alpha:
            break
    reference = dense_reference(replace(tested_on, model=survey.model.with_exits(())))
    accepted: list[TriedPlan] = []
    for one in candidates:
        model = survey.model.with_exits(one.plan.places)
        run = true_run(replace(tested_on, model=model), one.method, reference, "testing")
        bet = best_bet(target.losses(one.run, None).numpy(), target.alpha)
        if betting(target.losses(run, None).numpy(), target.alpha, bet) > 1 - target.confidence:
            break
        accepted.append(one)
    say(f"{len(accepted)} of {len(candidates)} plans pass the test on {len(tested_on)} photos, one after the other")
    if accepted:
        return accepted[::-1], ""
    return candidates[:1], f"no plan passes the test of {target.what}={target.value:g}; this one is not guaranteed"


def _curve(survey: Survey, held: Held) -> Iterator[tuple[float, Plan]]:
    """Yield the best plan by prediction at each budget."""
    for budget in LADDER:
        plans = search_plans(survey, budget, held)
        if plans:
            yield budget, plans[0]


# ------------------------------------------------------------------------------------------------------- fine-tune


def _finetuned(
    survey: Survey,
    dense: ExitSegmenter,
    best: TriedPlan,
    model: ExitSegmenter,
    photos: Sequence[Path],
    work: Path,
    options: Options,
    say: Callable[[str], None],
) -> tuple[TriedPlan, ExitSegmenter]:
    """Continue the whole model with its exits on, choose thresholds anew, and return what is better of both."""
    if not model.config.exits:
        say(f"not fine-tuned: the plan ({best.plan}) has no exits")
        return best, model
    for name, one in (("dense", dense), ("model", model)):
        if not (work / name / CONFIG_FILE).exists():
            one.save_pretrained(work / name)
    finetune(
        *(work / "model", work / "dense", photos, best.method),
        steps=options.finetune,
        out=work / "tuned",
        seed=options.seed,
        say=say,
    )
    tuned = ExitSegmenter.from_pretrained(work / "tuned", dense.device)
    with inference(dense.device, options.precision):
        images = replace(survey.images, model=tuned)
        scales = tuple(dict.fromkeys((1.0, best.plan.scale)))
        again = Survey(images, survey.method, survey.average, scales, survey.labels, dense)
        found = try_plan(again, best.plan, best.run.mac_ratio, best.kind)
    if found is None or found.loss >= best.loss:
        say("fine-tuning did not help on the photos to choose on: the model stays as it was fitted")
        return best, model
    say(f"fine-tuned: {found.agreement:.1%} of pixels as dense had them, {best.agreement:.1%} before")
    return found, tuned


# ------------------------------------------------------------------------------------------------------------ tell


def _confidence(target: CalibrationTarget) -> float:
    return target.confidence if isinstance(target, Bound) else 0.9


def _why_not(target: CalibrationTarget, measured: Measured, model: ExitSegmenter) -> str:
    """Say why half the compute cannot be had within the wish; nothing if it can."""
    if isinstance(target, Budget):
        if measured.disagreement <= FALL_OFF:
            return ""
        short = f"agreement with dense has fallen off at this budget ({measured.disagreement:.1%} of pixels are unlike)"
    elif measured.mac_ratio <= HALF:
        return ""
    else:
        short = f"within {target.value:g} this model takes {measured.mac_ratio:.0%} of dense, more than half"
    return f"{short}: {_reason(measured, model)}"


def _reason(measured: Measured, model: ExitSegmenter) -> str:
    """Name what most likely stands in the way."""
    if measured.head_share > HALF:
        return f"the decode head takes {measured.head_share:.0%} of dense multiply-adds, which no exit saves"
    if measured.tokens < SMALL:
        return f"the images are small, {measured.tokens:.0f} tokens, of which most are needed"
    name, share = measured.weakest_class(model.classes.names)
    return f"exits answer '{name}' least well, {share:.0%} of its pixels as dense does"


def _calibration(
    model: ExitSegmenter,
    best: TriedPlan,
    target: CalibrationTarget,
    options: Options,
    measured: Measured,
    split: PhotoSplit,
    about: Mapping[str, Any],
) -> Calibration:
    asked = (
        {"budget": target.value}
        if isinstance(target, Budget)
        else {target.what: target.value, "confidence": target.confidence}
    )
    reached = {**costs_of(best.run), "pixels_unlike_dense": 1.0 - best.agreement, "on_test_photos": measured.to_dict()}
    return calibration_of(
        model,
        best.method,
        best.run,
        asked={**asked, "adapted": True, "path_keeps_agreement_over": options.average, "precision": options.precision},
        guarantee=measured.sentence(),
        reached=reached,
        images={**about, "fit": len(split.fit), "count": len(split.choose), "test": len(split.test)},
    )
