"""Reports as one self-contained HTML file: text, tables, images and charts, for light and dark, desk and phone.

Images travel inside the file as data URIs; there is no script, no font and no address to load from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Protocol, TypeAlias

from PIL import Image

from tokenexit.errors import ConfigError
from tokenexit.report.pictures import data_uri
from tokenexit.report.tables import Swatch, swatch_html
from tokenexit.runtime.atomic import atomic_write


class Renders(Protocol):
    """A block that renders itself as HTML: a `Table`, and the blocks below."""

    def to_html(self) -> str: ...


Block: TypeAlias = str | Renders
"""A string is text: empty lines separate paragraphs, `backticks` mark code."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Code:
    """Commands or settings, shown verbatim."""

    text: str

    def to_html(self) -> str:
        return f"<pre><code>{escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Facts:
    """Key figures in large print: pairs of value and name ("-38 %", "multiply-adds")."""

    facts: Sequence[tuple[str, str]]

    def to_html(self) -> str:
        cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for value, name in self.facts)
        return f'<dl class="facts">{cells}</dl>'


@dataclass(frozen=True)
class Legend:
    """A legend of the colours of classes, or of exits (`pictures.exit_legend`)."""

    title: str
    swatches: Sequence[Swatch]

    def to_html(self) -> str:
        entries = "".join(f"<li>{swatch_html(colour)}{escape(label)}</li>" for label, colour in self.swatches)
        return f'<div class="legend"><span class="name">{escape(self.title)}</span><ul>{entries}</ul></div>'


@dataclass(frozen=True)
class Figure:
    """An image with its caption, a note in small print below it, and its alternative text."""

    image: Image.Image
    caption: str
    note: str = ""
    alt: str = ""


@dataclass(frozen=True)
class FigureRow:
    """Images side by side on a grid of `columns` (two on a phone); more figures than columns go on below."""

    figures: Sequence[Figure]
    title: str = ""
    columns: int = 4

    def to_html(self) -> str:
        heading = f"<h3>{escape(self.title)}</h3>\n" if self.title else ""
        figures = "\n".join(self._figure(figure) for figure in self.figures)
        return f'{heading}<div class="figures" style="--columns:{int(self.columns)}">\n{figures}\n</div>'

    def _figure(self, figure: Figure) -> str:
        alt = figure.alt or ": ".join(filter(None, [self.title, figure.caption]))
        uri, (width, height) = data_uri(figure.image)
        note = f"<small>{escape(figure.note)}</small>" if figure.note else ""
        return (
            f'<figure><img src="{uri}" width="{width}" height="{height}" alt="{escape(alt, quote=True)}">'
            f"<figcaption>{escape(figure.caption)}{note}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Chart:
    """An inline drawing, as `line_chart_svg` makes it, with its caption. The SVG text is taken as it is."""

    svg: str
    caption: str = ""

    def to_html(self) -> str:
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure class="chart">{self.svg}{caption}</figure>'


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], summary: str = "", footer: str = ""
) -> Path:
    """Write the report and return its path. summary: one sentence under the title. footer: one line at the end.

    The file appears whole or not at all; an older one of that name is replaced. Missing folders are made.
    """
    path = Path(path)
    page = report_html(title, sections, summary, footer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"the report {str(path)!r} cannot be written ({reason}): choose another path.") from None
    return path


def report_html(title: str, sections: Sequence[Section], summary: str = "", footer: str = "") -> str:
    """Return the HTML of the page that `write_report` writes."""
    css = resources.files("tokenexit.report").joinpath("report.css").read_text(encoding="utf-8")
    anchors = _anchors([section.title for section in sections])
    links = "".join(f'<a href="#{a}">{escape(section.title)}</a>' for a, section in zip(anchors, sections))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>",
        f'<p class="summary">{_inline(summary)}</p>' if summary else "",
        f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 1 else "",
        "</header>\n<main>",
        *(_section(anchor, section) for anchor, section in zip(anchors, sections)),
        "</main>",
        f"<footer>{_inline(footer)}</footer>" if footer else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(anchor: str, section: Section) -> str:
    blocks = "\n".join(_paragraphs(b) if isinstance(b, str) else b.to_html() for b in section.blocks)
    return f'<section id="{anchor}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{_inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchors(titles: Sequence[str]) -> list[str]:
    """Return one id per title, made of its letters and digits, with a number where two are alike."""
    words = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section" for title in titles]
    return [word if words.count(word) == 1 else f"{word}-{i + 1}" for i, word in enumerate(words)]
