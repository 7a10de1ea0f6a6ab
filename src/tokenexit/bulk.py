"""Many pictures through a model: decoded ahead of it, packed for it, drawn and written behind it.

    jobs -> items (a thread) -> packs -> predictions -> files (threads), films and failures

Every step keeps the order of the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from tokenexit.calibration.drift import Monitor, watch
from tokenexit.errors import DataError
from tokenexit.formats import video
from tokenexit.formats.outputs import PARTS, VIDEO_SUFFIX, About, Output, Prediction, blended
from tokenexit.formats.places import Place
from tokenexit.inference import Precision, inference
from tokenexit.methods import Method
from tokenexit.preprocessing import MAX_PIXELS, Preprocessing, load_image
from tokenexit.segmenter import ExitSegmenter
from tokenexit.sources import Job, frame_name
from tokenexit.windows import PACK_TOKENS, Segmentation, WindowedOutput
from tokenexit.writing import whole

WRITERS = 4
"""Threads that draw, compress and write."""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------- pictures come in


@dataclass(frozen=True)
class Shot:
    """A picture or a frame. name: of its results; file: of itself; words: for messages; tensor: for the network."""

    name: str
    file: str
    words: str
    picture: Image.Image
    tensor: Tensor


@dataclass(frozen=True)
class Failure:
    sentence: str


@dataclass(frozen=True)
class End:
    """Of a job, with the number of frames it has."""

    job: Job
    frames: int


Item: TypeAlias = Shot | Failure | End
Settled: TypeAlias = Future[Image.Image | None] | Failure | End
"""Of a picture: its files being written, and then its frame of a film, if there is one."""


def shots(
    jobs: Iterable[Job], preprocessing: Preprocessing, wanted: Callable[[str], bool], max_pixels: int = MAX_PIXELS
) -> Iterator[Item]:
    """Pictures of all jobs, in order, and what cannot be one; behind each job its end.

    wanted: by name, whether results of a picture are.
    """
    for job in jobs:
        count = 0
        try:
            for name, file, words, load in _pictures(job, max_pixels):
                count += 1
                if wanted(name):
                    yield _shot(name, file, words, load, preprocessing)
        except DataError as error:  # the video's own
            yield Failure(str(error))
        yield End(job, count)


def _pictures(job: Job, max_pixels: int) -> Iterator[tuple[str, str, str, Callable[[], Image.Image]]]:
    if job.video is None:
        for path, name in job.pictures:
            yield name, f"{name}{path.suffix}", f"image '{path}'", lambda path=path: load_image(path, max_pixels)  # type: ignore[misc]
    else:
        for number, load in enumerate(video.frames(job.video, max_pixels), start=1):
            name = frame_name(job, number)
            yield name, f"{name}.png", f"frame {number} of video '{job.video}'", load


def _shot(
    name: str, file: str, words: str, load: Callable[[], Image.Image], preprocessing: Preprocessing
) -> Shot | Failure:
    try:
        picture = load()
        return Shot(name, file, words, picture, preprocessing.to_tensor(picture))
    except DataError as error:
        return Failure(str(error))
    except MemoryError:
        return Failure(f"{words} does not fit into memory: shrink it.")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same, each made in a thread while the one before it is used."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming: Future[T | EllipsisType] = thread.submit(next, source, ...)
        while not isinstance(item := coming.result(), EllipsisType):
            coming = thread.submit(next, source, ...)
            yield item


def packed(items: Iterable[Item], patch_size: int, max_tokens: int) -> Iterator[list[Item]]:
    """Consecutive items, with as many pictures as have `max_tokens` together, and at least one."""
    pack: list[Item] = []
    held = 0
    for item in items:
        if isinstance(item, Shot):
            height, width = item.tensor.shape[1:]
            tokens = -(-height // patch_size) * -(-width // patch_size)
            if held and held + tokens > max_tokens:
                yield pack
                pack, held = [], 0
            held += tokens
        pack.append(item)
    if pack:
        yield pack


# ----------------------------------------------------------------------------------------------- through the network


@dataclass(frozen=True)
class Engine:
    """How pictures are segmented. scores: whether those of the classes are wanted. monitor: sees every picture."""

    model: ExitSegmenter
    method: Method[Any]
    precision: Precision = "fp32"
    scores: bool = False
    monitor: Monitor | None = None

    @property
    def max_tokens(self) -> int:
        """What runs at once; a picture alone where its answer would depend on its companions."""
        return PACK_TOKENS if self.method.batch_independent else 1

    def predict(self, pack: Sequence[Shot]) -> Sequence[Prediction | Failure]:
        """In a block of `inference`. Pictures that do not fit into memory together are taken one by one."""
        with suppress(torch.OutOfMemoryError, MemoryError):
            return self._predict(pack)
        # Here, where what was on its way is free again.
        if len(pack) > 1:
            return [answer for shot in pack for answer in self.predict([shot])]
        words = f"{pack[0].words} of {pack[0].picture.height}x{pack[0].picture.width} pixels"
        return [Failure(f"{words} does not fit into memory: shrink it, or take it in windows.")]

    def _predict(self, pack: Sequence[Shot]) -> Sequence[Prediction]:
        if not pack:
            return []
        model = self.model
        with nullcontext() if self.monitor is None else watch(model) as seen:
            tensors = [shot.tensor.to(model.device) for shot in pack]
            out = model.segment(tensors, self.method, [(shot.picture.height, shot.picture.width) for shot in pack])
            found = [self._prediction(shot, out[i]) for i, shot in enumerate(pack)]
        if self.monitor is not None and seen is not None:
            windows = [len(own) for own in out.boxes] if isinstance(out, WindowedOutput) else [1] * len(pack)
            self.monitor.add(seen.histograms(windows))
        return found

    def _prediction(self, shot: Shot, out: Segmentation) -> Prediction:
        (height, width), patch = out.sizes[0], out.patch_size
        return Prediction(
            shot.file,
            shot.picture,
            out.labels[0].cpu().numpy(),
            out.scores[0].cpu().numpy() if self.scores else None,
            out.exit_stage[0].cpu().numpy(),
            out.num_exits,
            extent=(height / patch, width / patch),  # without the padding to whole patches
            exits=self.method.has_exits,
        )


# ------------------------------------------------------------------------------------------------------ files go out


@dataclass(frozen=True)
class Keep:
    """What is kept of predictions, and where. film: whether each job makes one, of `fps` frames a second."""

    results: Place
    outputs: Mapping[str, Output]
    about: About
    film: bool = False
    fps: float = 25.0

    def write(self, name: str, seen: Prediction) -> Image.Image | None:
        """All files of a picture or none. Returns its frame of a film, if there is one."""
        with ExitStack() as files:
            for output in self.outputs.values():
                output.save(seen, self.about, files.enter_context(whole(self.results.path(output.file(name)))))
        return blended(seen, self.about) if self.film else None

    def film_of(self, job: Job) -> AbstractContextManager[Callable[[Image.Image], None]]:
        """See `video.encoder`."""
        rate = Fraction(self.fps).limit_denominator(1001) if job.video is None else video.rate_of(job.video)
        return video.encoder(self.results.path(job.name + VIDEO_SUFFIX), rate)


def count_file(job: Job) -> str:
    """Says of how many frames a video is, once all of them are done."""
    return f"{PARTS}/{job.name}.frames.json"


class _Spoiled(Exception):
    """Ends a film that lacks a frame."""


@dataclass
class Share:
    """What one process does. pictures: how many it segmented. failed: places of jobs, and a sentence each."""

    engine: Engine
    keep: Keep
    pictures: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)

    def do(
        self,
        jobs: Sequence[Job],
        wanted: Callable[[str], bool],
        max_pixels: int,
        progress: Callable[[Iterable[Path]], Iterable[Path]],
    ) -> None:
        """Raises `ConfigError` where nothing can be written."""
        model = self.engine.model
        items = shots(jobs, model.preprocessing, wanted, max_pixels)
        packs = ahead(packed(items, model.config.backbone.patch_size, self.engine.max_tokens))
        try:
            with inference(model.device, self.engine.precision), ThreadPoolExecutor(WRITERS) as writers:
                settled = self._behind(packs, writers)
                for place, _ in enumerate(progress([job.path for job in jobs])):
                    try:
                        with suppress(_Spoiled):
                            self._take(place, jobs[place], settled)
                    except DataError as error:  # at the end of a film
                        self.failed.append((place, str(error)))
        except OSError as error:
            raise self.keep.results.unwritable(error) from None

    def _behind(self, packs: Iterable[Sequence[Item]], writers: ThreadPoolExecutor) -> Iterator[Settled]:
        """What becomes of every item, in order, when the network is one pack further."""
        waiting: list[Settled] = []
        for pack in packs:
            answers = iter(self.engine.predict([item for item in pack if isinstance(item, Shot)]))
            coming: list[Settled] = []
            for item in pack:
                if not isinstance(item, Shot):
                    coming.append(item)
                elif isinstance(answer := next(answers), Failure):
                    coming.append(answer)
                else:
                    coming.append(writers.submit(self.keep.write, item.name, answer))
            yield from waiting
            waiting = coming
        yield from waiting

    def _take(self, place: int, job: Job, settled: Iterator[Settled]) -> None:
        """What comes of one job, up to its end. Its film is there whole or not at all."""
        with ExitStack() as film:
            add: Callable[[Image.Image], None] | None = None
            whole_so_far = True
            while not isinstance(each := next(settled), End):
                try:
                    frame = self._frame(each)
                    if frame is not None and whole_so_far:
                        add = add or film.enter_context(self.keep.film_of(job))
                        add(frame)
                except DataError as error:
                    self.failed.append((place, str(error)))
                    whole_so_far = False
            if not whole_so_far:
                raise _Spoiled
        if job.video is not None:
            self.keep.results.write(count_file(job), f"{each.frames}\n")

    def _frame(self, each: Future[Image.Image | None] | Failure) -> Image.Image | None:
        if isinstance(each, Failure):
            raise DataError(each.sentence)
        frame = each.result()
        self.pictures += 1
        return frame
