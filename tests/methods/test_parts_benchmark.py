"""The benchmark of a pass's parts finds every part in the code as it stands."""

from __future__ import annotations

import pytest
from benchmarks.parts import PARTS, parts_ms, threshold_for

from tests.helpers import random_image, tiny_segmenter
from tokenexit.methods import Dense, DToP


def test_parts__are_all_found_and_add_up_to_the_whole() -> None:
    model, image = tiny_segmenter("fcn", exits=(1,), depth=2), random_image(24, 32)
    method = DToP(threshold_for(model, image, 0.5), keep_per_class=0)
    dynamic, dense = (parts_ms(model, image, one, "fp32") for one in (method, Dense()))
    assert all(dynamic[part] > 0 for part in PARTS)
    assert {part for part in PARTS if dense[part] == 0} == {"exit head", "rule", "compaction", "canvas"}
    for found in (dynamic, dense):
        assert sum(found[part] for part in (*PARTS, "rest")) == pytest.approx(found["all"])
