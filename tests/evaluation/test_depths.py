"""Accuracy by depth, read off one dense pass, is that of runs which stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.evaluation.test_evaluate import CLASSES, Images, same_figures
from tests.helpers import random_image, tiny_segmenter
from tokenexit.evaluation.depths import stopped
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense, DToP, Truncated
from tokenexit.report.evaluations import late_blocks_note


@pytest.mark.parametrize("head", ["fcn", "atm", "mask_transformer", "setr_pup"])
@pytest.mark.parametrize("windowed", [False, True])
def test_stopped__is_truncated_at_every_exit_and_dense_at_the_end(head: str, windowed: bool) -> None:
    model = tiny_segmenter(head, num_registers=1)
    if windowed:
        model.preprocessing = replace(model.preprocessing, window=(8, 12), stride=(5, 9))
    images = [random_image(21, 30), random_image(9, 16, seed=1)]
    with torch.no_grad():
        outputs = stopped(model, model.segment(images, with_records=True))
        expected = [model.segment(images, method) for method in (Truncated(1), Truncated(2), Dense())]
    assert len(outputs) == 3
    for output, own in zip(outputs, expected):
        assert output.ledger == own.ledger
        for i in range(2):
            assert torch.equal(output.labels[i], own.labels[i])
            assert torch.equal(output.exit_index[i], own.exit_index[i])
            assert torch.equal(output.logits[i], own.logits[i])


def test_stopped__takes_exit_heads_of_another_resolution_than_the_decode_head() -> None:
    model = tiny_segmenter("linear", "setr_pup")
    with torch.no_grad():
        dense = model([random_image(16, 20)], with_records=True)
        first, _, last = stopped(model, dense)
        alone = tiny_segmenter("linear", "linear")
        alone.backbone.load_state_dict(model.backbone.state_dict())
        alone.exit_heads.load_state_dict(model.exit_heads.state_dict())
        expected = alone([random_image(16, 20)], Truncated(1))
    assert torch.equal(torch.stack(list(first.labels)), torch.stack(list(expected.labels)))
    assert torch.equal(torch.stack(list(last.labels)), torch.stack(list(dense.labels)))


def test_evaluate__adds_a_row_for_every_depth_and_dense_only_where_it_is_missing() -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    dense, dtop, one, two = evaluate(model, Images(), [Dense(), DToP(0.5)], references=["depths"])
    assert [row.label for row in (one, two)] == ["truncated after=1 (block 1)", "truncated after=2 (block 3)"]
    true = evaluate(model, Images(), [Truncated(1), Truncated(2)])
    assert all(same_figures(replace(row, label=own.label), own) for row, own in zip((one, two), true))
    _, *rows, last = evaluate(model, Images(), [dtop.method], references=["depths"])
    assert [row.confusion.tolist() for row in rows] == [row.confusion.tolist() for row in (one, two)]
    assert same_figures(last, dense)


def test_evaluate__runs_the_network_once_more_for_all_depths_and_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    calls: list[bool] = []
    true = model.segment

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options.get("with_records", False))
        return true(*args, **options)

    monkeypatch.setattr(model, "segment", counted)
    evaluate(model, Images(2), [Dense()], references=["oracle", "depths"])
    assert calls.count(True) == 2  # one for each image


def test_late_blocks_note__says_so_where_an_exit_is_as_good_as_the_end() -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    results = evaluate(model, Images(), [Dense()], references=["depths"])
    miou = {row.method: row.scores.miou for row in results}

    def note(first: float, second: float, dense: float) -> str | None:
        wanted = {Truncated(1): first, Truncated(2): second, Dense(): dense}
        rows = [replace(row, scores=replace(row.scores, miou=wanted[row.method])) for row in results]
        return late_blocks_note(model, rows)

    assert len(miou) == 3
    assert note(20.0, 30.0, 40.0) is None
    assert note(20.0, 41.5, 40.0) == (
        "Block 4 does not help this model yet (mIoU 41.50 after block 3, 40.00 after all 4, on 3 images): train "
        "longer, or use `--method truncated --after 2`."
    )
    assert note(42.0, 42.0, 40.0) == (
        "Blocks 2 to 4 do not help this model yet (mIoU 42.00 after block 1, 40.00 after all 4, on 3 images): train "
        "longer, or use `--method truncated --after 1`."
    )
    assert late_blocks_note(model, results[1:]) is None


def test_late_blocks_note__offers_no_method_that_the_model_cannot_run() -> None:
    model = tiny_segmenter("linear", "setr_pup")
    results = evaluate(model, Images(), [Dense()], references=["depths"])
    rows = [replace(row, scores=replace(row.scores, miou=50.0)) for row in results]
    said = late_blocks_note(model, rows)
    assert said is not None
    assert said.endswith("on 3 images): train longer.")
