"""Pictures and videos on disk in; masks, overlays, exit maps and the layouts of others on disk out.

Pictures are decoded ahead of the network and packed, small ones with others; files are drawn and written behind it. One
bad file does not stop the rest. What a killed call has written is whole, and the next call takes up what is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from tokenexit.bulk import Engine, Keep, Share, count_file
from tokenexit.calibration.drift import Monitor
from tokenexit.errors import ConfigError
from tokenexit.evaluation.processes import from_first, gather, place, together
from tokenexit.formats.label_studio import LOCAL_FILES
from tokenexit.formats.outputs import DEFAULT, OUTPUTS, PARTS, VIDEO, VIDEO_SUFFIX, About, Output
from tokenexit.formats.places import Place
from tokenexit.gating import gated_by_size
from tokenexit.inference import Precision
from tokenexit.methods import Method, build_method, spec_of
from tokenexit.preprocessing import MAX_PIXELS, Labels, default_labels
from tokenexit.segmenter import ExitSegmenter
from tokenexit.sources import Job, frame_name, list_jobs
from tokenexit.writing import whole

RECORD = "predictions.json"
"""What the predictions of a folder were made with."""


@dataclass(frozen=True)
class Predicted:
    """What a call did. pictures: segmented, frames among them. skipped: pictures and videos that were whole before.
    failed: a sentence for each that could not be segmented."""

    pictures: int
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
    fps: float = 25.0,
    image_url: str = LOCAL_FILES,
    gate: bool = False,
    monitor: Monitor | None = None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> Predicted:
    """Segment pictures, folders and lists of them, and videos, and keep what `save` names in `out`.

    sources: see `list_sources`. out: a folder, or a zip, which appears when all is done.
    save: names in `OUTPUTS`, for every picture, and "video". By default, of a picture NAME, `NAME.png` (palette mask at
        the picture's size, class per pixel), `NAME.overlay.jpg` and `NAME.exits.png`. The frames of a video NAME are
        `NAME/000001` and so on; "video" adds `NAME.overlay.mp4`, and the same of every folder of pictures as its
        frames, `fps` of them a second.
    overwrite: make again what is whole, which is passed over otherwise. `out/predictions.json` says what predictions
        were made with, and a folder of others is refused.
    max_pixels: larger pictures are refused. image_url: what comes before a picture's name in Label Studio's tasks.
    gate: pass over exits that do not pay at a picture's size (`tokenexit.gating`); `out` keeps to the choice it began
        with.
    monitor: learns how sure the exits were of each picture; not together with closed exits, which see none.

    Connected processes (torch.distributed) must all call it and see the same `out`. They share the work, all return the
    same, and the first one's monitor learns of all. Raises `ConfigError` for options that cannot work together, with
    this model or with what is in `out`.
    """
    model.check(method)
    if monitor is not None and (gate or method.inner is not method):
        raise ConfigError("a monitor wants to see every exit, and gate closes some: give one of the two.")
    films = VIDEO in save
    outputs = chosen_outputs(save)
    results = Place(out)
    rank, processes = place()
    jobs: list[Job] = []
    skipped = 0
    with together():
        if rank == 0:
            named = list_jobs(sources, out, films)
            check_jobs(named, results, outputs, films)
            if gate:
                method = _gated(model, method, precision, None if overwrite else results.read(RECORD))
            made_with = _made_with(model, method, precision)
            jobs = _open(results, named, outputs, films, made_with, overwrite)
            skipped = sum(job.size for job in named) - sum(job.size for job in jobs)
    jobs, method = from_first((jobs, method))
    about = About(classes_of(model), f"tokenexit {model.fingerprint()}", image_url)
    engine = Engine(model, method, precision, "scores" in outputs, monitor)
    share = Share(engine, Keep(results, outputs, about, films, fps))
    with together():
        mine = jobs[rank::processes]
        done = results.files() if any(job.video for job in mine) and not films else set()
        share.do(mine, lambda name: not _are_there(name, outputs, done), max_pixels, progress if rank == 0 else iter)
    told = gather((share.pictures, share.failed, monitor))
    with together():
        if rank == 0:
            _close(results, outputs, about)
    if monitor:
        monitor.join(theirs for process, (_, _, theirs) in enumerate(told) if theirs and process != rank)
    failed = sorted((n, process, text) for process, (_, texts, _) in enumerate(told) for n, text in texts)
    return Predicted(sum(pictures for pictures, _, _ in told), skipped, tuple(text for _, _, text in failed))


def classes_of(model: ExitSegmenter) -> Labels:
    return model.preprocessing.labels or default_labels(model.config.num_classes)


def save_atomically(image: Image.Image, path: Path) -> None:
    """Write a picture so that the file is there whole or not at all."""
    with whole(path) as unfinished:
        image.save(unfinished)


# ------------------------------------------------------------------------------------------------- what is to be done


def chosen_outputs(save: Sequence[str]) -> dict[str, Output]:
    """Raises `ConfigError` for names that are none."""
    for name in save:
        if name not in (*OUTPUTS, VIDEO):
            raise ConfigError(f"save={name!r} is unknown: choose of {', '.join((*OUTPUTS, VIDEO))}.")
    if not save:
        raise ConfigError(f"save is empty: choose of {', '.join((*OUTPUTS, VIDEO))}.")
    return {name: OUTPUTS[name] for name in dict.fromkeys(save) if name != VIDEO}


def check_jobs(jobs: Sequence[Job], results: Place, outputs: Mapping[str, Output], films: bool) -> None:
    """Refuse results that would take the place of each other or of a picture, and videos where pictures are needed."""

    @cache
    def real(folder: Path) -> Path:
        return folder.resolve()

    sources = [path for job in jobs for path, _ in job.pictures] + [job.video for job in jobs if job.video]
    given = {real(path.parent) / path.name for path in sources}
    taken: dict[str, Path] = {}
    for job in jobs:
        if job.video is not None and "labelstudio" in outputs:
            raise ConfigError(f"{job.video} is a video, and Label Studio's masks are of pictures: give its frames.")
        for path, file in _targets(job, outputs, films, frames=1):
            target = results.folder / file
            if real(target.parent) / target.name in given:
                raise ConfigError(f"{target} is a picture and would be overwritten: choose another folder for results.")
            if file in taken:
                raise ConfigError(
                    f"{taken[file]} and {path} would both be written to {target}: rename one, or predict them to "
                    "different folders."
                )
            taken[file] = path


def _targets(job: Job, outputs: Mapping[str, Output], films: bool, frames: int) -> Iterator[tuple[Path, str]]:
    """Every file that a job leaves, of a video so many frames, and the path it is made of."""
    pictures = job.pictures or [(job.path, frame_name(job, n)) for n in range(1, frames + 1)]
    for path, name in pictures:
        for output in outputs.values():
            yield path, output.file(name)
    if films:
        yield job.path, job.name + VIDEO_SUFFIX


def _open(
    results: Place,
    jobs: Sequence[Job],
    outputs: Mapping[str, Output],
    films: bool,
    made_with: dict[str, Any],
    overwrite: bool,
) -> list[Job]:
    """The jobs that are left, with all made ready for them."""
    there, record = results.files(), results.read(RECORD)
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
                f"{results.out} holds predictions of other pictures made with other {others}: choose another folder."
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


def _is_whole(job: Job, outputs: Mapping[str, Output], films: bool, results: Place, there: set[str]) -> bool:
    frames = results.read(count_file(job)) if job.video is not None and count_file(job) in there else 0
    if job.video is not None and not frames:
        return False
    return all(file in there for _, file in _targets(job, outputs, films, frames))


def _are_there(name: str, outputs: Mapping[str, Output], there: set[str]) -> bool:
    return all(output.file(name) in there for output in outputs.values()) if there else False


def _left_of(job: Job, outputs: Mapping[str, Output], films: bool, there: set[str]) -> set[str]:
    """Files of an earlier call that a job makes again."""
    if job.video is None:
        return there.intersection(file for _, file in _targets(job, outputs, films, 0))
    suffixes = tuple(output.suffix for output in outputs.values())
    folders = (f"{job.name}/", f"{PARTS}/{job.name}/")
    frames = {file for file in there if file.startswith(folders) and file.endswith(suffixes)}
    return frames | there.intersection((count_file(job), job.name + VIDEO_SUFFIX))


def _gated(model: ExitSegmenter, method: Method[Any], precision: Precision, record: Any) -> Method[Any]:
    """The exits that pay here, or those that predictions of this method in `out` were begun with."""
    try:
        before = build_method(record["method"])
    except (ConfigError, KeyError, TypeError, ValueError):  # nothing begun, or nothing that could be known
        return gated_by_size(model, method, precision)
    return before if before.inner == method else gated_by_size(model, method, precision)


def _made_with(model: ExitSegmenter, method: Method[Any], precision: Precision) -> dict[str, Any]:
    """What predictions depend on beside the pictures, as JSON has it."""
    record = {
        "weights": model.fingerprint(),
        "method": spec_of(method, whole=True),
        "precision": precision,
        "preprocessing": model.preprocessing.to_dict(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=repr))
    return plain


def _close(results: Place, outputs: Mapping[str, Output], about: About) -> None:
    """Write what is one of all pictures."""
    if results.is_packed:
        return
    for output in outputs.values():
        if output.files_of_all:
            parts = sorted((results.folder / output.folder).rglob(f"*{output.suffix}"))
            texts = output.of_all([json.loads(part.read_text()) for part in parts], about)
            for file, text in zip(output.files_of_all, texts, strict=True):
                results.write(file, text)
    results.close()
