"""Expected multiply-adds in the loss: what tokens would pay if each stayed with a probability, learned from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import random_image, tiny_segmenter
from tests.training.tiny import tiny_run, write_dataset
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Gated, Method, Reduced
from tokenexit.reducers import ALGM
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.expected_macs import check_macs_weight, expected_share
from tokenexit.training.loop import train

IMAGES = [random_image(16, 20, seed) for seed in (1, 2)]


def share_of(model: ExitSegmenter, method: Method[Any]) -> torch.Tensor:
    return expected_share(model(IMAGES, method, with_records=True), method, model)


@pytest.mark.parametrize("method", [DToP((0.3, 0.25), 1), DoViT((0.3, 0.25), min_improvement=None)], ids=repr)
def test_expected_share__equals_an_oracle_that_goes_token_by_token(method: DToP | DoViT) -> None:
    model = tiny_segmenter("fcn")
    output = model(IMAGES, method, with_records=True)
    first, second, depth = *model.config.exits, len(model.backbone.blocks)
    total, cells, row = 0.0, 0, 0
    for i, index in enumerate(output.exit_index):
        for left in index.flatten().tolist():
            cells += 1
            for n, blocks in enumerate((second - first, depth - second)):
                logits = output.exit_records[n].logits
                assert logits is not None
                assert isinstance(method.threshold, tuple)
                score = logits[row].double().softmax(0).max().item()
                if left >= n:
                    total += blocks / depth / (1 + math.exp(-(method.threshold[n] - score) / 0.05))
            row += 1
        assert index.shape == output.grid(i)
    found = share_of(model, method).item()
    assert found == pytest.approx(total / cells, rel=1e-4)


@pytest.mark.parametrize("head", ["fcn", "atm", "setr_pup"])
@pytest.mark.parametrize(
    "inside", [lambda m: m, lambda m: Reduced(m, ALGM(0.9, local_block=2, global_block=None))], ids=["alone", "reduced"]
)
def test_expected_share__teaches_exit_heads_to_be_sure(head: str, inside: Any) -> None:
    method = inside(DoViT(0.6, min_improvement=None) if head == "setr_pup" else DToP(0.6))
    model = tiny_segmenter(head).train()
    before = share_of(model, method)
    before.backward()
    heads = [p for exit_head in model.exit_heads for p in exit_head.parameters() if p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in heads)  # type: ignore[union-attr]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-2 * p.grad / (p.grad.norm() + 1e-12))
    assert 0 < share_of(model, method).item() < before.item() < 1


def test_expected_share__is_nothing_where_no_token_chooses() -> None:
    assert share_of(tiny_segmenter(), Dense()).item() == 0.0


def test_macs_weight__needs_a_method_with_thresholds() -> None:
    check_macs_weight(0.0, [Dense()])
    check_macs_weight(0.3, [Dense(), Gated(DToP())])
    with pytest.raises(ConfigError, match=r"macs_weight must be 0 for methods without thresholds, got 0\.3 for dense"):
        check_macs_weight(0.3, [Dense()])


def test_macs_weight__changes_what_is_learned(tmp_path: Path) -> None:
    data, methods = write_dataset(tmp_path / "data"), [{"name": "dtop", "threshold": 0.36}]

    def trained(name: str, weight: float) -> torch.Tensor:
        config = tiny_run(data, tmp_path / name, methods=methods, macs_weight=weight)
        return train(config, say=lambda _: None, progress=False).exit_heads[0].state_dict()["classifier.weight"]

    plain = trained("plain", 0.0)
    assert torch.equal(plain, trained("again", 0.0))
    assert not torch.equal(plain, trained("weighed", 1.0))


def test_macs_weight__is_refused_before_a_step_of_methods_without_thresholds(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match="macs_weight must be 0 for methods without thresholds"):
        train(tiny_run(data, tmp_path / "run", methods=["dense"], macs_weight=0.3), say=lambda _: None, progress=False)
