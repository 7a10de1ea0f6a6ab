from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.errors import DataError
from tokenexit.methods import Dense, DToP
from tokenexit.outputs import segmentation
from tokenexit.outputs.segmentation import resize_maps

MIXED = [(16, 20), (9, 33), (1, 1)]


def segmented(head="fcn", sizes=MIXED, targets=None, method=None, **options):
    model = tiny_segmenter(head, **options)
    with torch.no_grad():
        return model([random_image(*s, i) for i, s in enumerate(sizes)], method or Dense(), targets=targets)


@pytest.mark.parametrize("head", ["fcn", "setr_naive", "setr_pup", "atm"])
def test_labels__are_the_argmax_of_the_logits(head):
    out = segmented(head)
    for labels, logits in zip(out.labels, out.logits):
        assert torch.equal(labels, logits.argmax(0))


@pytest.mark.parametrize("tile", [1, 16 * 20 * 2, 1 << 22])
@pytest.mark.parametrize("targets", [None, [(40, 31), (5, 5), (2, 3)]])
def test_labels__do_not_depend_on_the_tile_they_are_made_in(monkeypatch, tile, targets):
    out = segmented(targets=targets)
    monkeypatch.setattr(segmentation, "LABEL_TILE_ELEMENTS", tile)
    for labels, logits in zip(out.labels, out.logits):
        assert torch.equal(labels, logits.argmax(0))


@pytest.mark.parametrize("tile", [1, 16 * 20 * 2, 1 << 22])
@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_scores__are_those_of_the_labels_whatever_the_tile(monkeypatch, head, tile):
    out = segmented(head, targets=[(40, 31), (5, 5), (2, 3)])
    monkeypatch.setattr(segmentation, "LABEL_TILE_ELEMENTS", tile)
    for scores, logits in zip(out.scores, out.logits):
        assert_close(scores, (logits.softmax(0) if head == "fcn" else logits).amax(0))


@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_labels__ties_go_to_the_lower_class(monkeypatch, tile):
    monkeypatch.setattr(segmentation, "LABEL_TILE_ELEMENTS", tile)
    out = segmented(sizes=[(8, 8)])
    flat = torch.zeros(5, 2, 2)
    flat[2:4] = 1.0
    tied = type(out)(**(vars(out) | {"grid_logits": (flat,)}))
    assert (tied.labels == 2).all()


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("read", ["labels", "scores"])
def test_labels_and_scores__of_maps_that_are_not_finite_are_refused(read, bad, window):
    model = tiny_segmenter("fcn")
    model.preprocessing = replace(model.preprocessing, window=window)
    with torch.no_grad():
        out = model.segment([random_image(12, 16, 0), random_image(12, 16, 1)])
        (out if window is None else out.windows).grid_logits[-1][2, 1, 1] = bad
    with pytest.raises(
        DataError, match=r"^the model's output is not finite \(NaN or infinity\): check its weights and"
    ):
        getattr(out, read)
    assert getattr(out[0], read).shape == (1, 12, 16)
    assert torch.stack(list(out.logits)).shape == (2, 5, 12, 16)  # as they are, to be looked at


def test_labels__a_std_that_is_next_to_nothing_is_no_class_0():
    model = tiny_segmenter("fcn")
    model.preprocessing = replace(model.preprocessing, std=(1e-300,) * 3)
    out = model.predict(np.full((8, 8, 3), 200, np.uint8))
    with pytest.raises(DataError, match="not finite"):
        _ = out.labels


def test_labels__of_one_size_are_one_tensor_and_of_several_a_list():
    assert segmented(sizes=[(8, 9), (8, 9)]).labels.shape == (2, 8, 9)
    assert [tuple(labels.shape) for labels in segmented().labels] == MIXED
    assert segmented(targets=[(7, 7)] * 3).labels.shape == (3, 7, 7)
    assert segmented().labels[0].dtype == torch.int64


def test_logits__of_one_size_are_one_tensor_and_of_several_a_list():
    assert segmented(sizes=[(8, 9), (8, 9)]).logits.shape == (2, 5, 8, 9)
    assert [tuple(m.shape) for m in segmented().logits] == [(5, *size) for size in MIXED]
    assert [tuple(m.shape) for m in segmented(targets=[(3, 4), (5, 6), (7, 8)]).logits] == [
        (5, 3, 4),
        (5, 5, 6),
        (5, 7, 8),
    ]


def test_targets__are_reached_from_the_image_size():
    out = segmented(targets=[(40, 31)] * 3)
    plain = segmented()
    for wanted, logits in zip(out.logits, plain.logits):
        assert_close(wanted, F.interpolate(logits[None], (40, 31), mode="bilinear", align_corners=False)[0])


@pytest.mark.parametrize("method", [Dense(), DToP(0.3)])
def test_atm_maps__are_interpolated_as_scores_not_as_logits(method):
    out = segmented("atm", sizes=[(16, 20)], method=method)
    scores = out.grid_logits[0][None]
    assert_close(out.logits, F.interpolate(scores, (16, 20), mode="bilinear", align_corners=False))
    as_logits = F.interpolate(scores.logit(), (16, 20), mode="bilinear", align_corners=False).sigmoid()
    assert not torch.allclose(out.logits, as_logits, atol=1e-4)


def test_grid_logits__are_on_the_patch_grid_times_the_heads_scale():
    assert [tuple(m.shape) for m in segmented("fcn").grid_logits] == [(5, 4, 5), (5, 3, 9), (5, 1, 1)]
    assert [tuple(m.shape) for m in segmented("setr_pup").grid_logits] == [(5, 8, 10), (5, 6, 18), (5, 2, 2)]


def test_value__says_whether_the_maps_are_logits_or_scores():
    assert segmented("fcn").value == "logits"
    out = segmented("atm")
    assert out.value == "scores"
    assert all(((m >= 0) & (m <= 1)).all() for m in out.grid_logits)
    assert segmented("atm", method=DToP(0.3)).value == "scores"


def test_indexing__gives_an_output_of_one_image():
    out = segmented(method=DToP(0.5))
    for i, one in enumerate(out):
        assert len(one) == 1
        assert torch.equal(one.labels[0], out.labels[i])
        assert torch.equal(one.exit_index[0], out.exit_index[i])
        assert one.ledger.macs == (out.ledger.macs[i],)
        assert one.sizes == (MIXED[i],)
    assert torch.equal(out[-1].labels[0], out.labels[2])
    with pytest.raises(IndexError, match="image 3 of an output of 3 images"):
        out[3]


@given(grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), cut=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_resize_maps__cuts_the_padding_and_does_not_squeeze_it_in(grid, cut):
    maps, size = torch.randn(1, 2, *grid), (grid[0] * 4 - cut[0], grid[1] * 4 - cut[1])
    full = F.interpolate(maps, (grid[0] * 4, grid[1] * 4), mode="bilinear", align_corners=False)
    assert_close(resize_maps(maps, grid, 4, 1, size), full[:, :, : size[0], : size[1]])


def test_resize_maps__the_heads_own_step_comes_first():
    maps = torch.randn(2, 3, 2, 2)
    step = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    expected = F.interpolate(step, (32, 32), mode="bilinear", align_corners=False)
    assert_close(resize_maps(maps, (2, 2), 16, 4, (32, 32)), expected)
    assert not torch.allclose(expected, resize_maps(maps, (2, 2), 16, 1, (32, 32)))


def test_resize_maps__maps_already_at_size_are_untouched():
    maps = torch.randn(1, 3, 8, 8)
    assert torch.equal(resize_maps(maps, (2, 2), 4, 1, (8, 8)), maps)


def test_resize_maps__at_half_the_resolution_covers_the_same_image():
    ramp = torch.linspace(0, 1, 6).expand(1, 1, 4, 6)
    half = resize_maps(ramp, (4, 6), 4, 1, (16, 24), out=(8, 12))
    assert half.shape == (1, 1, 8, 12)
    full = resize_maps(ramp, (4, 6), 4, 1, (16, 24))
    assert_close(half, F.avg_pool2d(full, 2), 1e-2)
