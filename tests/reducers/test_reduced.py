"""Every reducer beside every method: nothing that never fires changes a bit, and images do not meet in a batch."""

import pytest
import torch

import tokenexit
from tests.helpers import assert_close, gently_varied, random_image, tiny_config, tiny_segmenter
from tests.methods.test_behaviours import counted_macs
from tokenexit.calibration.gating import gated_by_size
from tokenexit.cli import method_options
from tokenexit.methods import (
    PAUMER,
    Dense,
    DoViT,
    DToP,
    FixedRatio,
    Gated,
    Reduced,
    Resized,
    Truncated,
    as_method,
    build_method,
    spec_of,
)
from tokenexit.reducers import (
    ALGM,
    G2TM,
    MPM,
    REDUCERS,
    CoarseFirst,
    Site,
    Supertokens,
    ToMe,
    ZeroTPrune,
    build_reducer,
)
from tokenexit.reducers.supertokens import LabelledSupertokens
from tokenexit.segmenter import plan

REDUCING = {"algm": ALGM(0.5, 1, 3), "mpm": MPM((1, 3)), "tome": ToMe(0.1), "g2tm": G2TM(0.5, 1)}
REDUCING |= {"supertokens": Supertokens(0.5), "zerotprune": ZeroTPrune((0.6,), (1, 3), (3,))}
REDUCING |= {"coarse_first": CoarseFirst(2)}
NEVER = {"algm": ALGM(2.0, 1, None), "mpm": MPM(()), "tome": ToMe(0.0), "g2tm": G2TM(2.0)}
NEVER |= {"supertokens": Supertokens(2.0), "zerotprune": ZeroTPrune((1.0,), (1, 3), (3,))}
NEVER |= {"coarse_first": CoarseFirst(2, side=99)}
FOR_GOOD = [name for name in REDUCING if name != "coarse_first"]
"""Reducers whose groups last to the end, whatever exits do; of the other, see `test_coarse_first.py`."""
METHODS = [
    Dense(),
    DToP(0.6),
    DToP(0.6, stop=2),
    DoViT(0.9),
    DoViT(0.9, scoring="live"),
    PAUMER(0.9),
    FixedRatio((0.6, 0.3)),
    DoViT(0.9, rejoin=1),
    FixedRatio((0.6, 0.3), rejoin=1),
    Truncated(2),
]
IDS = [method.label for method in METHODS]
SIZES = [(16, 20), (32, 36), (4, 4), (13, 22), (4, 40)]
HEADS = ["fcn", "mask_transformer", "setr_naive"]


def batch():
    return [gently_varied(*size, seed=i) if i % 2 else random_image(*size, i) for i, size in enumerate(SIZES)]


def run(model, images, method):
    with torch.no_grad():
        return model(images, method)


def test_reducers__all_are_tested():
    assert set(REDUCERS) == set(REDUCING) == set(NEVER)


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("head", [*HEADS, "setr_pup", "atm"])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_reduced__a_rule_that_never_fires_changes_no_bit(method, head, name):
    model, images = tiny_segmenter(head, depth=4), batch()
    try:
        model.check(method)
    except tokenexit.ConfigError:
        with pytest.raises(tokenexit.ConfigError):
            model.check(Reduced(method, NEVER[name]))
        return
    alone, beside = run(model, images, method), run(model, images, Reduced(method, NEVER[name]))
    for a, b in zip(alone, beside):
        assert torch.equal(a.grid_logits[0], b.grid_logits[0])
        assert torch.equal(a.exit_index[0], b.exit_index[0])
    assert alone.ledger.live == beside.ledger.live


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_reduced__a_batch_of_n_is_n_batches_of_one_and_saves_tokens(method, head, name):
    model, images, reduced = tiny_segmenter(head, depth=4), batch(), Reduced(method, REDUCING[name])
    try:
        model.check(method)
    except tokenexit.ConfigError:
        pytest.skip("the method does not run on this head")
    together, alone = run(model, images, reduced), run(model, images, method)
    for one, image in zip(together, images):
        single = run(model, [image], reduced)
        assert torch.equal(one.exit_index[0], single.exit_index[0])
        assert one.ledger == single.ledger
        assert_close(one.grid_logits[0], single.grid_logits[0])
    live = together.ledger.live[1]
    assert live[0] <= 72
    assert sum(live) < sum(alone.ledger.live[1])


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_reduced__the_ledger_equals_an_operator_counter_comparisons_included(method, name):
    model, image = tiny_segmenter("fcn", depth=4).requires_grad_(False), gently_varied(15, 22)
    counted, ledger = counted_macs(model, image, Reduced(method, REDUCING[name]))
    assert ledger.macs == (counted,)
    assert ledger.parts[0].reduction > 0


@pytest.mark.parametrize("name", FOR_GOOD)
def test_reduced__cells_of_a_group_have_one_answer(name):
    model, image = tiny_segmenter("fcn", depth=4), gently_varied(32, 36)
    for method in (Dense(), DToP(0.9), DoViT(0.9)):
        out = run(model, [image], Reduced(method, REDUCING[name]))
        rows = out.grid_logits[0].flatten(1).T
        assert len(rows.unique(dim=0)) < len(rows)
        pairs = torch.cat([rows, out.exit_index[0].flatten()[:, None]], 1)
        assert len(pairs.unique(dim=0)) == len(rows.unique(dim=0))


def test_reduced__a_grid_head_reads_merged_features_at_their_cells():
    model = tiny_segmenter("fcn", "setr_pup", depth=4)
    for method in (Dense(), DoViT(0.9)):
        out = run(model, batch(), Reduced(method, ALGM(0.5, 1, 3)))
        for image, single in zip(batch(), out):
            alone = run(model, [image], Reduced(method, ALGM(0.5, 1, 3)))
            assert_close(single.grid_logits[0], alone.grid_logits[0])


@pytest.mark.parametrize("name", FOR_GOOD)
def test_reduced__groups_of_the_output_are_those_that_have_one_answer(name):
    model = tiny_segmenter("fcn", depth=4)
    for method in (Dense(), DToP(0.9), DoViT(0.9), FixedRatio(0.5, rejoin=1)):
        out = run(model, batch(), Reduced(method, REDUCING[name]))
        for one, logits in zip(out, out.grid_logits):
            groups, rows = one.groups[0].flatten(), logits.flatten(1).T
            first = {int(g): i for i, g in reversed(list(enumerate(groups)))}
            assert all(torch.equal(rows[i], rows[first[int(g)]]) for i, g in enumerate(groups))
        assert any(len(groups.unique()) < groups.numel() for groups in out.groups)
        assert run(model, batch(), method).groups == ()


def test_reduced__rotary_phases_are_those_of_the_cell_that_stands():
    model = tiny_segmenter("fcn", depth=4, rope="half", pos_embed=False)
    with torch.no_grad():
        tokens = model.backbone.embed([gently_varied(32, 36)])
        merged = ALGM(0.5).reduce(Site(0, True), tokens, None)
    assert sum(merged.live) < 72
    own = torch.cat([torch.zeros(1, dtype=torch.int64), merged.patches().position + 1])
    assert torch.equal(merged.phases, tokens.phases[own])
    assert run(model, batch(), Reduced(DToP(0.6), ALGM(0.5, 1, 3))).ledger.live


def test_reduced__closed_exits_and_resizing_go_together_with_it():
    model, by = tiny_segmenter("fcn", depth=4), ALGM(0.5, 1, 3)
    out = run(model, batch(), Resized(Reduced(Gated(DToP(0.6), (0,)), by), 0.5))
    assert all((exits != 0).all() for exits in out.exit_index)
    with pytest.raises(tokenexit.ConfigError, match="put it inside of 'reduced'"):
        Gated(Reduced(DToP(0.6), by), (0,))


@pytest.mark.parametrize("name", REDUCING)
def test_spec__comes_back_whole_and_short(name):
    method = Reduced(DToP(0.9), REDUCING[name])
    assert build_method(spec_of(method)) == method == as_method(spec_of(method, whole=True))


def _supertokens_of_a_drawn_scale(model):
    model = tiny_segmenter("fcn", depth=4, rope="half", pos_embed=False, rope_rescale=2.0).train()
    return model([gently_varied(16, 16)], Reduced(Dense(), Supertokens(0.5)))


def _with_labels_of_another_image(model):
    by = LabelledSupertokens(labels=(torch.zeros(8, 8, dtype=torch.int64),))
    return model([random_image(8, 12)], Reduced(Dense(), by))


def refusals():
    by = ALGM()
    yield "at block 5 and this backbone has 4", lambda m: m.check(Reduced(Dense(), by))
    yield "set rope_rescale to 1", _supertokens_of_a_drawn_scale
    yield "batch_mode='exact'", lambda m: m.check(Reduced(DoViT(batch_mode="mean"), MPM((1,))))
    yield "one reducer works at a time", lambda m: Reduced(Reduced(Dense(), by), by)
    yield "by must be a reducer", lambda m: Reduced(Dense(), "algm")
    yield "export the method inside", lambda m: Reduced(Dense(), by).for_export()
    yield "reducer 'algn' is unknown", lambda m: build_reducer("algn")
    yield "has no option 'tau'", lambda m: build_reducer({"name": "algm", "tau": 0.9})
    yield "threshold must be a number from -1 to 2", lambda m: ALGM(3.0)
    yield "global_block must be behind", lambda m: ALGM(0.9, 5, 1)
    yield "local_block must be at least 1", lambda m: ALGM(0.9, 0)
    yield "window must be at least 2", lambda m: ALGM(0.9, window=1)
    yield "divisor must be above 0", lambda m: ALGM(0.9, divisor=0.0)
    yield "after must be increasing", lambda m: MPM((5, 2))
    yield "ratio must be a number from 0 to 0.5", lambda m: ToMe(0.7)
    yield "block must be at least 1", lambda m: G2TM(0.9, 0)
    yield "keep must be a number from 0 to 1", lambda m: ZeroTPrune((1.5,))
    yield "keep must be one number or one for each of 3 blocks, got 2", lambda m: ZeroTPrune((0.7, 0.6))
    yield "iterations must be one number or one for each of 2 blocks", lambda m: ZeroTPrune((0.7,), (1, 2))
    yield "iterations must be at least 1", lambda m: ZeroTPrune(iterations=(0,))
    yield "blocks must be increasing", lambda m: ZeroTPrune(blocks=(3, 2), iterations=(1,))
    yield "at block 9 and this backbone has 4", lambda m: m.check(Reduced(Dense(), ZeroTPrune()))
    yield "sizes must be sides of windows that nest, got \\(2, 3\\)", lambda m: Supertokens(0.9, (2, 3))
    yield "sizes must be sides of windows that nest", lambda m: Supertokens(0.9, (1, 2))
    yield "sizes must be sides of windows that nest", lambda m: Supertokens(0.9, (4, 4))
    yield "policy must be similarity, entropy or net", lambda m: Supertokens(0.9, policy="nut")
    yield "labels must be one mask for each image", _with_labels_of_another_image


@pytest.mark.parametrize(("sentence", "wrong"), list(refusals()))
def test_reduced__refuses_in_one_sentence(sentence, wrong):
    with pytest.raises(tokenexit.ConfigError, match=sentence):
        wrong(tiny_segmenter("fcn", depth=4))


def test_reduced__does_not_go_with_a_head_of_masks_or_with_gating():
    model = tiny_segmenter("fcn", depth=4)
    with pytest.raises(tokenexit.ConfigError, match="measured without merged tokens"):
        gated_by_size(model, Reduced(DToP(0.6), MPM((1,))), "fp32")
    spec = {"kind": "eomt", "layers": 1, "queries": 5}
    masks = tokenexit.ExitSegmenter(tiny_config(depth=4), 5, (1,), "fcn", spec)
    with pytest.raises(tokenexit.ConfigError, match="takes no merged tokens"):
        masks.check(Reduced(DToP(0.6), MPM((1,))))


def test_names_on_the_command_line__are_those_of_the_reducers():
    assert set(method_options.REDUCERS) == set(REDUCERS)


def test_plan__exits_come_before_sites_and_a_site_inside_is_its_block():
    assert list(plan(4, (1, 3), ())) == [range(1), 0, range(1, 3), 1, range(3, 4)]
    between, inside = Site(1), Site(1, True)
    assert list(plan(4, (1, 3), (inside, between))) == [range(1), 0, between, inside, range(2, 3), 1, range(3, 4)]
    assert list(plan(2, (), tuple(Site(n, True) for n in range(2)))) == [Site(0, True), Site(1, True)]


@pytest.mark.parametrize(
    ("backbone", "classes", "side", "published"),
    [
        ("vit_small_patch16", 150, 512, 38.6),
        ("vit_base_patch16", 150, 512, 129.6),
        ("vit_large_patch16", 150, 640, 672),
        ("vit_small_patch16", 19, 768, 116),
        ("vit_small_patch16", 59, 480, 32.1),
    ],
)
def test_dense__costs_what_the_tables_of_algm_and_g2tm_say(backbone, classes, side, published):
    from tokenexit.outputs.ledger import dense_gmacs

    own = dense_gmacs(backbone, "mask_transformer", classes, (side, side), "tokenexit")["gmacs"]
    assert own == pytest.approx(published, rel=0.006)
