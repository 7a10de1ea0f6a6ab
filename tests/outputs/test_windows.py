"""Sliding windows against a loop that runs one window at a time and adds its maps up in numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.methods.base import packs
from tokenexit.methods.reference import PrescribedExits, agreement_exits
from tokenexit.outputs import segmentation as output_module
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.outputs.windows import WindowedOutput, dense_macs, segment_windows, window_boxes
from tokenexit.segmenter import ExitSegmenter

Size = tuple[int, int]

sides = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def windows_and_strides(draw: st.DrawFn) -> tuple[Size, Size]:
    window = draw(sides)
    return window, (draw(st.integers(1, window[0])), draw(st.integers(1, window[1])))


# ------------------------------------------------------------------------------------------------ where windows lie


def mmsegmentation_boxes(size: Size, window: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """The slide mode in its own words: a grid of so many rows and columns, cut at the border, moved back."""
    counts = [max(size[i] - window[i] + stride[i] - 1, 0) // stride[i] + 1 for i in range(2)]
    boxes = []
    for row in range(counts[0]):
        for column in range(counts[1]):
            y2 = min(row * stride[0] + window[0], size[0])
            x2 = min(column * stride[1] + window[1], size[1])
            boxes.append((max(y2 - window[0], 0), max(x2 - window[1], 0), y2, x2))
    return boxes


@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), grid=windows_and_strides())
def test_window_boxes__cover_every_pixel_with_windows_of_one_size(size: Size, grid: tuple[Size, Size]) -> None:
    window, stride = grid
    boxes = window_boxes(size, window, stride)
    assert list(boxes) == mmsegmentation_boxes(size, window, stride)
    seen = np.zeros(size, int)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(window[0], size[0]), min(window[1], size[1]))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert len(set(boxes)) == len(boxes)


def published_starts(side: int, window: int) -> list[int]:
    """EoMT's evaluation in its own words: as few windows as cover the side, and the overlap shared among them."""
    count = math.ceil(Fraction(side, window))
    if count == 1:
        return [0]
    overlap = Fraction(count * window - side, count - 1)
    return [int(n * (window - overlap)) for n in range(count)]


@given(side=st.integers(1, 3000), window=st.sampled_from([8, 16, 512, 640]))
def test_window_boxes__evenly_spread_ones_are_the_published_ones(side: int, window: int) -> None:
    """The shorter side is the window's, as images are resized to cover it; the longer one has as many as it needs."""
    boxes = window_boxes((window, side), (window, window), "even")
    wanted = [(0, start, window, min(start + window, side)) for start in published_starts(side, window)]
    assert list(boxes) == wanted
    turned = window_boxes((side, window), (window, window), "even")
    assert list(turned) == [(left, top, right, bottom) for top, left, bottom, right in wanted]


@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), window=sides)
def test_window_boxes__evenly_spread_ones_cover_every_pixel_with_windows_of_one_size(size: Size, window: Size) -> None:
    boxes = window_boxes(size, window, "even")
    assert len(boxes) == math.ceil(size[0] / window[0]) * math.ceil(size[1] / window[1]), "no more than it takes"
    seen = np.zeros(size, int)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(window[0], size[0]), min(window[1], size[1]))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1


@torch.inference_mode()
def test_segment__sums_evenly_spread_windows() -> None:
    model, image = tiny_segmenter("fcn"), random_image(12, 33)
    model.preprocessing = replace(model.preprocessing, window=(12, 12), stride="even")
    out = model.segment([image], Dense())
    total, seen = torch.zeros(model.config.num_classes, 12, 33), torch.zeros(33)
    for start in (0, 10, 21):
        total[:, :, start : start + 12] += model([image[:, :, start : start + 12]], Dense()).logits[0]
        seen[start : start + 12] += 1
    assert_close(out.logits[0], total / seen)


@pytest.mark.parametrize(
    ("size", "window", "stride", "boxes"),
    [
        ((512, 683), (512, 512), (341, 341), [(0, 0, 512, 512), (0, 171, 512, 683)]),
        ((512, 512), (512, 512), (341, 341), [(0, 0, 512, 512)]),
        ((300, 600), (512, 512), (341, 341), [(0, 0, 300, 512), (0, 88, 300, 600)]),
        ((4, 5), (2, 3), (2, 3), [(0, 0, 2, 3), (0, 2, 2, 5), (2, 0, 4, 3), (2, 2, 4, 5)]),
        ((7, 9), None, None, [(0, 0, 7, 9)]),
    ],
)
def test_window_boxes__are_those_worked_out_by_hand(
    size: Size, window: Size | None, stride: Size | None, boxes: list[tuple[int, int, int, int]]
) -> None:
    assert list(window_boxes(size, window, stride)) == boxes


def test_window_boxes__of_cityscapes_and_ade20k_are_as_many_as_published_settings_give() -> None:
    assert len(window_boxes((1024, 2048), (768, 768), (512, 512))) == 2 * 4
    assert len(window_boxes((512, 2048), (512, 512), (341, 341))) == 6


@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(1, 120))
def test_packs__are_as_large_as_the_budget_allows_and_hold_every_window_once_in_order(
    tokens: list[int], budget: int
) -> None:
    found = packs(tokens, budget)
    assert [n for pack in found for n in pack] == list(range(len(tokens)))
    for pack in found:
        assert len(pack) == 1 or sum(tokens[n] for n in pack) <= budget
        if pack.stop < len(tokens):
            assert sum(tokens[pack.start : pack.stop + 1]) > budget


# ------------------------------------------------------------------------------------------------------- the oracle


def one_by_one(
    model: ExitSegmenter, image: torch.Tensor, method: Method[Any], window: Size, stride: Size, target: Size
) -> tuple[torch.Tensor, npt.NDArray[np.float64], list[Any]]:
    """Maps at the target's size, mean exit of every pixel, and the outputs of all windows, run alone."""
    size = (image.shape[1], image.shape[2])
    total = np.zeros((model.config.num_classes, *size))
    depth, seen = np.zeros(size), np.zeros(size)
    outputs = []
    for top, left, bottom, right in mmsegmentation_boxes(size, window, stride):
        out = model(image[None, :, top:bottom, left:right], method)
        outputs.append(out)
        total[:, top:bottom, left:right] += out.logits[0].double().numpy()
        for y in range(top, bottom):
            for x in range(left, right):
                depth[y, x] += out.exit_index[0][(y - top) // out.patch_size, (x - left) // out.patch_size].item()
        seen[top:bottom, left:right] += 1
    maps = torch.from_numpy(total / seen)[None]
    return F.interpolate(maps, target, mode="bilinear", align_corners=False)[0], depth / seen, outputs


MODELS = {"fcn": tiny_segmenter("fcn"), "atm": tiny_segmenter("atm")}
CASES = [
    ("fcn", Dense()),
    ("fcn", DToP(threshold=0.6, keep_per_class=1)),
    ("fcn", DoViT(threshold=0.6)),
    ("atm", Dense()),
    ("atm", DToP(threshold=0.4, keep_per_class=1)),
    ("atm", DToP(threshold=0.4, keep_per_class=0, finish="frozen")),
]


def in_windows(
    model: ExitSegmenter, images: list[torch.Tensor], method: Method[Any], grid: tuple[Size, Size], **options: Any
) -> WindowedOutput:
    return segment_windows(model, images, *grid, method, patch_size=model.config.backbone.patch_size, **options)


@pytest.mark.parametrize(("head", "method"), CASES, ids=lambda value: getattr(value, "name", value))
@settings(max_examples=8)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=2),
    window=st.tuples(st.integers(5, 16), st.integers(5, 16)),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    target=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    max_tokens=st.integers(1, 60),
)
@torch.inference_mode()
def test_windows__in_packs_of_any_size_are_those_of_a_loop_over_single_windows(
    head: str, method: Method[Any], sizes: list[Size], window: Size, steps: Size, target: Size, max_tokens: int
) -> None:
    model, images = MODELS[head], [random_image(*size, seed) for seed, size in enumerate(sizes)]
    stride = (-(-window[0] // steps[0]), -(-window[1] // steps[1]))
    targets = [target] * len(images)
    out = in_windows(model, images, method, (window, stride), targets=targets, max_tokens=max_tokens)
    assert len(out) == len(images)
    assert out.value == ("scores" if head == "atm" else "logits")
    for i, image in enumerate(images):
        maps, depth, alone = one_by_one(model, image, method, window, stride, target)
        assert_close(out.logits[i], maps.float())
        assert torch.equal(out.labels[i], out.logits[i].argmax(0))
        assert out.ledger.macs[i] == sum(one.ledger.macs[0] for one in alone)
        assert out.ledger.dense_macs[i] == sum(one.ledger.dense_macs[0] for one in alone)
        assert out.ledger.tokens[i] == sum(one.ledger.tokens[0] for one in alone)
        blocks = zip(*(one.ledger.live[0] for one in alone))
        assert out.ledger.live[i] == tuple(map(sum, blocks))
        assert out.exit_index[i].tolist() == np.floor(depth + 0.5 + 1e-9).astype(int).tolist()


@pytest.mark.parametrize(("head", "method"), CASES, ids=lambda value: getattr(value, "name", value))
@torch.inference_mode()
def test_windows__tokens_do_leave_in_the_cases_above(head: str, method: Method[Any]) -> None:
    out = in_windows(MODELS[head], [random_image(24, 20)], method, ((12, 12), (6, 6)))
    live = out.ledger.live[0]
    assert live[0] == out.ledger.tokens[0]
    assert (live[-1] < live[0]) == (method.name != "dense")


# ------------------------------------------------------------------------------------------------- what it comes to


@torch.inference_mode()
def test_segment__takes_images_whole_unless_the_preprocessing_names_a_window() -> None:
    model, images = tiny_segmenter("fcn"), [random_image(24, 20), random_image(9, 33)]
    whole = model.segment(images, DToP(threshold=0.6), targets=[(7, 7), (8, 8)])
    assert isinstance(whole, SegmentationOutput)
    called = model(images, DToP(threshold=0.6), targets=[(7, 7), (8, 8)])
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, called.logits))
    model.preprocessing = replace(model.preprocessing, window=(12, 12), stride=(6, 6))
    windowed = model.segment(images, DToP(threshold=0.6), targets=[(7, 7), (8, 8)])
    wanted = in_windows(model, images, DToP(threshold=0.6), ((12, 12), (6, 6)), targets=[(7, 7), (8, 8)])
    assert isinstance(windowed, WindowedOutput)
    assert all(torch.equal(a, b) for a, b in zip(windowed.logits, wanted.logits))
    assert model.segment(images).targets == ((24, 20), (9, 33))
    assert len(model.segment(images, with_records=True).windows.exit_records) == 3
    with pytest.raises(ConfigError, match="images is empty"):
        model.segment([])


@pytest.mark.parametrize("head", ["fcn", "atm", "setr_pup", "setr_naive"])
@pytest.mark.parametrize("target", [None, (31, 9)])
@torch.inference_mode()
def test_windows__one_that_holds_the_image_is_the_image_bit_for_bit(head: str, target: Size | None) -> None:
    model = tiny_segmenter(head)
    method = DoViT(threshold=0.5) if head == "setr_pup" else DToP(threshold=0.5)
    image, targets = random_image(13, 18), None if target is None else [target]
    whole = model([image], method, targets=targets)
    out = in_windows(model, [image], method, ((13, 20), (7, 7)), targets=targets)
    assert torch.equal(out.logits, whole.logits)  # type: ignore[arg-type]
    assert torch.equal(out.labels, whole.labels)  # type: ignore[arg-type]
    assert out.ledger == whole.ledger
    stages = whole.exit_index[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:13, :18]
    assert torch.equal(out.exit_index[0], stages)


@pytest.mark.parametrize("tile", [1, 24 * 20 * 2, 1 << 22])
@torch.inference_mode()
def test_labels__do_not_depend_on_how_many_classes_are_held_at_once(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = in_windows(MODELS["fcn"], [random_image(24, 20)], Dense(), ((12, 12), (7, 7)), targets=[(33, 30)])
    monkeypatch.setattr(output_module, "LABEL_TILE_ELEMENTS", tile)
    assert torch.equal(out.labels[0], out.logits[0].argmax(0))
    assert_close(out.scores[0], out.logits[0].softmax(0).amax(0))


@torch.inference_mode()
def test_calls__keep_the_budget_of_tokens() -> None:
    calls: list[int] = []

    def forward(crops: Any, method: Method[Any]) -> Any:
        calls.append(sum(-(-crop.shape[1] // 4) * -(-crop.shape[2] // 4) for crop in crops))
        return MODELS["fcn"](crops, method)

    images = [random_image(40, 24), random_image(5, 9)]
    segment_windows(forward, images, (12, 12), (6, 6), Dense(), patch_size=4, max_tokens=40)
    assert sum(calls) == 6 * 3 * 9 + 6
    assert max(calls) == 36  # four windows of nine tokens
    assert len(calls) == 5


@torch.inference_mode()
def test_indexing__gives_an_output_of_one_image() -> None:
    images = [random_image(24, 20), random_image(9, 33), random_image(1, 1)]
    out = in_windows(MODELS["fcn"], images, DToP(threshold=0.6), ((12, 12), (6, 6)), max_tokens=30)
    assert isinstance(out.labels, list)
    for i, one in enumerate(out):
        assert len(one) == 1
        assert torch.equal(one.labels[0], out.labels[i])
        assert torch.equal(one.exit_index[0], out.exit_index[i])
        assert one.ledger == out.ledger[i]
        assert one.sizes == (out.sizes[i],)
    assert torch.equal(out[-1].labels[0], out.labels[2])
    with pytest.raises(IndexError, match="image 3 of an output of 3 images"):
        out[3]


@torch.inference_mode()
def test_outputs__whole_or_in_windows_are_read_alike() -> None:
    model, images = MODELS["fcn"], [random_image(24, 20), random_image(9, 33)]
    whole, cut = model(images, DToP(threshold=0.6)), in_windows(model, images, DToP(threshold=0.6), ((12, 12), (6, 6)))
    assert whole.windows is whole
    assert (whole.window_counts, cut.window_counts) == ((1, 1), (9, 5))
    assert len(cut.windows) == sum(cut.window_counts)
    for out in (whole, cut):
        again = out.with_windows(replace(out.windows, grid_logits=tuple(-own for own in out.windows.grid_logits)))
        assert type(again) is type(out)
        assert all(torch.equal(a, -b) for a, b in zip(again.logits, out.logits))


@pytest.mark.parametrize("window", [None, (12, 12)])
@torch.inference_mode()
def test_dense_macs__are_those_of_the_run(window: Size | None) -> None:
    model = tiny_segmenter("fcn")
    stride = None if window is None else (6, 7)
    model.preprocessing = replace(model.preprocessing, window=window, stride=stride)
    for size in ((24, 20), (9, 33), (5, 7)):
        ran = model.segment([random_image(*size)], Dense())
        assert dense_macs(model.backbone, model.decode_head, size, window, stride) == ran.ledger.macs[0]


@torch.inference_mode()
def test_prescribed_exits__are_dealt_to_the_windows_of_every_pack() -> None:
    images = [random_image(24, 20), random_image(9, 33)]
    own = in_windows(MODELS["fcn"], images, DToP(threshold=0.6), ((12, 12), (6, 6)))
    stages = torch.cat([stage.flatten() for stage in own.windows.exit_index])
    for max_tokens in (1, 30, 1000):
        again = in_windows(
            MODELS["fcn"], images, PrescribedExits(exit_index=stages), ((12, 12), (6, 6)), max_tokens=max_tokens
        )
        assert again.ledger == own.ledger
        for a, b in zip(again.logits, own.logits):
            assert_close(a, b)


@pytest.mark.parametrize("head", ["fcn", "atm"])
@torch.inference_mode()
def test_records__of_all_packs_are_those_of_one_call(head: str) -> None:
    model, images = MODELS[head], [random_image(24, 20), random_image(9, 33)]
    exits = []
    for max_tokens in (20, 1000):
        out = segment_windows(
            lambda crops, method: model(crops, method, with_records=True),
            *(images, (12, 12), (6, 6), Dense()),
            patch_size=4,
            max_tokens=max_tokens,
        )
        exits.append(agreement_exits(out.windows.exit_records, out.windows.ledger.tokens))
    assert torch.equal(*exits)
    assert 0 < exits[0].float().mean() < 2
