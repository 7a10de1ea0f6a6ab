"""Charts as SVG: every value in its bar, and no collapse that flattens the rest."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit.errors import ConfigError
from tokenexit.report import chart
from tokenexit.report.chart import Point, Series, collapse_floor, histogram_svg, line_chart_svg


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_histogram_svg__has_every_value_in_the_bar_that_names_its_range(values):
    svg = ElementTree.fromstring(histogram_svg(values, "x", "y"))
    tips = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    bars = [re.fullmatch(r"(\S+) to (\S+): (\d+)", tip.replace("−", "-")) for tip in tips]
    assert sum(int(bar[3]) for bar in bars) == len(values)
    assert 1 <= len(bars) <= 42
    for value in values:
        slack = 1e-6 * max(1.0, abs(value)) + 1e-3 * (float(bars[0][2]) - float(bars[0][1]))
        assert any(float(bar[1]) - slack <= value <= float(bar[2]) + slack for bar in bars)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_histogram_svg__refuses_what_has_no_place(values):
    with pytest.raises(ConfigError, match="histogram"):
        histogram_svg(values, "x", "y")


SVG = "{http://www.w3.org/2000/svg}"


def heights(text):
    """How far down each marker of the chart stands, by its tooltip."""
    found = {}
    for path in ElementTree.fromstring(text).iter(f"{SVG}path"):
        title = path.find(f"{SVG}title")
        if title is not None:
            found[title.text] = float(path.get("transform").rstrip(")").split()[1])
    return found


def test_line_chart_svg__puts_points_below_the_floor_on_the_edge_with_their_value():
    values = [52.0, 51.0, 50.0, 9.3]
    series = [Series("dtop", [Point(float(n), y) for n, y in enumerate(values)])]
    flat, clipped = (line_chart_svg(series, "x", "y", floor=floor) for floor in (None, 39.0))
    *above, lowest = heights(clipped).values()
    *squeezed, _ = heights(flat).values()
    assert max(above) - min(above) > 10 * (max(squeezed) - min(squeezed))
    assert lowest == 340 - 50
    assert "9.3 below" in clipped
    assert "below" not in "".join(ElementTree.fromstring(flat).itertext())
    assert 'class="tx-marker tx-below"' in clipped


def test_line_chart_svg__draws_whiskers_and_makes_room_for_them():
    series = [Series("dtop", [Point(0.0, 50.0), Point(1.0, 50.5, low=44.0, high=53.0)])]
    text = line_chart_svg(series, "x", "y")
    ((top, bottom),) = [map(float, ends) for ends in re.findall(r'tx-whisker" d="M\S+ (\S+)V(\S+)"', text)]
    assert 14 < min(top, bottom) < max(top, bottom) <= 290


@pytest.mark.parametrize(
    ("values", "floor"), [([40.0, 31.0], None), ([40.0, 29.0], 30.0), ([float("nan"), 40.0], None), ([1.0], None)]
)
def test_collapse_floor__is_three_quarters_of_dense_where_something_lies_below(values, floor):
    assert collapse_floor(values, 40.0) == floor


def test_line_chart_svg__keeps_the_ticks_clear_of_the_label_beside_them() -> None:
    points = [Point(0.6, 39.54), Point(0.9, 39.73)]
    svg = line_chart_svg([Series("a", points)], "GMACs", "mIoU, percent")
    ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end"[^>]*>([^<]+)</text>', svg)
    assert len(ticks) >= 2
    for x, text in ticks:
        assert float(x) - chart._width(text) > 20  # the label stands at 15, turned, half a line wide
