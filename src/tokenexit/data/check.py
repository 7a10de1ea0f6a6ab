"""Check a dataset before training: read every file once, count classes and sizes, and report problems.

A file that is damaged or does not fit becomes a `Problem` and never stops the check.

Legend: K classes; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenexit.data.base import Mask, SegmentationDataset
from tokenexit.data.files import FileDataset, check_sizes
from tokenexit.data.loader import is_unlabelled
from tokenexit.data.masks import number
from tokenexit.data.registry import dataset_options, dataset_splits, open_dataset
from tokenexit.errors import ConfigError, DataError, TokenExitError
from tokenexit.inputs.images import load_image
from tokenexit.inputs.labels import Labels

Status: TypeAlias = Literal["ok", "warning", "error"]
Size: TypeAlias = tuple[int, int]
Progress: TypeAlias = Callable[[Iterable[int]], Iterable[int]]
"""Passes on the numbers that it is given, and may draw a progress bar."""

ERRORS = {
    "open": "splits that cannot be opened",
    "no mask": "images without mask",
    "no image": "masks without image",
    "image": "images that cannot be read",
    "mask": "masks that cannot be read",
    "sample": "samples that cannot be read",
    "size": "masks of another size than their image",
    "values": "masks with values that are neither class nor void",
}
WARNINGS = {
    "ignored": "masks with unknown colours, which are read as void",
    "void": "masks without any class",
    "class": "classes that never occur",
}
SUMMARY_COLUMNS = ("split", "images", "masks", "pairs", "sound", "smallest", "median", "largest", "sizes", "void")


@dataclass(frozen=True)
class Problem:
    """A problem of one file. kind: a key of `ERRORS` or `WARNINGS`; message: a sentence that names the file."""

    kind: str
    file: str
    message: str

    @property
    def status(self) -> Status:
        return "error" if self.kind in ERRORS else "warning"


@dataclass(frozen=True)
class Sizes:
    """The smallest, median and largest image by number of pixels, and the number of distinct sizes."""

    smallest: Size
    median: Size
    largest: Size
    distinct: int


@dataclass(frozen=True)
class SplitReport:
    """The report of one split. sound: pairs without an error; sizes: of readable images.

    class_pixels, class_images: per class, over readable masks: its pixels, and the masks that hold it; empty where
        there are no masks.
    void_pixels: pixels that are to be ignored. unknown_pixels: pixels of values that stand for nothing.
    note: what was decided without being asked, such as how images were split.
    """

    split: str
    images: int = 0
    masks: int = 0
    pairs: int = 0
    sound: int = 0
    sizes: Sizes | None = None
    class_pixels: tuple[int, ...] = ()
    class_images: tuple[int, ...] = ()
    void_pixels: int = 0
    unknown_pixels: int = 0
    problems: tuple[Problem, ...] = ()
    note: str = ""

    @property
    def status(self) -> Status:
        return _worst(problem.status for problem in self.problems)

    @property
    def class_shares(self) -> tuple[float | None, ...]:
        """The share of every class in all pixels that have a class; None where there is no such pixel."""
        judged = sum(self.class_pixels)
        return tuple(pixels / judged if judged else None for pixels in self.class_pixels)

    @property
    def void_share(self) -> float | None:
        """The share of ignored pixels in all pixels."""
        pixels = sum(self.class_pixels) + self.void_pixels + self.unknown_pixels
        return self.void_pixels / pixels if pixels else None


@dataclass(frozen=True)
class CheckReport:
    """The report of all splits of a dataset. labels: None where no split could be opened, or there are no masks."""

    name: str
    root: str | None
    labels: Labels | None
    splits: tuple[SplitReport, ...]

    @property
    def status(self) -> Status:
        return _worst(split.status for split in self.splits)

    def summary(self) -> list[tuple[Any, ...]]:
        """Return one row per split under `SUMMARY_COLUMNS`; sizes are (height, width), None is unknown."""
        return [
            (
                s.split,
                s.images,
                s.masks,
                s.pairs,
                s.sound,
                *((s.sizes.smallest, s.sizes.median, s.sizes.largest, s.sizes.distinct) if s.sizes else (None,) * 4),
                s.void_share,
            )
            for s in self.splits
        ]

    def class_columns(self) -> tuple[str, ...]:
        """Return the columns of `classes`: number and name, then two columns for each split."""
        return ("class", "name", *(f"{s.split} {what}" for s in self._opened() for what in ("share", "images")))

    def classes(self) -> list[tuple[Any, ...]]:
        """Return one row per class: its number, its name, and for each split its share of pixels and its images."""
        if self.labels is None:
            return []
        cells = [list(zip(s.class_shares, s.class_images)) for s in self._opened()]
        return [(k, name, *(v for split in cells for v in split[k])) for k, name in enumerate(self.labels.names)]

    def problems(self) -> dict[tuple[str, str], list[Problem]]:
        """Return problems by (split, kind), errors first."""
        order = [*ERRORS, *WARNINGS]
        found: dict[tuple[str, str], list[Problem]] = {}
        for split in self.splits:
            for problem in sorted(split.problems, key=lambda p: order.index(p.kind)):
                found.setdefault((split.split, problem.kind), []).append(problem)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report in lists, strings and numbers, for a JSON file."""
        splits = [
            asdict(s) | {"status": s.status, "class_shares": s.class_shares, "void_share": s.void_share}
            for s in self.splits
        ]
        labels = None if self.labels is None else self.labels.to_dict()
        return {"name": self.name, "root": self.root, "status": self.status, "labels": labels, "splits": splits}

    def to_text(self, shown: int = 5) -> str:
        """Write two tables, the problems with the first few files of each kind, and the status in the last line."""
        parts = [*dict.fromkeys(split.note for split in self.splits if split.note)]
        parts.append(_table(SUMMARY_COLUMNS, self.summary()))
        if self.classes():
            parts.append(_table(self.class_columns(), self.classes()))
        for (split, kind), problems in self.problems().items():
            lines = [f"  {problem.message}" for problem in problems[:shown]]
            if len(problems) > shown:
                lines.append(f"  and {len(problems) - shown} more")
            title = (ERRORS | WARNINGS)[kind]
            parts.append("\n".join([f"{problems[0].status} in {split}: {title} ({len(problems)})", *lines]))
        return "\n\n".join([*parts, f"{self.name}: {self.status}"])

    def _opened(self) -> list[SplitReport]:
        return [s for s in self.splits if s.class_pixels]


def run_data_check(
    name: str,
    root: str | Path | None,
    splits: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Check a dataset, print the report and return the exit status: 1 where there are errors.

    The arguments are those of `check_dataset`; json_path: a file for all figures.
    """
    report = check_dataset(name, root, splits, options, workers, progress)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{str(json_path)!r} cannot be written ({error.strerror}): choose another file."
            ) from None
    say(report.to_text())
    return int(report.status == "error")


def check_dataset(
    name: str,
    root: str | Path | None,
    splits: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file of a dataset and report counts and problems.

    name, root, options: as for `open_dataset`. splits: those to read; None for all that are there.
    workers: threads that read; None for one per core.
    progress: receives the numbers 0, 1, .. of a split's samples, and hands them on.

    Raises `DataError` where no split is there at all, and `ConfigError` for impossible options. A given split that
    cannot be opened is a problem of the report.
    """
    threads = (os.cpu_count() or 1) if workers is None else workers
    if threads < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}: raise it.")
    given = dict(options or {})
    chosen = tuple(dict.fromkeys(splits)) if splits else dataset_splits(name, root, **given)
    if "unpaired" in dataset_options(name):
        given["unpaired"] = "skip"  # which keeps a list of them
    labels: Labels | None = None
    reports = []
    for split in chosen:
        try:
            dataset = open_dataset(name, root, split, **given)
        except DataError as error:
            reports.append(SplitReport(split, problems=(Problem("open", split, str(error)),)))
            continue
        labels = None if is_unlabelled(dataset) else dataset.labels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of oddities in files that they can read
            reports.append(_check_split(dataset, labels, split, threads, progress or iter))
    return CheckReport(name, None if root is None else str(root), labels, tuple(reports))


# ------------------------------------------------------------------------------------------------------ one split


@dataclass
class _Finding:
    """The finding of one sample."""

    problems: list[Problem] = field(default_factory=list)
    size: Size | None = None
    pixels: npt.NDArray[np.int64] | None = None  # (K,)
    void: int = 0
    unknown: int = 0

    def count(self, mask: Mask, labels: Labels, unknown: int = 0) -> None:
        """Count the pixels of a mask, in which unknown values have become void and are counted apart."""
        judged = mask[mask != labels.ignore_index]
        self.pixels = np.bincount(judged.astype(np.intp, copy=False), minlength=labels.num_classes).astype(np.int64)
        self.unknown = unknown
        self.void = mask.size - judged.size - unknown


def _check_split(
    dataset: SegmentationDataset, labels: Labels | None, split: str, threads: int, progress: Progress
) -> SplitReport:
    """Check a split. labels: None for images without masks, of which the sizes are all there is to count."""
    problems = _lonely(dataset)
    pixels = np.zeros(0 if labels is None else labels.num_classes, np.int64)
    images = np.zeros_like(pixels)
    void = unknown = sound = 0
    sizes: list[Size] = []
    findings = _inspect_all(dataset, labels, threads)
    for _ in progress(range(len(dataset))):
        finding = next(findings)
        problems += finding.problems
        sound += all(problem.status != "error" for problem in finding.problems)
        if finding.size is not None:
            sizes.append(finding.size)
        if finding.pixels is not None:
            pixels += finding.pixels
            images += finding.pixels > 0
        void, unknown = void + finding.void, unknown + finding.unknown
    for name, count in zip(() if labels is None else labels.names, pixels):
        if not count:
            problems.append(Problem("class", name, f"class {name!r} has no pixel in split {split!r}."))
    paired = dataset if isinstance(dataset, FileDataset) else None
    masks = 0 if labels is None else len(dataset)
    return SplitReport(
        split,
        images=len(dataset) if paired is None else paired.pairing.num_images,
        masks=masks if paired is None else paired.pairing.num_masks,
        pairs=masks,
        sound=sound,
        sizes=_sizes(sizes),
        class_pixels=tuple(pixels.tolist()),
        class_images=tuple(images.tolist()),
        void_pixels=void,
        unknown_pixels=unknown,
        problems=tuple(problems),
        note="" if paired is None else paired.note,
    )


def _lonely(dataset: SegmentationDataset) -> list[Problem]:
    if not isinstance(dataset, FileDataset):
        return []
    has = {"mask": "image", "image": "mask"}
    return [
        Problem(f"no {lacks}", path, f"{has[lacks]} {path!r} has no {lacks} of its name.")
        for lacks, path in dataset.pairing.unpaired
    ]


def _inspect_all(dataset: SegmentationDataset, labels: Labels | None, threads: int) -> Iterator[_Finding]:
    """Yield findings in order; only a few samples are read at a time, so that an interruption ends at once."""
    pool = ThreadPoolExecutor(threads)  # threads, since decoders run outside Python's lock
    waiting: deque[Future[_Finding]] = deque()
    try:
        for index in range(len(dataset)):
            waiting.append(pool.submit(_inspect, dataset, labels, index))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect(dataset: SegmentationDataset, labels: Labels | None, index: int) -> _Finding:
    finding = _Finding()
    if isinstance(dataset, FileDataset):
        _inspect_files(dataset, index, finding)
    else:
        try:
            sample = dataset[index]
            finding.size = sample.size
            if labels is not None:
                finding.count(sample.mask, labels)
        except Exception as error:
            finding.problems.append(Problem("sample", str(index), _sentence(error, f"sample {index}")))
    if finding.pixels is not None and not finding.pixels.any() and not finding.unknown:
        file = dataset.pairing.pairs[index].mask if isinstance(dataset, FileDataset) else str(index)
        finding.problems.append(Problem("void", file, f"mask {file!r} holds no pixel of any class."))
    return finding


def _inspect_files(dataset: FileDataset, index: int, finding: _Finding) -> None:
    """Inspect image and mask apart, so that one bad file of a pair does not hide the other."""
    pair = dataset.pairing.pairs[index]
    try:
        image = load_image(pair.image)
        finding.size = image.height, image.width
    except Exception as error:
        finding.problems.append(Problem("image", pair.image, _sentence(error, f"image {pair.image!r}")))
    try:
        mask, unknown = dataset.mask_format.translate(dataset.mask_format.read(pair.mask))
    except Exception as error:
        finding.problems.append(Problem("mask", pair.mask, _sentence(error, f"mask {pair.mask!r}")))
        return
    finding.count(mask, dataset.labels, sum(unknown.values()))
    if unknown:
        complaint = dataset.mask_format.complaint(unknown)
        kind, said = (
            ("ignored", f"has {number(len(unknown), 'unknown colour')}.")
            if complaint is None
            else ("values", complaint)
        )
        finding.problems.append(Problem(kind, pair.mask, f"mask {pair.mask!r} {said}"))
    if finding.size is not None:
        try:
            check_sizes(pair, finding.size, (mask.shape[0], mask.shape[1]))
        except DataError as error:
            finding.problems.append(Problem("size", pair.mask, str(error)))


def _sentence(error: Exception, what: str) -> str:
    """Write an error as a sentence that names the file, as errors of tokenexit do themselves."""
    if isinstance(error, TokenExitError):
        return str(error)
    return f"{what} cannot be read ({' '.join(str(error).split()) or type(error).__name__})."


def _sizes(sizes: list[Size]) -> Sizes | None:
    if not sizes:
        return None
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return Sizes(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1], len(set(sizes)))


def _worst(statuses: Iterable[Status]) -> Status:
    found = set(statuses)
    return "error" if "error" in found else "warning" if "warning" in found else "ok"


# ----------------------------------------------------------------------------------------------------------- text


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format columns two spaces apart, names to the left and numbers to the right."""
    texts = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            f"{text:{'<' if is_left else '>'}{width}}" for text, is_left, width in zip(row, left, widths)
        ).rstrip()
        for row in texts
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    return f"{value:.2%}" if isinstance(value, float) else str(value)
