"""Tables for the terminal (rich), Markdown and HTML. Columns say once how their values are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Colour: TypeAlias = tuple[int, int, int]
Format: TypeAlias = str | Callable[[Any], str]
Align: TypeAlias = Literal["left", "center", "right"]

MISSING = "–"
"""The text of None and NaN."""


class Swatch(NamedTuple):
    """A name with its RGB colour (0..255): a legend entry, or the value of a table cell."""

    label: str
    colour: Colour


@dataclass(frozen=True)
class Column:
    """A column: its heading and the format of its values.

    format: a `str.format` text with one field ("{:.1f}", "{:.0%}"), or a function from value to text. Text and
        swatches stay as they are; None and NaN become a dash.
    align: numbers want "right". help: one sentence for readers who do not know the heading.
    """

    name: str
    format: Format = "{}"
    align: Align = "left"
    help: str = ""

    def text(self, value: Any) -> str:
        """Write `value` as every rendering shows it, unescaped."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return MISSING
        if isinstance(value, Swatch):
            return value.label
        if isinstance(value, str):
            return value
        return self.format.format(value) if isinstance(self.format, str) else self.format(value)


@dataclass(frozen=True)
class Table:
    """A table of columns, and rows with one value per column; the first column names its row.

    caption: one line above the table. Raises `ConfigError` for a row of another length.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"row {number} of the table has {len(row)} values for {len(self.columns)} columns: give one each."
                )

    def texts(self) -> list[list[str]]:
        """Return every cell as text, row by row."""
        return [[column.text(value) for column, value in zip(self.columns, row)] for row in self.rows]

    def explained(self) -> list[Column]:
        """Return the columns that have a help sentence."""
        return [column for column in self.columns if column.help]

    def to_rich(self) -> RichTable:
        """Render for a `rich` console; help sentences stand below the table."""
        from rich.markup import escape as plain
        from rich.style import Style
        from rich.table import Table as RichTable
        from rich.text import Text

        notes = "\n".join(f"{column.name}: {column.help}" for column in self.explained())
        table = RichTable(
            title=plain(self.caption) or None,
            caption=plain(notes) or None,
            title_justify="left",
            caption_justify="left",
        )
        for column in self.columns:
            table.add_column(plain(column.name), justify=column.align)
        for row, texts in zip(self.rows, self.texts()):
            cells = []
            for value, text in zip(row, texts):
                block = Text("■ ", Style(color=_hex(value.colour))) if isinstance(value, Swatch) else Text()
                cells.append(block.append(text, Style(color="default")))
            table.add_row(*cells)
        return table

    def __rich__(self) -> RichTable:
        return self.to_rich()

    def to_markdown(self) -> str:
        """Render a GitHub table in padded columns, its caption in bold above, help sentences as a list below."""
        head = [_markdown_cell(column.name) for column in self.columns]
        body = [[_markdown_cell(text) for text in row] for row in self.texts()]
        widths = [max(3, *(len(row[i]) for row in [head, *body])) for i in range(len(self.columns))]
        rules = [_markdown_rule(column.align, width) for column, width in zip(self.columns, widths)]
        lines = [self._markdown_row(head, widths), f"| {' | '.join(rules)} |"]
        lines += [self._markdown_row(row, widths) for row in body]
        if self.caption:
            lines[:0] = [f"**{_markdown_cell(self.caption)}**", ""]
        if self.explained():
            lines += ["", *(f"- **{_markdown_cell(c.name)}**: {_markdown_cell(c.help)}" for c in self.explained())]
        return "\n".join(lines) + "\n"

    def _markdown_row(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        marks = {"left": "<", "center": "^", "right": ">"}
        padded = [f"{text:{marks[c.align]}{width}}" for c, text, width in zip(self.columns, cells, widths)]
        return f"| {' | '.join(padded)} |"

    def to_html(self) -> str:
        """Render a `<table>` in a frame that scrolls sideways if narrow, help sentences in `<details>` below."""
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th scope="col"{_class(column)}>{escape(column.name)}</th>' for column in self.columns)
        body = "\n".join(f"<tr>{self._html_cells(row)}</tr>" for row in self.rows)
        label = escape(self.caption or "table", quote=True)
        # Focusable, so that a keyboard can scroll it, too.
        table = (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{caption}'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        )
        if self.explained():
            terms = "".join(f"<dt>{escape(c.name)}</dt><dd>{escape(c.help)}</dd>" for c in self.explained())
            table += f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>\n"
        return table

    def _html_cells(self, row: Sequence[Any]) -> str:
        cells = []
        for i, (column, value) in enumerate(zip(self.columns, row)):
            mark = swatch_html(value.colour) if isinstance(value, Swatch) else ""
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            cells.append(f"<{tag}{scope}{_class(column)}>{mark}{escape(column.text(value))}</{tag}>")
        return "".join(cells)


def swatch_html(colour: Colour) -> str:
    """Render a small square of one colour; the text beside it says what it stands for."""
    return f'<span class="swatch" style="background:{_hex(colour)}"></span>'


def _class(column: Column) -> str:
    return "" if column.align == "left" else f' class="{column.align}"'


def _hex(colour: Colour) -> str:
    red, green, blue = (int(c) for c in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _markdown_cell(text: str) -> str:
    """Escape a cell for Markdown: on one line, without marks of the end of a cell or of tags."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _markdown_rule(align: Align, width: int) -> str:
    left, right = {"left": ("-", "-"), "center": (":", ":"), "right": ("-", ":")}[align]
    return left + "-" * (width - 2) + right
