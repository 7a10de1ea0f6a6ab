"""The page's files, what in them depends on the model, and the scenes it offers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from string import Template

from PIL import Image

from tokenexit.data.scenes import render_scene
from tokenexit.ledger import Size
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.choices import Offer

SAMPLES = (3, 8, 11, 20, 27, 34)
"""Seeds of the scenes that the page offers."""


@cache
def asset(name: str) -> str:
    return resources.files("tokenexit.serving").joinpath(name).read_text(encoding="utf-8")


def page_html(name: str, offers: Sequence[Offer]) -> str:
    """The page with what does not change: the model's name, its methods, the samples."""
    samples = "".join(
        f'<button name="sample" value="{n}" class="sample"><img src="samples/{n}.png" alt="Sample {n + 1}" '
        'width="96" height="64"></button>'
        for n in range(len(SAMPLES))
    )
    first = next((offer.name for offer in offers if offer.name != "dense" and offer.refusal is None), "dense")
    methods = "".join(_radio(offer.name, offer.title, offer.refusal, offer.name == first) for offer in offers)
    return Template(asset("page.html")).substitute(name=escape(name), samples=samples, methods=methods)


def _radio(name: str, title: str, refusal: str | None, checked: bool) -> str:
    off = "" if refusal is None else f' class="off" title="{escape(refusal)}"'
    state = " checked" if checked else "" if refusal is None else " disabled"
    return f'<label{off}><input type="radio" name="method" value="{name}"{state}><span>{title}</span></label>'


@cache
def sample_png(number: int, size: Size) -> bytes:
    """A drawn scene as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(render_scene(SAMPLES[number], size)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def sample_size(model: ExitSegmenter) -> Size:
    """About what the model was trained on: the height of its position table, at a ratio of 2 to 3."""
    backbone = model.config.backbone
    height = min(max(backbone.pos_embed_grid[0] * backbone.patch_size, 128), 512)
    return height, height * 3 // 2
