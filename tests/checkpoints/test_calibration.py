"""The file of a calibration as a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny_segmenter
from tokenexit import ExitSegmenter
from tokenexit.checkpoints.calibration import Calibration, read_calibration
from tokenexit.errors import CheckpointError, ConfigError

FIRST_RELEASE: dict[str, Any] = {
    "format": 1,
    "asked": {"budget": 0.6, "path_keeps_agreement_over": "classes", "cap": None, "precision": "fp32"},
    "promise": "The mean over these 6 images is 0.59 of dense multiply-adds.",
    "method": {"name": "dtop", "threshold": [0.98, 0.9]},
    "reached": {"share_of_dense": 0.59, "live_after_exit": [0.7, 0.4], "pixels_unlike_dense": 0.01},
    "images": {"data": "scenes", "count": 6},
    "made": "2026-11-20T10:00:00+00:00",
    "made_with": {"tokenexit": "0.1.0", "torch": "2.9.0", "machine": "x86_64"},
    "model": "v2:0123456789abcdef",
    "scores": {"limit": 0.2, "images": [6, 6]},
}
"""As the first release wrote it, its scores shortened."""


def test_from_dict__reads_what_the_first_release_wrote() -> None:
    found = Calibration.from_dict(FIRST_RELEASE)
    assert found.asked["budget"] == 0.6
    assert found.guarantee == FIRST_RELEASE["promise"]
    assert (found.method_name, found.mac_ratio, found.live_after_exit) == ("dtop", 0.59, (0.7, 0.4))
    assert found.live_quantiles is None
    assert json.dumps(found.to_dict()) == json.dumps(FIRST_RELEASE)


def test_live_quantiles__are_those_of_the_file() -> None:
    content = {**FIRST_RELEASE, "reached": {"live_after_exit_quantiles": [[0.5, 0.7, 0.9], [0.1, 0.4, 0.6]]}}
    assert Calibration.from_dict(content).live_quantiles == ((0.5, 0.7, 0.9), (0.1, 0.4, 0.6))
    content["reached"] = {"live_after_exit_quantiles": [[0.5, 1.7]]}
    with pytest.raises(ConfigError, match="live_after_exit_quantiles"):
        Calibration.from_dict(content)


def test_save__keeps_entries_of_a_calibration_that_this_version_does_not_know(tmp_path: Path) -> None:
    tiny_segmenter().save_pretrained(tmp_path / "model")
    content = {**FIRST_RELEASE, "note": {"by": ["somebody", 3.5, None]}, "reached": {"share_of_dense": 0.5, "x": {}}}
    text = json.dumps(content, indent=2) + "\n"
    (tmp_path / "model" / "calibration.json").write_text(text)
    ExitSegmenter.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "calibration.json").read_text() == text


def test_mac_ratio_and_live_tokens__are_unknown_where_the_file_does_not_say_so() -> None:
    empty = Calibration.from_dict({})
    assert (empty.method_name, empty.mac_ratio, empty.live_after_exit, empty.scores) == (None, None, None, None)
    assert Calibration(method="dovit").method_name == "dovit"
    assert Calibration(method={"name": ["dtop"]}).method_name is None


@pytest.mark.parametrize("value", [2, "1", None])
def test_read__a_calibration_of_another_format_is_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**FIRST_RELEASE, "format": value}))
    with pytest.raises(CheckpointError, match=r"has format .*, this version reads 1: update tokenexit\.$"):
        read_calibration(path)


def test_card__says_a_method_that_is_named_without_options(tmp_path: Path) -> None:
    model = tiny_segmenter()
    model.calibration = Calibration(model=model.fingerprint(), method="dtop")
    model.save_pretrained(tmp_path, card=True)
    assert "Chosen: name dtop." in (tmp_path / "README.md").read_text()
