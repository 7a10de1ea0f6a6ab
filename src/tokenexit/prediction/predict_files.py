"""Predict images and videos on disk: write masks, overlays, exit maps and the annotation formats of other tools.

Images are decoded ahead of the network and packed, small ones with others; files are drawn and written behind it. One
bad file does not stop the rest. The files of a killed call are whole, and the next call goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from tokenexit.calibration.drift import Monitor
from tokenexit.calibration.gating import gated_by_size
from tokenexit.errors import ConfigError
from tokenexit.inputs import heic
from tokenexit.inputs.images import MAX_PIXELS
from tokenexit.inputs.sources import (
    RECORD,
    SUFFIXES,
    Say,
    WorkItem,
    at_most,
    frame_name,
    is_video,
    jobs_of,
    list_sources,
    name_apart,
    quiet,
)
from tokenexit.methods import GatedBySize, Method, Resized, build_method, spec_of
from tokenexit.prediction.label_studio import LOCAL_FILES
from tokenexit.prediction.outputs import DEFAULT, OUTPUTS, PARTS, VIDEO, VIDEO_SUFFIX, CallInfo, Output
from tokenexit.prediction.pipeline import MAX_TOKENS, Engine, Limits, ResultWriter, Worker, count_file
from tokenexit.prediction.store import OutputFolder
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.distributed import all_or_none, from_first, gather, rank_and_size
from tokenexit.runtime.precision import Precision
from tokenexit.segmenter import ExitSegmenter


@dataclass(frozen=True)
class Predicted:
    """The result of `predict_files`.

    images: number of segmented images, frames of videos included. skipped: number of images and videos whose files
    were all there. failed: a sentence for each that could not be segmented.
    """

    images: int
    skipped: int
    failed: tuple[str, ...]


def predict_files(
    model: ExitSegmenter,
    sources: Sequence[Path],
    out: Path,
    method: Method[Any],
    *,
    save: Sequence[str] = DEFAULT,
    overwrite: bool = False,
    precision: Precision = "fp32",
    max_pixels: int = MAX_PIXELS,
    max_tokens: int = MAX_TOKENS,
    fps: float = 25.0,
    image_url: str = LOCAL_FILES,
    gate: bool = False,
    monitor: Monitor | None = None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
    say: Say = quiet,
) -> Predicted:
    """Segment images, folders and lists of them, and videos, and write the results to `out`.

    Args:
        model: in evaluation mode.
        sources: files, folders and lists, see `list_sources`.
        out: a folder, or a zip, which appears when all is done.
        method: what the model runs with.
        save: names in `OUTPUTS`, for every image, and "video". By default an image NAME leaves `NAME.png` (palette mask
            at the image's size, class per pixel), `NAME.overlay.jpg` and `NAME.exits.png`. Where results of two images
            would meet, the suffix is part of the name: `a.jpg.png` and `a.png.png`. The frames of a video NAME are
            `NAME/000001` and so on; "video" adds `NAME.overlay.mp4`, and makes one of every folder of images as its
            frames, `fps` of them a second.
        overwrite: make again the files that are there, which are kept otherwise. `out/predictions.json` says how
            predictions were made, and a folder of others is refused.
        precision: of matrix products.
        max_pixels: larger images are refused.
        max_tokens: images, or windows of them, with more patch tokens are refused: their time grows with the square.
        fps: frames per second of a video made of a folder.
        image_url: what comes before an image's name in Label Studio's tasks.
        gate: pass over exits that do not pay at an image's size (`tokenexit.calibration.gating`); `out` keeps to the
            choice it began with.
        monitor: learns how sure the exits were of each image; not together with exits that are closed by size.
        progress: wraps the list of paths that this call works on, in order.
        say: is told failures as they come, files that are passed over, and images that will take long.

    Connected processes (torch.distributed) must all call it and see the same `out`. They share the work, all return the
    same, and the first one's monitor learns of all.

    Returns:
        Numbers of images, and a sentence for each that failed.

    Raises:
        ConfigError: for options that cannot work together, with this model or with the files in `out`.
        DataError: for a folder or list without images.
    """
    model.check(method)
    if monitor is not None and (gate or not method.same_exits):
        raise ConfigError(
            "a monitor must see the same exits of all images, and gate closes some by size: give one of the two."
        )
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}: raise it.")
    films = VIDEO in save
    outputs = chosen_outputs(save)
    results = OutputFolder(out)
    rank, processes = rank_and_size()
    jobs: list[WorkItem] = []
    skipped = 0
    with all_or_none():
        if rank == 0:
            named = list_sources(sources, out, say, SUFFIXES | heic.SUFFIXES if heic.is_available() else SUFFIXES)
            check_sources(named, results)
            named = name_apart(named, may_leave, say)
            check_sources(named, results)
            listed = jobs_of(named, films)
            check_jobs(listed, results, outputs, films)
            if gate:
                method = _gated(model, method, precision, None if overwrite else results.read(RECORD))
            made_with = _made_with(model, method, precision)
            jobs = _open(results, listed, outputs, films, made_with, overwrite)
            skipped = sum(job.size for job in listed) - sum(job.size for job in jobs)
    jobs, method = from_first((jobs, method))
    about = CallInfo(model.classes, f"tokenexit {model.fingerprint()}", image_url)
    engine = Engine(model, method, precision, "scores" in outputs, monitor)
    worker = Worker(engine, ResultWriter(results, outputs, about, films, fps), say)
    with all_or_none():
        mine = jobs[rank::processes]
        done = results.files() if any(job.video for job in mine) and not films else set()
        limits = Limits(max_pixels, max_tokens)
        worker.do(mine, lambda name: not _are_there(name, outputs, done), limits, progress if rank == 0 else iter)
    told = gather((worker.images, worker.failed, monitor))
    with all_or_none():
        if rank == 0:
            _close(results, outputs, about)
    if monitor:
        monitor.join(theirs for process, (_, _, theirs) in enumerate(told) if theirs and process != rank)
    failed = sorted((n, process, text) for process, (_, texts, _) in enumerate(told) for n, text in texts)
    return Predicted(sum(images for images, _, _ in told), skipped, tuple(text for _, _, text in failed))


def save_atomically(image: Image.Image, path: Path) -> None:
    """Write an image so that the file is there whole or not at all."""
    with atomic_write(path) as unfinished:
        image.save(unfinished)


# ------------------------------------------------------------------------------------------------- what is to be done


def chosen_outputs(save: Sequence[str]) -> dict[str, Output]:
    """Look up outputs by name, without "video". Raises `ConfigError` for unknown names, and for none."""
    for name in save:
        if name not in (*OUTPUTS, VIDEO):
            raise ConfigError(f"save={name!r} is unknown: choose of {', '.join((*OUTPUTS, VIDEO))}.")
    if not save:
        raise ConfigError(f"save is empty: choose of {', '.join((*OUTPUTS, VIDEO))}.")
    return {name: OUTPUTS[name] for name in dict.fromkeys(save) if name != VIDEO}


def may_leave(path: Path, name: str) -> Iterator[str]:
    """Yield every file that a source may leave, whatever is saved, so that names do not depend on it."""
    for output in OUTPUTS.values():
        yield output.file(frame_name(name, 1) if is_video(path) else name)
    if is_video(path):
        yield name + VIDEO_SUFFIX


def check_sources(named: Mapping[Path, str], results: OutputFolder) -> None:
    """Reject sources that lie where results will be, as results of earlier calls do.

    Results that take the suffixes of their sources could not overwrite them, and would be taken for images next time.
    """

    @cache
    def real(folder: Path) -> str:
        return os.path.realpath(folder)

    given = {(real(path.parent), path.name) for path in named}
    meeting = []
    for path, name in named.items():
        for target in (results.folder / file for file in may_leave(path, name)):
            if (real(target.parent), target.name) in given:
                meeting.append(f"{target} of {path}")
    if meeting:
        raise ConfigError(
            f"results would overwrite what is given as an image ({at_most(meeting)}): choose another folder for the "
            "results, or leave results of earlier calls out."
        )


def check_jobs(jobs: Sequence[WorkItem], results: OutputFolder, outputs: Mapping[str, Output], films: bool) -> None:
    """Reject results that would overwrite each other, and videos where images are needed."""
    taken: dict[str, Path] = {}
    meeting: dict[tuple[Path, Path], Path] = {}
    for job in jobs:
        if job.video is not None and "labelstudio" in outputs:
            raise ConfigError(f"{job.video} is a video, and Label Studio's masks are of images: give its frames.")
        for path, file in _targets(job, outputs, films, frames=1):
            if file in taken:
                meeting.setdefault((taken[file], path), results.folder / file)
            taken.setdefault(file, path)
    if meeting:
        words = [f"{first} and {second} to {target}" for (first, second), target in meeting.items()]
        raise ConfigError(
            f"results would overwrite each other ({at_most(words)}): rename one of each, or predict them to different "
            "folders."
        )


def _targets(job: WorkItem, outputs: Mapping[str, Output], films: bool, frames: int) -> Iterator[tuple[Path, str]]:
    """Yield every file that a job leaves, with the path that it is made of. frames: number of them in a video."""
    images = job.images or [(job.path, frame_name(job.name, n)) for n in range(1, frames + 1)]
    for path, name in images:
        for output in outputs.values():
            yield path, output.file(name)
    if films:
        yield job.path, job.name + VIDEO_SUFFIX


def _open(
    results: OutputFolder,
    jobs: Sequence[WorkItem],
    outputs: Mapping[str, Output],
    films: bool,
    made_with: dict[str, Any],
    overwrite: bool,
) -> list[WorkItem]:
    """Return the jobs that are left to do, and make `out` ready for them."""
    there, record = results.files(), _in_todays_words(results.read(RECORD))
    known = isinstance(record, dict)
    others = " and ".join(key for key, value in made_with.items() if known and record.get(key) != value)
    if others and not overwrite:
        raise ConfigError(
            f"{results.out} holds predictions made with other {others}: choose another folder, or --overwrite."
        )
    if overwrite or not known:  # a later call is to know old files from new ones
        old = {file for job in jobs for file in _left_of(job, OUTPUTS if others else outputs, films, there)}
        of_all = {PARTS, *(file for output in OUTPUTS.values() for file in output.files_of_all)}
        parts = {file for file in there if others and Path(file).parts[0] in of_all}
        suffixes = tuple(output.suffix for output in OUTPUTS.values())
        if others and any(file.endswith(suffixes) for file in there - old - parts):
            raise ConfigError(
                f"{results.out} holds predictions of other images made with other {others}: choose another folder."
            )
        results.open()
        results.forget(old | parts)
        left = list(jobs)
    else:
        left = [job for job in jobs if not _is_whole(job, outputs, films, results, there)]
        if left:
            results.open()
    if left:
        results.write(RECORD, json.dumps(made_with, indent=2) + "\n")
    return left


def _is_whole(
    job: WorkItem, outputs: Mapping[str, Output], films: bool, results: OutputFolder, there: set[str]
) -> bool:
    frames = results.read(count_file(job)) if job.video is not None and count_file(job) in there else 0
    if job.video is not None and not frames:
        return False
    return all(file in there for _, file in _targets(job, outputs, films, frames))


def _are_there(name: str, outputs: Mapping[str, Output], there: set[str]) -> bool:
    return all(output.file(name) in there for output in outputs.values()) if there else False


def _left_of(job: WorkItem, outputs: Mapping[str, Output], films: bool, there: set[str]) -> set[str]:
    """List the files of an earlier call that a job makes again."""
    if job.video is None:
        return there.intersection(file for _, file in _targets(job, outputs, films, 0))
    suffixes = tuple(output.suffix for output in outputs.values())
    folders = (f"{job.name}/", f"{PARTS}/{job.name}/")
    frames = {file for file in there if file.startswith(folders) and file.endswith(suffixes)}
    return frames | there.intersection((count_file(job), job.name + VIDEO_SUFFIX))


def _gated(model: ExitSegmenter, method: Method[Any], precision: Precision, record: Any) -> Method[Any]:
    """Close the exits that do not pay here, or those that were closed when predictions in `out` were begun."""
    try:
        before = build_method(record["method"])
    except (ConfigError, KeyError, TypeError, ValueError):  # nothing was begun, or by another version
        return gated_by_size(model, method, precision)
    return before if _without_gates(before) == method else gated_by_size(model, method, precision)


def _without_gates(method: Method[Any]) -> Method[Any]:
    """Return the method with all its exits open."""
    if isinstance(method, Resized):
        return replace(method, method=_without_gates(method.method))
    return method.method if isinstance(method, GatedBySize) else method


def _made_with(model: ExitSegmenter, method: Method[Any], precision: Precision) -> dict[str, Any]:
    """Record, as JSON has it, what predictions depend on beside the images."""
    record = {
        "weights": model.fingerprint(),
        "method": spec_of(method, whole=True),
        "precision": precision,
        "preprocessing": model.preprocessing.to_dict(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=repr))
    return plain


def _in_todays_words(record: Any) -> Any:
    """Return the record of an earlier call with the options that its method has by now, at their defaults."""
    try:
        method = spec_of(build_method(record["method"]), whole=True)
    except (ConfigError, KeyError, TypeError, ValueError):  # no record, or of a method that is not known any more
        return record
    return {**record, "method": json.loads(json.dumps(method))}


def _close(results: OutputFolder, outputs: Mapping[str, Output], about: CallInfo) -> None:
    """Write the files that are one for all images."""
    if results.is_packed:
        return
    for output in outputs.values():
        if output.files_of_all:
            parts = sorted((results.folder / output.folder).rglob(f"*{output.suffix}"))
            texts = output.of_all([json.loads(part.read_bytes()) for part in parts], about)
            for file, text in zip(output.files_of_all, texts, strict=True):
                results.write(file, text)
    results.close()
