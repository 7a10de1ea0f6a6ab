"""The network that chooses windows of patches: its labels, its fit, and supertokens that follow it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import assert_close, gently_varied, random_image, tiny_segmenter
from tests.methods.test_behaviours import counted_macs
from tokenexit.data.base import Sample
from tokenexit.engine.window_policy import WindowPolicy, policy_ops
from tokenexit.errors import ConfigError
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.methods import Dense, DToP, Reduced
from tokenexit.reducers import Supertokens
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.window_policy import fit_window_policy, judge_window_policy, window_labels

VOID = 255


@dataclass(frozen=True)
class Checks:
    """Flat images with squares of noise, which hold two classes: what can be told at a glance."""

    count: int = 8
    labels: Labels = field(default_factory=lambda: default_labels(5))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng(index)
        noisy = rng.random((4, 5)) < 0.4  # of windows of 2 x 2 patches, 8 pixels a side
        where = noisy.repeat(8, 0).repeat(8, 1)
        image = np.where(where[..., None], rng.integers(0, 2, (32, 40, 3)) * 255, 128).astype(np.uint8)
        mask = np.where(where, rng.integers(0, 2, (32, 40)), 2).astype(np.int64)
        return Sample(Image.fromarray(image), mask, f"checks-{index}")


def with_net(sides: tuple[int, ...] = (2, 4), seed: int = 0, **model: Any) -> ExitSegmenter:
    """A model whose network has drawn weights that answer about one half yes."""
    torch.manual_seed(seed)
    patch_size = model.get("patch_size", 4)
    policy = WindowPolicy(patch_size, sides)
    with torch.no_grad():
        said = policy(gently_varied(8 * patch_size, 10 * patch_size)[None], sides[-1])
        for answer, logits in zip(policy.answer, said.values()):
            answer.bias.sub_(logits.median())
    return tiny_segmenter("fcn", **{"depth": 4} | model).with_window_policy(policy)


def labels_by_loops(mask: np.ndarray, pixels: int) -> tuple[list[bool], list[bool]]:
    """The rule in words, window by window: sets of labels."""
    rows, columns = mask.shape[0] // pixels, mask.shape[1] // pixels
    one_class, counted = [], []
    for i in range(rows):
        for j in range(columns):
            held = {int(v) for v in mask[i * pixels : (i + 1) * pixels, j * pixels : (j + 1) * pixels].flat}
            edge = i in (0, rows - 1) or j in (0, columns - 1)
            one_class.append(len(held) == 1)
            counted.append(not (edge and VOID in held and len(held) == 2))
    return one_class, counted


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 11), columns=st.integers(1, 11), pixels=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_window_labels__equal_sets_of_labels_window_by_window(rows: int, columns: int, pixels: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice([0, 1, VOID], (rows, columns), p=[0.7, 0.1, 0.2]).astype(np.int64)
    one_class, counted = window_labels(torch.from_numpy(mask), pixels, VOID)
    assert (one_class.tolist(), counted.tolist()) == labels_by_loops(mask, pixels)


def test_fit__learns_windows_that_can_be_told_at_a_glance() -> None:
    model, data = tiny_segmenter("fcn", depth=1, exits=()), Checks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit_window_policy(model, data, sides=(2,), steps=60, batch=4, learning_rate=1e-2)
    (figures,) = judge_window_policy(fitted, Checks(12))
    assert figures.windows == 12 * 20
    assert 0.5 < figures.one_class < 0.7
    assert figures.shared > 0.8 * figures.one_class
    assert figures.right > 0.98
    (drawn,) = judge_window_policy(fit_window_policy(model, data, sides=(2,), steps=1, batch=1), Checks(12))
    assert drawn.shared == 0.0  # which is what it learned from
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.backbone.window_policy is None
    again = fit_window_policy(model, data, sides=(2,), steps=60, batch=4, learning_rate=1e-2)
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_supertokens__share_where_the_network_says_so() -> None:
    model, images = with_net(), [gently_varied(32, 40), random_image(24, 16), gently_varied(13, 22)]
    policy = model.backbone.window_policy
    assert policy is not None
    with torch.no_grad():
        tokens = Supertokens(0.5, (2, 4), "net").embed(images, model.backbone)
        covers = tokens.cover.split([h * w for h, w in tokens.grids])  # type: ignore[union-attr]
        first, shared = 0, 0
        for image, cover, (h, w) in zip(images, covers, tokens.grids):
            padded = torch.zeros(3, h * 4, w * 4)
            padded[:, : image.shape[1], : image.shape[2]] = image
            said = policy(padded[None], 4)
            expected = [[i * w + j for j in range(w)] for i in range(h)]
            for side in (2, 4):  # the largest last, which covers smaller ones
                if side not in said:
                    continue
                across = w // side
                for n, logit in enumerate(said[side][0].tolist()):
                    top, left = n // across * side, n % across * side
                    if logit >= 0:
                        shared += 1
                        for i in range(side):
                            for j in range(side):
                                expected[top + i][left + j] = top * w + left
            assert (cover - first).view(h, w).tolist() == expected
            first += h * w
    assert 3 < shared < 25


@pytest.mark.parametrize("method", [Dense(), DToP(0.6)], ids=["dense", "dtop"])
def test_net__of_a_batch_is_that_of_one_and_never_firing_changes_no_bit(method: Any) -> None:
    model = with_net()
    images = [gently_varied(32, 40), gently_varied(32, 40, 3), random_image(16, 20), gently_varied(13, 22), image_of(4)]
    never, often = (Reduced(method, Supertokens(t, (2, 4), "net")) for t in (2.0, 0.5))
    with torch.no_grad():
        alone, beside, together = (model(images, each) for each in (method, never, often))
        for a, b in zip(alone, beside):
            assert torch.equal(a.grid_logits[0], b.grid_logits[0])
        for one, image in zip(together, images):
            single = model([image], often)
            assert torch.equal(one.exit_index[0], single.exit_index[0])
            assert one.ledger == single.ledger
            assert_close(one.grid_logits[0], single.grid_logits[0])
    assert together.ledger.live[0][0] < 80


def image_of(side: int) -> torch.Tensor:
    """An image without a whole window."""
    return random_image(side, side)


@pytest.mark.parametrize("patch_size", [1, 4, 7, 14, 16])
@pytest.mark.parametrize("sides", [(2,), (2, 4), (3, 6)])
def test_net__is_counted_in_the_ledger(patch_size: int, sides: tuple[int, ...]) -> None:
    model = with_net(sides, patch_size=patch_size, embed_dim=8, num_heads=1).requires_grad_(False)
    image, by = gently_varied(patch_size * 7 - patch_size // 2, patch_size * 9), Supertokens(0.5, sides, "net")
    counted, ledger = counted_macs(model, image, Reduced(Dense(), by))
    assert ledger.macs == (counted,)
    assert ledger.parts[0].reduction > policy_ops((7, 9), patch_size, sides, sides[-1]).macs > 0


def test_net__is_saved_with_the_model_and_makes_it_another(tmp_path: Path) -> None:
    model, by = with_net(), Reduced(DToP(0.6), Supertokens(0.5, (4,), "net"))
    model.save_pretrained(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path)
    image = gently_varied(32, 40)
    with torch.no_grad():
        assert torch.equal(again([image], by).grid_logits[0], model([image], by).grid_logits[0])
    assert again.config == model.config
    assert again.config.backbone.window_policy == (2, 4)
    assert again.fingerprint() == model.fingerprint() != with_net(seed=1).fingerprint()
    assert "window_policy" not in tiny_segmenter("fcn").config.backbone.to_dict()
    assert not any(p.requires_grad for n, p in again.named_parameters() if "window_policy" in n)


def test_net__refuses_in_one_sentence() -> None:
    bare, model, data = tiny_segmenter("fcn"), with_net((2,)), Checks(2)
    with pytest.raises(ConfigError, match="a network that this model lacks: fit one with `tokenexit policy`"):
        bare.check(Reduced(Dense(), Supertokens(0.5, (2,), "net")))
    with pytest.raises(ConfigError, match=r"sizes must be some of \(2,\).* got \(2, 4\)"):
        model.check(Reduced(Dense(), Supertokens(0.5, (2, 4), "net")))
    with pytest.raises(ConfigError, match="sides must be sides of windows that nest"):
        fit_window_policy(bare, data, sides=(2, 3))
    with pytest.raises(ConfigError, match="steps, batch and learning_rate"):
        fit_window_policy(bare, data, steps=0)
    with pytest.raises(ConfigError, match="no image holds a window of 32 x 32 patches"):
        fit_window_policy(bare, data, sides=(32,), steps=1)
    with pytest.raises(ConfigError, match="window_policy must be sides of windows that nest"):
        replace(bare.config.backbone, window_policy=(3, 2))
