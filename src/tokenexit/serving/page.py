"""The page: its files, the parts that depend on the model, and its sample scenes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

from PIL import Image

from tokenexit.data.scenes import SCENE_LABELS, render_scene
from tokenexit.outputs.ledger import Size
from tokenexit.report.html import Block, Section, report_html
from tokenexit.report.tables import Column, Table
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.choices import Offer

SAMPLES = (3, 8, 11, 20, 27, 34)
"""Seeds of the scenes that the page offers."""


@cache
def asset(name: str) -> str:
    return resources.files("tokenexit.serving").joinpath(name).read_text(encoding="utf-8")


def knows_scenes(model: ExitSegmenter) -> bool:
    """Return whether all classes of a model are drawn in the scenes; other models get no samples."""
    labels = model.preprocessing.labels
    return labels is not None and set(labels.names) <= set(SCENE_LABELS.names)


def page_html(name: str, offers: Sequence[Offer], usual: str, samples_count: int) -> str:
    """Render the page with the model's name, its methods and the samples.

    usual: the method that is selected at first.
    """
    samples = "".join(
        f'<button name="sample" value="{n}" class="sample"><img src="samples/{n}.png" alt="Sample {n + 1}" '
        'width="96" height="64"></button>'
        for n in range(samples_count)
    )
    methods = "".join(_radio(offer.name, offer.title, offer.refusal, offer.name == usual) for offer in offers)
    calibrated = any(offer.calibrated for offer in offers)
    note = "" if calibrated else '<p class="quiet">This model is not calibrated: dense unless you choose another.</p>'
    return Template(asset("page.html")).substitute(name=escape(name), samples=samples, methods=methods, note=note)


def _radio(name: str, title: str, refusal: str | None, checked: bool) -> str:
    off = "" if refusal is None else f' class="off" title="{escape(refusal)}"'
    state = " checked" if checked else "" if refusal is None else " disabled"
    return f'<label{off}><input type="radio" name="method" value="{name}"{state}><span>{title}</span></label>'


def docs_html(document: Mapping[str, Any]) -> str:
    """Render the OpenAPI document as a page that loads nothing: addresses, their fields, their answers."""
    sections = []
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            fields = [[name, _kind(field), field.get("description", "")] for name, field in _fields(about, document)]
            answers = [[status, answer.get("description", "")] for status, answer in about["responses"].items()]
            blocks: list[Block] = [about.get("description", about.get("summary", ""))]
            if fields:
                blocks.append(Table([Column("field"), Column("type"), Column("meaning")], fields))
            blocks.append(Table([Column("status"), Column("meaning")], answers))
            sections.append(Section(f"{method.upper()} {path}", blocks))
    return report_html("The HTTP API", sections, "Programs read the same at openapi.json.")


def _fields(about: Mapping[str, Any], document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return names and schemas of the fields of a request."""
    content = about.get("requestBody", {}).get("content", {})
    found = [(field["name"], field["schema"]) for field in about.get("parameters", [])]
    for body in content.values():
        name = body["schema"]["$ref"].rpartition("/")[2]
        found += document["components"]["schemas"][name]["properties"].items()
    return found


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = [part["type"] for part in schema.get("anyOf", [schema]) if part.get("type") not in (None, "null")]
    return " or ".join(map(str, schema.get("enum", kinds)))


@cache
def sample_png(number: int, size: Size) -> bytes:
    """Encode a drawn scene as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(render_scene(SAMPLES[number], size)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def sample_size(model: ExitSegmenter) -> Size:
    """Return a size near that of training: the height of the position table, at a ratio of 2 to 3."""
    backbone = model.config.backbone
    height = min(max(backbone.pos_embed_grid[0] * backbone.patch_size, 128), 512)
    return height, height * 3 // 2
