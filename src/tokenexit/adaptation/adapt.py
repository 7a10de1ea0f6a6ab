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
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokenexit.adaptation.choose import Pilot, chosen, curve_of, why_not
from tokenexit.adaptation.finetune import finetune
from tokenexit.adaptation.fit import FittedHead
from tokenexit.adaptation.heads import fitted_heads, settings
from tokenexit.adaptation.measure import Measured, measure
from tokenexit.adaptation.options import MOST_PHOTOS, Options, Progress, check_options, method_of
from tokenexit.adaptation.photos import FEW, FEWEST, PhotoSplit, split_photos, usable_photos
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.calibration_set import labelled as with_labels
from tokenexit.calibration.planner import costs_of
from tokenexit.calibration.plans import Held, Plan, TriedPlan, try_plan
from tokenexit.calibration.store import calibration_of
from tokenexit.calibration.survey import Survey
from tokenexit.calibration.targets import Average, Bound, Budget, CalibrationTarget, target_of
from tokenexit.checkpoints.calibration import CALIBRATION_FILE, Calibration, read_calibration
from tokenexit.conversion.opening import open_source
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Cached
from tokenexit.data.photos import UnlabelledImages
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import check_classes
from tokenexit.inputs.sources import list_images
from tokenexit.methods import Method, spec_of
from tokenexit.pretrained import CONFIG_FILE
from tokenexit.runtime.folder import current
from tokenexit.runtime.notebook import Notebook
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

WORK = ".adapting"
"""Folder inside the destination that keeps what is not yet finished."""


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
    latency_ms: float | None = None,
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
        latency_ms: in place of a budget, the largest mean milliseconds of an image on this machine.
        max_disagreement: in place of a budget, the largest share of pixels unlike the dense model's.
        confidence: probability with which that bound holds.
        out: folder for the model; with it, an interrupted call goes on. Without it nothing is saved.
        exits: number of blocks before each exit; chosen if not given, and an empty list for none.
        size: factor on the image's sides; chosen if not given.
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
    target = target_of(
        {"budget": budget, "latency_ms": latency_ms, "max_disagreement": max_disagreement, "confidence": confidence}
    )
    held = Held(size, depth, None if exits is None else tuple(sorted(set(exits))))
    options = Options(held, exit_head, keep, limit, seed, precision, finetune)
    if out is not None:
        check_out(Path(out), source)
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


def check_out(out: Path, source: object = None) -> None:
    """Reject a folder that holds another model, which the adapted one would replace.

    Args:
        out: the folder for the adapted model.
        source: what is adapted, if it is a path.

    Raises:
        ConfigError: for the folder of the source, and for one whose model was not made by `adapt`.
        CheckpointError: for a damaged calibration in it.
    """
    if isinstance(source, str | Path) and out.resolve() == Path(source).expanduser().resolve():
        raise ConfigError(f"{out} is the source itself, which would be replaced: choose another --out.")
    if current(out, CONFIG_FILE).exists():
        calibration = read_calibration(current(out, CALIBRATION_FILE))
        if calibration is None or not calibration.asked.get("adapted"):
            raise ConfigError(f"{out} holds another model, which adapt did not make: choose another --out.")


def adapt_model(
    dense: ExitSegmenter,
    images: Sequence[Path],
    target: CalibrationTarget,
    out: Path | None = None,
    options: Options | None = None,
    *,
    labelled: SegmentationDataset | None = None,
    about: Mapping[str, Any] | None = None,
    fewest: int = FEWEST,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda title: iter,
) -> Adaptation:
    """Adapt a model, and save it with its calibration in `out` if that is given; see `adapt`.

    labelled: images with labels to choose the plan on, in place of photos. about: where the photos are from, as the
        calibration keeps it. fewest: photos without which there is no point in trying. Interrupted, a call with the
        same arguments goes on.
    """
    options = options or Options()
    dense = dense.with_exits(()).eval()
    check_options(options, target, dense)
    method = method_of(dense)
    if labelled is not None:
        check_classes(dense, labelled)
    if out is not None:
        check_out(out)
    patch_size = dense.config.backbone.patch_size
    found_on_disk = list(list_images(images))
    paths = usable_photos(found_on_disk, patch_size, options.limit, options.seed, say, progress("reading photos"))
    split = split_photos(len(paths), target, options.seed, fewest)
    say(f"{len(paths)} photos: {split}")
    if len(paths) < FEW:
        say(f"warning: fewer than {FEW} photos: figures on the few that are held back are rough.")
    photos = CalibrationSet(
        dense, UnlabelledImages(paths, dense.classes), range(len(paths)), options.precision, progress
    )
    with _work_folder(out) as work:
        notebook = Notebook(work / "progress.json", settings(dense, paths, target, options))
        heads = fitted_heads(photos.part(split.fit), work, notebook, options, say, progress)
        specs = [options.exit_head] * len(heads)
        everywhere = dense.with_exit_heads(tuple(heads), specs, [one.head for one in heads.values()]).eval()
        photos = replace(photos, model=everywhere, data=Cached(photos.data))  # run many times from here on
        tested_on, chosen_on = photos.part(split.test), photos.part(split.choose)
        judged_on = chosen_on
        if labelled is not None:
            judged_on = with_labels(replace(chosen_on, data=labelled, indices=range(len(labelled))))
        sizes = None if options.held.scale is None else tuple(dict.fromkeys((1.0, options.held.scale)))
        with inference(dense.device, options.precision):
            survey = Survey(judged_on, method, options.average, sizes, labels=labelled is not None)
            pilot = Pilot(survey, chosen_on)
            tried, shortfall = chosen(survey, pilot, tested_on, target, options, say)
            curve = tuple(curve_of(survey, options.held))
            losses = pilot.losses(tried[0])
        best, model = tried[0], everywhere.with_exits(tried[0].plan.places)
        if options.finetune:
            fit_on = [paths[n] for n in split.fit]
            best, model = _finetuned(survey, dense, best, model, fit_on, work, options, say)
        with inference(dense.device, options.precision):
            measured = measure(replace(tested_on, model=model), best.method, dense, losses, _confidence(target))
            if isinstance(target, Bound) and not shortfall:
                measured = replace(measured, bound=target.value)  # what was tested before the plan was chosen by it
            shortfall = shortfall or why_not(survey, best, target, measured, model)
        model.calibration = _calibration(model, best, target, options, measured, split, survey.labels, about or {})
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
            shortfall,
            options,
            len(judged_on) if survey.labels else 0,
        )
        if out is not None:
            _save(found, out)
    return found


def _save(found: Adaptation, out: Path) -> None:
    """Write model and card, and remove what was kept on the way."""
    with _written(out):
        found.model.save_pretrained(out, card=True)
        shutil.rmtree(out / WORK)


@contextmanager
def _written(out: Path) -> Iterator[None]:
    """Turn a folder that cannot be written into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"{out} cannot be written ({reason}): choose another --out.") from None


@contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    """Yield the folder for what is not finished: inside `out`, where the next call finds it, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    with _written(out):
        (out / WORK).mkdir(parents=True, exist_ok=True)
    yield out / WORK


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
    work = work / f"finetune-{_digest(best, options)}"  # another plan is not tuned on with this one's weights
    with _written(work):
        for name, one in (("dense", dense), ("model", model)):
            if not current(work / name, CONFIG_FILE).exists():
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
    unit = "are right" if survey.labels else "are as dense had them"
    say(f"fine-tuned: {found.agreement:.1%} of pixels {unit}, {best.agreement:.1%} before")
    return found, tuned


def _digest(best: TriedPlan, options: Options) -> str:
    """Name what is fine-tuned: places, method and steps."""
    what = json.dumps([best.plan.places, spec_of(best.method), options.finetune])
    return hashlib.sha256(what.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------ tell


def _confidence(target: CalibrationTarget) -> float:
    return target.confidence if isinstance(target, Bound) else 0.9


def _calibration(
    model: ExitSegmenter,
    best: TriedPlan,
    target: CalibrationTarget,
    options: Options,
    measured: Measured,
    split: PhotoSplit,
    labels: bool,
    about: Mapping[str, Any],
) -> Calibration:
    asked: dict[str, Any] = (
        {target.unit: target.value}
        if isinstance(target, Budget)
        else {target.what: target.value, "confidence": target.confidence}
    )
    key = "pixels_wrong" if labels else "pixels_unlike_dense"
    reached = {**costs_of(best.run), key: 1.0 - best.agreement, "on_test_photos": measured.to_dict()}
    return calibration_of(
        model,
        best.method,
        best.run,
        asked={**asked, "adapted": True, "path_keeps_agreement_over": options.average, "precision": options.precision},
        guarantee=measured.sentence(),
        reached=reached,
        images={**about, "fit": len(split.fit), "count": len(best.run.macs), "test": len(split.test)},
    )
