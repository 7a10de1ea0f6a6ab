import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.heads.test_heads import complete
from tests.helpers import assert_close, enliven
from tests.oracles.heads import setr_naive_fine, setr_up_fine
from tokenexit.engine.tokens import unpack_grids
from tokenexit.heads import build_head

grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


def lively(spec):
    head = build_head(spec, 32, 5).eval()
    enliven(head)
    return head, {key: value.double() for key, value in head.state_dict().items()}


def fine_maps(head, tokens):
    """The head's full answer: its logits, and the bilinear step it leaves to the caller."""
    with torch.no_grad():
        out = head(tokens)
    maps = {}
    for members, batch in unpack_grids(out.logits, tokens.grids, head.scale):
        batch = F.interpolate(batch.contiguous(), scale_factor=head.upscale, mode="bilinear", align_corners=False)
        maps |= dict(zip(members, batch))
    return [maps[i] for i in range(len(tokens.grids))]


@given(grids=grids)
def test_setr_naive__classifying_before_the_upsampling_changes_nothing(grids):
    head, state = lively({"kind": "setr_naive", "channels": 24})
    tokens = complete(grids)
    for maps, x, grid in zip(fine_maps(head, tokens), tokens.x.split(tokens.packing.lengths), grids):
        assert_close(maps, setr_naive_fine(state, x.double(), grid))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "setr_pup", "channels": 12},
        {"kind": "setr_pup", "channels": 12, "steps": 2, "kernel": 1, "up": 4},
        {"kind": "setr_pup", "channels": 12, "steps": 1, "kernel": 3, "up": 4},
        {"kind": "setr_pup", "channels": 12, "steps": 3, "kernel": 3, "up": 2},
    ],
)
@given(grids=grids)
def test_setr_up__equals_convolve_and_upsample_step_by_step_and_classify_last(spec, grids):
    head, state = lively(spec)
    tokens = complete(grids)
    for maps, x, grid in zip(fine_maps(head, tokens), tokens.x.split(tokens.packing.lengths), grids):
        assert_close(maps, setr_up_fine(state, spec, x.double(), grid))


def test_setr_pup__is_sixteen_times_the_patch_grid_and_needs_all_of_it():
    head = build_head("setr_pup", 32, 5)
    assert head.scale * head.upscale == 16
    assert head.needs_grid
    assert not build_head("setr_naive", 32, 5).needs_grid
