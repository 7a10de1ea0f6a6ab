"""The pipeline of prediction: images are decoded ahead of the model, packed for it, drawn and written behind it.

    jobs -> items (a thread) -> packs -> predictions -> files (threads), films and failures

Every step keeps the order of the jobs. What is said of them (failures, images that take long) is said as it comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from tokenexit.calibration.drift import Monitor, hook_scores
from tokenexit.calibration.latency import seconds_per_mac
from tokenexit.errors import DataError
from tokenexit.inputs import heic
from tokenexit.inputs.images import MAX_PIXELS, load_image
from tokenexit.inputs.preprocessing import Preprocessing, resized_size, scaled_size
from tokenexit.inputs.sources import Say, WorkItem, frame_name, quiet
from tokenexit.methods import Method
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.windows import PACK_TOKENS, Segmentation, dense_macs, window_boxes
from tokenexit.prediction import video
from tokenexit.prediction.outputs import PARTS, VIDEO_SUFFIX, CallInfo, Output, Prediction, blended
from tokenexit.prediction.store import OutputFolder
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

WRITERS = 4
"""Threads that draw, compress and write."""
MAX_TOKENS = 32_768
"""Patch tokens of the largest image, or window, that is taken: 8 megapixels at patch 16. Attention grows with their
square, so that an image of three times as many pixels takes nearly ten times as long."""
SLOW_SECONDS = 10.0
"""Images that are expected to take longer are announced."""

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------- images come in


@dataclass(frozen=True)
class Limits:
    """The largest image that is accepted. pixels: of the file. tokens: in one forward pass, an image or a window."""

    pixels: int = MAX_PIXELS
    tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Frame:
    """An image, or a frame of a video.

    name: the name of its results. file: its own. words: how messages call it. tensor: the input of the network.
    """

    name: str
    file: str
    words: str
    image: Image.Image
    tensor: Tensor


@dataclass(frozen=True)
class Failure:
    sentence: str


@dataclass(frozen=True)
class End:
    """The end of a job, with the number of its frames."""

    job: WorkItem
    frames: int


Item: TypeAlias = Frame | Failure | End
Outcome: TypeAlias = Future[Image.Image | None] | Failure | End
"""For a predicted image: a future that ends when its files are written, with its frame of the video or None."""


def frames_of(
    jobs: Iterable[WorkItem],
    preprocessing: Preprocessing,
    patch_size: int,
    wanted: Callable[[str], bool],
    limits: Limits,
    scale: float = 1.0,
) -> Iterator[Item]:
    """Yield images and failures of all work items in order, and an `End` behind each item.

    wanted: whether the results of this name are to be made. scale: by which the method resizes images.
    """
    for job in jobs:
        count = 0
        try:
            for name, file, words, load in _images(job, limits.pixels):
                count += 1
                if wanted(name):
                    yield _frame(name, file, words, load, preprocessing, patch_size, limits.tokens, scale)
        except DataError as error:  # the video's own
            yield Failure(str(error))
        yield End(job, count)


def _images(job: WorkItem, max_pixels: int) -> Iterator[tuple[str, str, str, Callable[[], Image.Image]]]:
    if job.video is None:
        for path, name in job.images:
            yield name, _file(path, name), f"image {str(path)!r}", lambda path=path: _load(path, max_pixels)  # type: ignore[misc]
    else:
        for number, load in enumerate(video.frames(job.video, max_pixels), start=1):
            name = frame_name(job.name, number)
            yield name, f"{name}.png", f"frame {number} of video '{job.video}'", load


def _file(path: Path, name: str) -> str:
    """Return the image's own file name, with as many folders as its results have."""
    return str(Path(*Path(os.path.abspath(path)).parts[-len(Path(name).parts) :]))


def _load(path: Path, max_pixels: int) -> Image.Image:
    try:
        is_regular = S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        is_regular = True  # no such file: said by those who open it
    if not is_regular:  # a pipe would be waited for
        raise DataError(f"image {str(path)!r} is no regular file: give an image file.")
    return heic.load_heic(path, max_pixels) if path.suffix.lower() in heic.SUFFIXES else load_image(path, max_pixels)


def _frame(
    name: str,
    file: str,
    words: str,
    load: Callable[[], Image.Image],
    preprocessing: Preprocessing,
    patch_size: int,
    max_tokens: int,
    scale: float,
) -> Frame | Failure:
    try:
        image = load()
        _check_tokens(words, (image.height, image.width), preprocessing, patch_size, max_tokens, scale)
        return Frame(name, file, words, image, preprocessing.to_tensor(image))
    except DataError as error:
        return Failure(str(error))
    except MemoryError:
        return Failure(f"{words} does not fit into memory: shrink it.")


def _check_tokens(
    words: str, size: Size, preprocessing: Preprocessing, patch_size: int, max_tokens: int, scale: float
) -> None:
    """Reject an image of which more than `max_tokens` would run at once, before it is resized."""
    height, width = resized_size(size, preprocessing.resize)
    window = preprocessing.window
    if window is not None:
        height, width = min(height, window[0]), min(width, window[1])
    tokens = _tokens((height, width), patch_size, scale)
    if tokens > max_tokens:
        raise DataError(
            f"{words} of {size[0]}x{size[1]} pixels would run as {tokens} tokens at once, more than {max_tokens}: take "
            "it in windows (--window 1024), shrink it, or allow more (--max-tokens)."
        )


def _tokens(size: Size, patch_size: int, scale: float) -> int:
    """Return the patch tokens of an image of `size` that a method resizes by `scale`."""
    height, width = scaled_size(size, scale)
    return -(-height // patch_size) * -(-width // patch_size)


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items, each made in a thread while the one before it is used."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming: Future[T | EllipsisType] = thread.submit(next, source, ...)
        while not isinstance(item := coming.result(), EllipsisType):
            coming = thread.submit(next, source, ...)
            yield item


def packed(items: Iterable[Item], patch_size: int, max_tokens: int, scale: float = 1.0) -> Iterator[list[Item]]:
    """Yield consecutive items, with as many images as have `max_tokens` together, and at least one.

    scale: by which the method resizes images.
    """
    pack: list[Item] = []
    held = 0
    for item in items:
        if isinstance(item, Frame):
            tokens = _tokens((item.tensor.shape[1], item.tensor.shape[2]), patch_size, scale)
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
    """A model and how it segments images.

    scores: whether outputs need class scores. monitor: the drift monitor, which sees every image.
    """

    model: ExitSegmenter
    method: Method[Any]
    precision: Precision = "fp32"
    scores: bool = False
    monitor: Monitor | None = None

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a pack; an image runs alone where others in the batch would change its prediction."""
        return PACK_TOKENS if self.method.batch_independent else 1

    @cached_property
    def seconds_per_mac(self) -> float:
        """Seconds per multiply-add on this machine, in a block of `inference`; 0 where not even a small image fits into
        memory: all of them will fail in a sentence of their own."""
        try:
            return seconds_per_mac(self.model)
        except (torch.OutOfMemoryError, MemoryError):
            return 0.0

    def tokens_and_seconds(self, frame: Frame) -> tuple[int, float]:
        """Return the patch tokens of all windows of an image, and the seconds that they take if none exits."""
        model, scale = self.model, self.method.input_scale
        window, stride = model.preprocessing.window, model.preprocessing.stride
        size = (frame.tensor.shape[1], frame.tensor.shape[2])
        sides = [(bottom - top, right - left) for top, left, bottom, right in window_boxes(size, window, stride)]
        macs = dense_macs(model.backbone, model.decode_head, size, window, stride, scale)
        return sum(
            _tokens(side, model.config.backbone.patch_size, scale) for side in sides
        ), macs * self.seconds_per_mac

    def predict(self, pack: Sequence[Frame]) -> Sequence[Prediction | Failure]:
        """Predict a pack, in a block of `inference`. Images that do not fit into memory together run one by one."""
        with suppress(torch.OutOfMemoryError, MemoryError):
            return self._predict(pack)
        # Outside the block, where the memory of the failed call is free again.
        if len(pack) > 1:
            return [answer for frame in pack for answer in self.predict([frame])]
        words = f"{pack[0].words} of {pack[0].image.height}x{pack[0].image.width} pixels"
        return [Failure(f"{words} does not fit into memory: shrink it, or take it in windows.")]

    def _predict(self, pack: Sequence[Frame]) -> Sequence[Prediction | Failure]:
        if not pack:
            return []
        model = self.model
        with nullcontext() if self.monitor is None else hook_scores(model) as seen:
            tensors = [frame.tensor.to(model.device) for frame in pack]
            out = model.segment(tensors, self.method, [(frame.image.height, frame.image.width) for frame in pack])
            found = [self._prediction(frame, out[i]) for i, frame in enumerate(pack)]
        if self.monitor is not None and seen is not None:
            self.monitor.add(seen.histograms(out.window_counts))
        return found

    def _prediction(self, frame: Frame, out: Segmentation) -> Prediction | Failure:
        (height, width), patch = out.sizes[0], out.patch_size
        try:
            labels, scores = out.labels[0], out.scores[0] if self.scores else None
        except DataError as error:
            return Failure(f"{frame.words} cannot be segmented: {error}")
        return Prediction(
            frame.file,
            frame.image,
            labels.cpu().numpy(),
            None if scores is None else scores.cpu().numpy(),
            out.exit_index[0].cpu().numpy(),
            out.num_exits,
            extent=(height / patch, width / patch),  # without the padding to whole patches
            exits=self.method.inner.has_exits,
            groups=out.groups[0].cpu().numpy() if out.groups else None,
        )


# ------------------------------------------------------------------------------------------------------ files go out


@dataclass(frozen=True)
class ResultWriter:
    """Writes the chosen outputs. film: whether each work item makes a video, of `fps` frames a second."""

    results: OutputFolder
    outputs: Mapping[str, Output]
    about: CallInfo
    film: bool = False
    fps: float = 25.0

    def write(self, name: str, seen: Prediction) -> Image.Image | None:
        """Write all files of an image or none. Returns its frame of the video, if one is made."""
        with ExitStack() as files:
            for output in self.outputs.values():
                output.save(seen, self.about, files.enter_context(atomic_write(self.results.path(output.file(name)))))
        return blended(seen, self.about) if self.film else None

    def film_of(self, job: WorkItem) -> AbstractContextManager[Callable[[Image.Image], None]]:
        """Open the video of a work item: see `video.encoder`."""
        rate = Fraction(self.fps).limit_denominator(1001) if job.video is None else video.rate_of(job.video)
        return video.encoder(self.results.path(job.name + VIDEO_SUFFIX), rate)


def count_file(job: WorkItem) -> str:
    """Name the file that says how many frames a video has, once all of them are done."""
    return f"{PARTS}/{job.name}.frames.json"


class _Spoiled(Exception):
    """A frame is missing, so that the video is not written."""


@dataclass
class Worker:
    """The work of one process. say: is told failures, and of images that take long, as they come.

    images: how many images it segmented. failed: the index of a job and a sentence, for each failure.
    """

    engine: Engine
    writer: ResultWriter
    say: Say = quiet
    images: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)
    announced: float = field(default_factory=lambda: SLOW_SECONDS / 2)

    def do(
        self,
        jobs: Sequence[WorkItem],
        wanted: Callable[[str], bool],
        limits: Limits,
        progress: Callable[[Iterable[Path]], Iterable[Path]],
    ) -> None:
        """Predict the jobs. Raises `ConfigError` where nothing can be written."""
        model, scale = self.engine.model, self.engine.method.input_scale
        patch_size = model.config.backbone.patch_size
        items = frames_of(jobs, model.preprocessing, patch_size, wanted, limits, scale)
        packs = prefetch(packed(items, patch_size, self.engine.max_tokens, scale))
        try:
            with inference(model.device, self.engine.precision), ThreadPoolExecutor(WRITERS) as writers:
                outcomes = self._outcomes(packs, writers)
                for index, _ in enumerate(progress([job.path for job in jobs])):
                    try:
                        with suppress(_Spoiled):
                            self._take(index, jobs[index], outcomes)
                    except DataError as error:  # at the end of a film
                        self._fail(index, str(error))
        except OSError as error:
            raise self.writer.results.unwritable(error) from None

    def _fail(self, index: int, sentence: str) -> None:
        self.failed.append((index, sentence))
        self.say(sentence)

    def _announce(self, frames: Sequence[Frame]) -> None:
        """Announce how long a large image will take, if that is long, and twice as long as was announced before."""
        for frame in frames:
            if frame.tensor[0].numel() * self.engine.method.input_scale**2 <= self._unmeasured_pixels:
                continue
            tokens, seconds = self.engine.tokens_and_seconds(frame)
            if seconds >= 2 * self.announced:
                self.announced = seconds
                cure = "" if self.engine.model.preprocessing.window else "; smaller images or --window take less"
                self.say(
                    f"{frame.words} of {frame.image.height}x{frame.image.width} pixels has {tokens} tokens, which "
                    f"take up to about {in_words(seconds)} here{cure}."
                )

    @property
    def _unmeasured_pixels(self) -> int:
        """Return the number of pixels up to which an image is not worth the measurement."""
        return PACK_TOKENS * self.engine.model.config.backbone.patch_size**2

    def _outcomes(self, packs: Iterable[Sequence[Item]], writers: ThreadPoolExecutor) -> Iterator[Outcome]:
        """Yield the outcome of every item, in order, when the network is one pack further."""
        waiting: list[Outcome] = []
        for pack in packs:
            frames = [item for item in pack if isinstance(item, Frame)]
            self._announce(frames)
            answers = iter(self.engine.predict(frames))
            coming: list[Outcome] = []
            for item in pack:
                if not isinstance(item, Frame):
                    coming.append(item)
                elif isinstance(answer := next(answers), Failure):
                    coming.append(answer)
                else:
                    coming.append(writers.submit(self.writer.write, item.name, answer))
            yield from waiting
            waiting = coming
        yield from waiting

    def _take(self, index: int, job: WorkItem, outcomes: Iterator[Outcome]) -> None:
        """Take the outcomes of one work item, up to its end. Its video is written whole or not at all."""
        with ExitStack() as film:
            add: Callable[[Image.Image], None] | None = None
            whole_so_far = True
            while not isinstance(each := next(outcomes), End):
                try:
                    frame = self._frame(each)
                    if frame is not None and whole_so_far:
                        add = add or film.enter_context(self.writer.film_of(job))
                        add(frame)
                except DataError as error:
                    self._fail(index, str(error))
                    whole_so_far = False
            if not whole_so_far:
                raise _Spoiled
        if job.video is not None:
            self.writer.results.write(count_file(job), f"{each.frames}\n")

    def _frame(self, each: Future[Image.Image | None] | Failure) -> Image.Image | None:
        if isinstance(each, Failure):
            raise DataError(each.sentence)
        frame = each.result()
        self.images += 1
        return frame


def in_words(seconds: float) -> str:
    """Write a duration to two digits or so: `40 s`, `12 min`, `3 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
