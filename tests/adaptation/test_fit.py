"""Heads fitted to soft answers on kept features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenexit.adaptation import fit as module
from tokenexit.adaptation.features import Features
from tokenexit.adaptation.fit import agreement, class_weights, fit_head, soft_cross_entropy

CHANNELS, CLASSES = 32, 4


def kept(folder: Path, x: Tensor, answers: Tensor, held_out: int) -> Features:
    folder.mkdir(exist_ok=True)
    x.half().numpy().tofile(folder / "block001.f16")
    answers.half().numpy().tofile(folder / "answers.f16")
    return Features(folder, (1,), len(x), CHANNELS, answers.shape[1], held_out)


def taught(folder: Path, tokens: int = 4000, rare: float = 0.0) -> Features:
    """Features of a linear teacher. rare: taken from the logit of the last class."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, CHANNELS, generator=rng)
    logits = x @ torch.randn(CHANNELS, CLASSES, generator=rng) * 0.7
    logits[:, -1] -= rare
    return kept(folder, x, logits.softmax(1), tokens // 5)


@pytest.mark.parametrize("head", ["linear", "dinov2_linear", {"kind": "fcn", "channels": 16}])
def test_fit__recovers_a_linear_teacher(head: str, tmp_path: Path) -> None:
    found = fit_head(taught(tmp_path), 1, head)
    assert found.agreement > 0.97
    assert not found.head.training
    assert 1 < found.passes <= module.MOST_PASSES


def test_fit__is_the_same_under_a_seed_and_leaves_the_global_one(tmp_path: Path) -> None:
    features = taught(tmp_path, 1000)
    before = torch.get_rng_state()
    first, second = (fit_head(features, 1, "linear", seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    third = fit_head(features, 1, "linear", seed=3)
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, second.head.state_dict()[name])
        assert torch.equal(value, third.head.state_dict()[name])
    other = fit_head(features, 1, "linear", seed=4)
    assert not torch.equal(other.head.classifier.weight, first.head.classifier.weight)  # type: ignore[union-attr,arg-type]


def test_fit__starts_from_a_head_that_it_leaves_as_it_was(tmp_path: Path) -> None:
    features = taught(tmp_path, 2000)
    start = fit_head(features, 1, "linear").head
    before = {name: value.clone() for name, value in start.state_dict().items()}
    found = fit_head(features, 1, "linear", start=start)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert found.passes < fit_head(features, 1, "linear").passes


def test_fit__ends_early_where_there_is_nothing_to_learn(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(3000, CHANNELS, generator=rng)
    noise = (4 * torch.randn(3000, CLASSES, generator=rng)).softmax(1)
    losses: list[float] = []
    found = fit_head(kept(tmp_path, x, noise, 600), 1, "linear", passed=lambda number, loss: losses.append(loss))
    assert len(losses) == found.passes < module.MOST_PASSES / 2
    assert found.loss <= min(losses)  # the best head is kept, not the last one


def test_fit__on_one_photo_alone_returns_a_head(tmp_path: Path) -> None:
    features = taught(tmp_path, 100)
    found = fit_head(Features(tmp_path, (1,), 100, CHANNELS, CLASSES, 100), 1, "linear")
    assert 0.0 <= found.agreement <= 1.0
    assert features.tokens == 100


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_class_weights__average_one_over_tokens(balance: float, tmp_path: Path) -> None:
    features = taught(tmp_path, 2000, rare=6.0)
    weight = class_weights(features, balance)
    label = torch.from_numpy(np.array(features.answers())).float().argmax(1)
    assert weight[label].mean().item() == pytest.approx(1.0, abs=1e-5)
    counts = torch.bincount(label, minlength=CLASSES)
    if balance == 0.0:
        assert torch.allclose(weight, torch.ones(CLASSES))
    else:
        assert weight[counts.argmin()] == weight.max() > 1.0
    if balance == 1.0:
        assert (weight * counts)[counts > 0].std() < 1e-3 * counts.sum()


def test_class_weights__of_a_class_that_no_token_has_is_none(tmp_path: Path) -> None:
    answers = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]).repeat(50, 1)
    weight = class_weights(kept(tmp_path, torch.zeros(100, CHANNELS), answers, 10), 0.5)
    assert weight.tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_class_balance__lifts_a_rare_class(tmp_path: Path) -> None:
    """Where features say little, weights decide whether a rare class is ever named."""
    rng = torch.Generator().manual_seed(5)
    label = (torch.rand(8000, generator=rng) < 0.06).long()
    x = torch.randn(8000, CHANNELS, generator=rng)
    x[:, 0] += 2.0 * label
    answers = torch.nn.functional.one_hot(label, 2).float()
    features = kept(tmp_path, x, answers, 2000)
    plain, balanced = (fit_head(features, 1, "linear", class_balance=balance) for balance in (0.0, 0.5))
    assert balanced.mean_agreement > plain.mean_agreement + 0.05
    assert balanced.agreement > plain.agreement - 0.1


def test_soft_cross_entropy__is_that_of_the_classes_where_answers_are_sure() -> None:
    logits, label = torch.randn(9, CLASSES), torch.randint(0, CLASSES, (9,))
    weight = torch.rand(CLASSES)
    own = soft_cross_entropy(logits, torch.nn.functional.one_hot(label, CLASSES).float(), weight)
    each = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert own.item() == pytest.approx((each * weight[label]).mean().item(), rel=1e-5)


def test_agreement__is_over_tokens_and_over_classes() -> None:
    said, wanted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 2])
    assert agreement(said, wanted, 4) == (0.75, 0.5)
