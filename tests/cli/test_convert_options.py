"""`convert --backbone-options`: what weights do not say is said on the command line."""

from __future__ import annotations

import pytest

from tests.conversion.test_convert import save
from tests.conversion.test_eva import EVA02, lively, theirs
from tokenexit.cli import main


def test_backbone_options__take_the_place_of_what_is_assumed(tmp_path, capsys):
    model, target = lively(EVA02), tmp_path / "ours.safetensors"
    source = save(theirs(model, False), tmp_path)
    given = ["rope_reference=7", "rope_periods=bf16", "pos_embed_grid=[2, 8]"]
    assert main(["convert", str(source), str(target), "--backbone-options", *given]) == 0
    assumed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("assumed"))
    assert "rope=interleaved" in assumed
    assert "rope_reference" not in assumed
    assert target.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("rope=quarter", "rope must be"),
        ("rope_reference=much", "rope_reference must be"),
        ("pos_embed_grid=3", "pos_embed_grid must be"),
        ("colour=3", "a backbone has no option 'colour': see ViTConfig."),
        ("rope", "--backbone-options rope does not fit: write NAME=VALUE"),
    ],
)
def test_backbone_options__that_do_not_fit_are_refused_in_one_sentence(option, message, tmp_path, capsys):
    source = save(theirs(lively(EVA02), False), tmp_path)
    assert main(["convert", str(source), str(tmp_path / "ours.safetensors"), "--backbone-options", option]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours.safetensors").exists()
