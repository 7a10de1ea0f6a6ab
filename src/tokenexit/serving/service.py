"""The service: the endpoints of the page and of the API, and what they share.

A request reads its images, queues them for the batcher, waits, and encodes what it is sent: reading and encoding in
threads of their own, the model in one. Nothing is kept of a request but, for the page, its last images in memory.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from fastapi import File, Form, Header, HTTPException, Response, UploadFile
from fastapi.responses import HTMLResponse
from PIL import Image
from torch import Tensor

from tokenexit.engine.block import Block
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import default_labels
from tokenexit.methods import METHODS, Method
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.windows import PACK_TOKENS, Segmentation
from tokenexit.reducers import Reducer
from tokenexit.report.pictures import exit_colours
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving import answers
from tokenexit.serving.batching import Answer, Batcher, Expired, Forward, SegmentationRequest
from tokenexit.serving.choices import Choices, Offer
from tokenexit.serving.guards import Ending
from tokenexit.serving.masks import coco
from tokenexit.serving.metrics import Metrics
from tokenexit.serving.pace import Pace
from tokenexit.serving.page import SAMPLES, asset, knows_scenes, page_html, sample_png, sample_size
from tokenexit.serving.uploads import UploadedImage, distinct, file_name, macs_by_header, read_image
from tokenexit.version import __version__

T = TypeVar("T")

CLOSING = 5.0
"""Seconds for the running block when the server ends."""


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    upload_bytes: of a request. pixels: of an image, and of what the network sees of it, padding included. images: of
    a request. slots: images under way at once; more are refused with status 429. seconds: for an upload, and for its
    answer. work: seconds of this machine that the model may be expected to take for a request, at full compute. wait:
    seconds that an image waits for others to share its batch. batch_tokens: patch tokens of a batch. kept_bytes:
    images that the page may come back to. held_bytes: uploads under way. connections: open at once; per_address:
    of one client; silence: seconds in which a connection sends nothing. drain: seconds for what is under way when the
    server ends.
    """

    upload_bytes: int = 20_000_000
    pixels: int = 2048 * 1024
    images: int = 16
    slots: int = 64
    seconds: float = 30.0
    work: float = 15.0
    wait: float = 0.004
    batch_tokens: int = PACK_TOKENS
    kept_bytes: int = 256_000_000
    held_bytes: int = 256_000_000
    connections: int = 512
    per_address: int = 128
    silence: float = 10.0
    drain: float = 10.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (0 < value < math.inf or (value == 0 and name == "wait")):
                raise ConfigError(f"{name} must be above 0, got {value:g}: give another limit.")


class TooExpensive(Exception):
    """The expected time of a request is above the limit."""


class Saturated(Exception):
    """The queue is longer than the time limit of an answer. seconds: time after which to ask again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Health:
    """The state of the server.

    status: "ok"; "saturated" where an image that comes now is refused; "ending" after SIGTERM, with status 503.
    busy: images under way, of `places`. wait_seconds: until a small image that comes now would have its turn.
    running_seconds: how long the call of the model under way has been running.
    """

    status: Literal["ok", "saturated", "ending"]
    model: str
    version: str
    busy: int
    places: int
    wait_seconds: float
    running_seconds: float


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the model for the page. colours: RGB of the exits in their order, the last for the end."""

    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    blocks: int
    exits: list[int]
    colours: list[tuple[int, int, int]]
    methods: list[Offer]
    usual: str
    pixels: int


@dataclass(frozen=True)
class Kept:
    """An image that is kept for further views."""

    id: str
    height: int
    width: int


@dataclass(frozen=True)
class ViewRequest:
    """A request for a view of an image.

    image: `id` of an image that was sent before. compute: from 0, the least, to 1, the whole network for every token;
    the method's own thresholds if it is not given.
    """

    image: str
    method: str | None = None
    compute: float | None = None


class Service:
    """The endpoints and what they share."""

    def __init__(
        self,
        model: ExitSegmenter,
        name: str,
        limits: Limits,
        precision: Precision,
        ending: Ending,
        by: Reducer | None = None,
    ) -> None:
        self.limits, self.name, self.ending = limits, name, ending
        self.model = _labelled(model)
        self.pace = Pace.measured(model, precision)
        self.choices = Choices(model, by)
        self.metrics = Metrics({"tokenexit_busy_pictures": ("Images under way.", lambda: self.batcher.taken)})
        self.batcher = Batcher(
            _forward(model),
            max_tokens=limits.batch_tokens,
            max_slots=limits.slots,
            max_wait=limits.wait,
            observe=self._observe_batch,
            around=lambda: inference(model.device, precision),  # for good: weights are lowered once
        )
        # The first norm stands for its block: where tokens merge inside a block, the block itself is not called.
        norms = [block.norm1 for block in model.backbone.blocks if isinstance(block, Block)]
        self._hooks = [
            part.register_forward_pre_hook(lambda *_: self.batcher.between())
            for part in [*norms, *model.exit_heads, model.decode_head]
        ]
        self.samples = SAMPLES if knows_scenes(self.model) else ()
        self.page = page_html(name, self.choices.offers(), self.choices.usual.name, len(self.samples))
        self._kept: OrderedDict[str, UploadedImage] = OrderedDict()
        # Few at once: full-size maps of many classes are large, and cores are few.
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "tokenexit-images")

    def close(self) -> None:
        """Finish running requests and end."""
        self.batcher.close(CLOSING)
        self._threads.shutdown(cancel_futures=True)
        for hook in self._hooks:
            hook.remove()

    # ------------------------------------------------------------------------------------------------ the page

    async def index(self) -> HTMLResponse:
        return HTMLResponse(self.page)

    async def page_css(self) -> Response:
        return Response(asset("page.css"), media_type="text/css")

    async def page_js(self) -> Response:
        return Response(asset("page.js"), media_type="text/javascript")

    async def sample(self, number: int) -> Response:
        if not 0 <= number < len(self.samples):
            known = f"there are samples 0 to {len(self.samples) - 1}." if self.samples else "this model has no samples."
            raise HTTPException(404, known)
        png = await self._in_thread(sample_png, number, sample_size(self.model))
        return Response(png, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    async def about(self) -> ModelInfo:
        """The model: classes, exits, methods."""
        labels, exits = answers.labels_of(self.model), self.model.config.exits
        return ModelInfo(
            name=self.name,
            classes=list(labels.names),
            palette=list(labels.palette),
            blocks=self.model.depth,
            exits=list(exits),
            colours=list(exit_colours(len(exits))),
            methods=self.choices.offers(),
            usual=self.choices.usual.name,
            pixels=self.limits.pixels,
        )

    async def keep(self, image: Annotated[UploadFile, File()]) -> Kept:
        """Upload an image to view it several times. It is kept in memory until others need the room."""
        with self.batcher.slots(1):
            data = await image.read()
            _, uploaded = await self._read(data, file_name(image.filename, 0))
            key = await self._in_thread(_fingerprint, data)
        self._kept[key] = uploaded
        self._kept.move_to_end(key)
        while sum(kept.image.nbytes for kept in self._kept.values()) > self.limits.kept_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return Kept(key, *uploaded.size)

    async def view(self, asked: ViewRequest, accept_encoding: Annotated[str, Header()] = "") -> Response:
        """Maps and figures of an image that was sent before, for a method and a position on the compute dial."""
        uploaded = self._kept.get(asked.image)
        if uploaded is None:
            raise HTTPException(404, "this image is no longer kept: send it again.")
        self._kept.move_to_end(asked.image)
        method = self.choices.choose(asked.method, compute=asked.compute)
        with self.batcher.slots(1):
            size = answers.shown_size(uploaded.size, self.model.config.num_classes)
            (answer,) = await self._segment([uploaded], method, [size])

            def encoded() -> bytes:
                shown = answers.view(self.model, method, answer, uploaded.size)
                body = json.dumps(asdict(shown)).encode()
                return gzip.compress(body, 1) if "gzip" in accept_encoding else body

            body = await self._in_thread(encoded)
        headers = {"Content-Encoding": "gzip"} if "gzip" in accept_encoding else None
        return Response(body, media_type="application/json", headers=headers)

    async def plain(
        self,
        image: Annotated[UploadFile | None, File()] = None,
        sample: Annotated[int | None, Form()] = None,
        method: Annotated[str | None, Form()] = None,
        compute: Annotated[float | None, Form()] = None,
    ) -> HTMLResponse:
        """The result of one image as a page, for browsers without scripts."""
        if sample is not None and 0 <= sample < len(self.samples):
            data = await self._in_thread(sample_png, sample, sample_size(self.model))
            name = f"Sample {sample + 1}"
        elif image is not None and image.filename:
            data, name = await image.read(), file_name(image.filename, 0)
        else:
            raise DataError("no image was sent: choose a file or a sample.")
        chosen = self.choices.choose(self.choices.usual.name if method == "compare" else method, compute=compute)
        with self.batcher.slots(1):
            shown, uploaded = await self._read(data, name)
            (answer,) = await self._segment([uploaded], chosen, [uploaded.size])

            def rendered() -> str:
                labels = answers.label_map(answer)
                found = answers.figures(self.model, chosen, answer, labels, uploaded.size)
                return answers.plain_page(self.model, shown, labels, answer, found, name)

            return HTMLResponse(await self._in_thread(rendered))

    # ------------------------------------------------------------------------------------------------- the API

    async def healthz(self, response: Response) -> Health:
        """State of the server, and its waiting time."""
        wait = self.batcher.wait()
        status: Literal["ok", "saturated", "ending"] = "ok"
        if self.ending.begun:
            status, response.status_code = "ending", 503
        elif self.full() or wait > self.limits.seconds:
            status = "saturated"
        return Health(
            status,
            self.name,
            __version__,
            self.batcher.taken,
            self.limits.slots,
            round(wait, 3),
            round(self.batcher.running_seconds, 3),
        )

    def full(self) -> bool:
        """Return whether there is no room for another image."""
        return self.batcher.taken >= self.limits.slots

    async def prometheus(self) -> Response:
        """Figures since the start, in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(
        self,
        images: Annotated[list[UploadFile], File(description="One image or several: JPEG, PNG, WebP, TIFF, ...")],
        method: Annotated[
            str | None, Form(description=f"{', '.join(METHODS)}; if not given the calibrated one, else dense")
        ] = None,
        threshold: Annotated[str | None, Form(description="one for all exits, or one for each: 0.9/0.8")] = None,
        compute: Annotated[float | None, Form(description="from 0 (least) to 1 (all), instead of threshold")] = None,
        format: Annotated[Literal["json", "png", "coco"], Form(description="figures, masks, or run lengths")] = "json",
    ) -> Any:
        """Segment images at their own sizes. json: figures and exit maps, a list. png: a palette PNG whose values are
        the classes; of several images a zip of them. coco: images, categories and compressed run lengths."""
        most = min(self.limits.images, self.limits.slots)
        if len(images) > most:
            raise HTTPException(422, f"there must be at most {most} images, got {len(images)}: send them in parts.")
        chosen = self.choices.choose(method, threshold, compute)
        names = distinct([file_name(image.filename, n) for n, image in enumerate(images)])
        with self.batcher.slots(len(images)):
            read = [await self._read_to_segment(await image.read(), name, chosen) for image, name in zip(images, names)]
            uploads = [uploaded for _, uploaded in read]
            found = await self._segment(uploads, chosen, [uploaded.size for uploaded in uploads])
            return await self._in_thread(self._encoded, format, chosen, dict(zip(names, found)))

    def _encoded(self, format: str, method: Method[Any], found: dict[str, Answer]) -> Any:
        maps = {name: answers.label_map(answer) for name, answer in found.items()}
        if format == "coco":
            return coco(maps, answers.labels_of(self.model))
        if format == "json":
            return [answers.prediction(self.model, method, found[name], maps[name], name) for name in found]
        masks = {f"{os.path.splitext(name)[0]}.png": answers.mask_png(self.model, maps[name]) for name in found}
        if len(masks) > 1:
            return Response(answers.zipped(masks), media_type="application/zip")
        (mask,) = masks.values()
        return Response(mask, media_type="image/png")

    # -------------------------------------------------------------------------------------------- on the way

    async def _read_to_segment(self, data: bytes, name: str, method: Method[Any]) -> tuple[Image.Image, UploadedImage]:
        """Read an image that is to be segmented at once; one that is refused for its work is not even decoded."""
        pixels, scale = self.limits.pixels, method.input_scale
        expected = self.pace.seconds(await self._in_thread(macs_by_header, self.model, data, pixels, scale))
        self._check_time(expected, expected)
        return await self._read(data, name)

    async def _read(self, data: bytes, name: str) -> tuple[Image.Image, UploadedImage]:
        return await self._in_thread(read_image, self.model, data, name, self.limits.pixels)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    async def _segment(
        self, uploads: Sequence[UploadedImage], method: Method[Any], targets: Sequence[Size]
    ) -> list[Answer]:
        if method.input_scale != 1.0:
            uploads = [uploaded.resized(self.model, method.input_scale) for uploaded in uploads]
        costs = [self.pace.seconds(uploaded.macs) for uploaded in uploads]
        self._check_time(sum(costs), max(costs))
        deadline = time.monotonic() + self.limits.seconds
        jobs = [
            SegmentationRequest(uploaded.image, method, target, uploaded.tokens, deadline, seconds)
            for uploaded, target, seconds in zip(uploads, targets, costs)
        ]
        try:
            async with asyncio.timeout(self.limits.seconds):
                found = await asyncio.gather(*[asyncio.wrap_future(self.batcher.submit(job)) for job in jobs])
        except TimeoutError:
            raise Expired from None
        finally:  # also where the client left: the model ends before its next block
            for job in jobs:
                job.gone.set()
        for answer in found:
            self._count(method, answer)
        return list(found)

    def _check_time(self, seconds: float, longest: float) -> None:
        """Raise `TooExpensive` or `Saturated` where the images cannot be done in time."""
        limits = self.limits
        if seconds > limits.work:
            raise TooExpensive(
                f"a request must take at most {limits.work:g} seconds of this machine, got about {seconds:.2g}: "
                "send fewer or smaller images."
            )
        late = self.batcher.wait(longest) + seconds - limits.seconds
        if late > 0:
            raise Saturated(
                f"the server is busy, and the answer would come about {late:.2g} seconds after the time limit of "
                f"{limits.seconds:g}: try again later.",
                math.ceil(late),
            )

    def _count(self, method: Method[Any], answer: Answer) -> None:
        ledger, add = answer.output.ledger, self.metrics.add
        add("tokenexit_pictures_total", method=method.name)
        add("tokenexit_macs_total", ledger.macs[0], method=method.name)
        add("tokenexit_dense_macs_total", ledger.dense_macs[0], method=method.name)
        left, stayed = answers.left_at(answer, len(self.model.config.exits))
        for exit_name, count in zip([*map(str, range(1, len(left) + 1)), "end"], [*left, stayed]):
            add("tokenexit_tokens_total", count, method=method.name, exit=exit_name)

    def _observe_batch(self, output: Segmentation, seconds: float) -> None:
        self.pace.observe(sum(output.ledger.macs), seconds)
        self.metrics.observe("tokenexit_batch_pictures", len(output))
        self.metrics.observe("tokenexit_batch_seconds", seconds)


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _labelled(model: ExitSegmenter) -> ExitSegmenter:
    if model.preprocessing.labels is None:
        model.preprocessing = replace(model.preprocessing, labels=default_labels(model.config.num_classes))
    return model


def _forward(model: ExitSegmenter) -> Forward:
    device = model.device

    def forward(images: Sequence[Tensor], method: Method[Any], targets: Sequence[Size]) -> Segmentation:
        output = model.segment([image.to(device) for image in images], method, targets=targets)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that milliseconds are those of the work
        return output

    return forward
