"""The report is one file that needs nothing else, says what it was given, and appears whole or not at all."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenexit.errors import ConfigError
from tokenexit.report.chart import Point, Series, line_chart_svg, nice_ticks
from tokenexit.report.html import (
    Chart,
    Code,
    Facts,
    Figure,
    FigureRow,
    Legend,
    Section,
    report_html,
    write_report,
)
from tokenexit.report.tables import Column, Swatch, Table

VOID_TAGS = {"meta", "img"}


class Page(HTMLParser):
    """Elements in order, text by element, and a check that every element is closed where it should be."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.text, self.sections = [], [], {}, []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def picture(flat=False):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels // 255 * 255 if flat else pixels)


CHART = line_chart_svg(
    [
        Series("Dense", [Point(18.2, 61.2, "dense")]),
        Series("DToP", [Point(8.1, 57.9, "0.85"), Point(9.6, 59.6, "0.90"), Point(14.0, 61.1, "0.98")]),
    ],
    "GMACs",
    "mIoU",
)


def sections(text="some words"):
    return [
        Section(
            text,
            [
                f"{text}\n\nA second paragraph.",
                Facts([(text, text)]),
                Table([Column(text), Column("n", "{:.1f}", "right")], [[text, 1.0]], caption=text),
                Chart(CHART, text),
            ],
        ),
        Section(
            "Pictures",
            [
                Legend(text, [Swatch(text, (1, 2, 3))]),
                FigureRow([Figure(picture(), text), Figure(picture(flat=True), "Exits", note=text)], title=text),
                Code(text),
            ],
        ),
    ]


# --------------------------------------------------------------------------------------------------- the page


def test_report__loads_nothing_from_outside_and_runs_nothing():
    page = report_html("Report", sections(), summary="In short.", footer="The end.")
    parsed = Page(page)
    addresses = [value for _, attrs in parsed.elements for key, value in attrs.items() if key in ("src", "href")]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert not any(key.startswith("on") for _, attrs in parsed.elements for key in attrs)


def test_report__has_one_title_a_heading_per_section_and_words_for_every_image():
    parsed = Page(report_html("Report", sections(), summary="In short."))
    assert parsed.text["h1"] == ["Report"]
    assert parsed.text["h2"] == ["some words", "Pictures"]
    images = parsed.all("img")
    assert [image["alt"] for image in images] == ["some words: some words", "some words: Exits"]
    assert all((image["width"], image["height"]) == ("32", "24") for image in images)
    assert len(parsed.all("figcaption")) == 3
    assert all(svg["aria-label"] for svg in parsed.all("svg"))
    ids = {attrs["id"] for attrs in parsed.all("section")}
    assert {link["href"].removeprefix("#") for link in parsed.all("a")} == ids
    assert "prefers-color-scheme: dark" in "".join(parsed.text["style"])


@given(st.text(alphabet="ab<>&\"'/= \n", min_size=1).filter(str.strip))
@settings(max_examples=30)
def test_any_text__stays_text_wherever_it_stands(text):
    parsed = Page(report_html(text, sections(text), summary=text, footer=text))
    plain = Page(report_html("a", sections("a"), summary="a", footer="a"))
    count = [
        sum(tag == one for tag, _ in page.elements) for one in ("img", "dt", "li", "td") for page in (parsed, plain)
    ]
    assert count[::2] == count[1::2]
    assert {tag for tag, _ in parsed.elements} == {tag for tag, _ in plain.elements}
    assert {key for _, attrs in parsed.elements for key in attrs} == {
        key for _, attrs in plain.elements for key in attrs
    }
    assert parsed.text["h1"] == [text]
    assert parsed.text["dd"] == [text]


def test_text__is_parted_at_empty_lines_and_shows_backticks_as_code():
    parsed = Page(report_html("r", [Section("s", ["one `a<b` two\nstill\n \n\nthree"])]))
    assert parsed.text["p"] == ["one ", " two\nstill", "three"]
    assert parsed.text["code"] == ["a<b"]


def test_sections_of_equal_titles__get_anchors_of_their_own():
    parsed = Page(report_html("r", [Section("Bild & Ton", []), Section("bild, ton", []), Section("***", [])]))
    assert [attrs["id"] for attrs in parsed.all("section")] == ["bild-ton-1", "bild-ton-2", "section"]


# ----------------------------------------------------------------------------------------------------- writing


def test_write_report__makes_folders_replaces_an_older_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "report.html"
    write_report(path, "first", [])
    assert write_report(str(path), "second – ü", sections()) == path
    assert "<h1>second – ü</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_write_report__that_fails_keeps_the_older_file_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, "first", [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match=r"report\.html' cannot be written \(No space left on device\)"):
        write_report(path, "second", [])
    assert "first" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_report__to_a_place_that_cannot_hold_it_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another path"):
        write_report(tmp_path / "file" / "report.html", "r", [])
    with pytest.raises(ConfigError, match="choose another path"):
        write_report(tmp_path, "r", [])


# ------------------------------------------------------------------------------------------------------- chart


def markers(svg):
    """Centres of the markers that carry a tooltip, with its text."""
    found = []
    for path in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        title = path.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            found.append((*map(float, re.findall(r"-?[\d.]+", path.get("transform"))), title.text))
    return found


def test_chart__places_points_on_one_linear_scale_with_y_upwards():
    data = [(8.1, 57.9), (9.6, 59.6), (14.0, 61.1)]
    xs, ys, _ = zip(*markers(CHART)[1:])
    for drawn, axis, sign in ((xs, 0, 1), (ys, 1, -1)):
        scale = [(drawn[i + 1] - drawn[i]) / (data[i + 1][axis] - data[i][axis]) for i in range(2)]
        assert scale[0] == pytest.approx(scale[1], abs=0.2)
        assert scale[0] * sign > 0


def test_chart__tells_series_apart_by_shape_and_names_all_values_in_tooltips():
    root = ET.fromstring(CHART)
    shapes = {
        path.get("d") for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "tx-marker"
    }
    assert len(shapes) == 2
    assert markers(CHART)[1][2] == "DToP 0.85: GMACs 8.1, mIoU 57.9"
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Dense", "DToP", "GMACs", "mIoU", "0.85", "0.90", "0.98", "dense"} <= set(texts)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.text("ab<&\"'", max_size=9)), min_size=1, max_size=12
    )
)
@settings(max_examples=40)
def test_chart__of_any_points_is_well_formed_and_inside_its_frame(points):
    svg = line_chart_svg([Series("<&>", [Point(*p) for p in points])], "x<", 'y"', width=480, height=340)
    drawn = markers(svg)
    assert len(drawn) == len(points)
    assert all(0 < x < 480 and 0 < y < 340 for x, y, _ in drawn)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
@example(0.0, 5e-324)
@example(0.0, 1e-11)
def test_nice_ticks__are_few_round_and_enclose_the_data(low, span):
    high = low + span
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-5 * step
    assert ticks[-1] >= high - 1e-5 * step
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize("series", [[], [Series("a", [])], [Series("a", [Point(float("nan"), 1.0)])]])
def test_chart__without_finite_points_is_refused(series):
    with pytest.raises(ConfigError, match="finite"):
        line_chart_svg(series, "x", "y")
