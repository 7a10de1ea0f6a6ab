"""Histograms as SVG: every value in its bar."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit.errors import ConfigError
from tokenexit.report.chart import histogram_svg


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
