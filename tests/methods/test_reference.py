from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close, fix_exit, random_image, tiny_segmenter
from tests.oracles.heads import run_head
from tests.oracles.methods import Weights
from tests.oracles.vit import embed, final_norm, grid_of, run_block
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP, ExitRecord
from tokenexit.methods.reference import (
    FrozenContext,
    LabelledExits,
    PrescribedExits,
    agreement_exits,
    patch_labels,
    random_exits,
)
from tokenexit.outputs.ledger import with_frozen_keys


def stage(labels, classes=3):
    return ExitRecord(logits=torch.nn.functional.one_hot(torch.tensor(labels), classes).float())


def test_agreement_exits__is_the_first_exit_from_which_on_the_answer_stands():
    stages = (stage([0, 1, 2, 0, 1]), stage([0, 0, 2, 1, 1]), stage([0, 0, 1, 0, 2]))
    assert agreement_exits(stages, (5,)).tolist() == [0, 1, 2, 2, 2]


def test_agreement_exits__judges_atm_heads_by_presence_times_mask():
    absent_first = torch.tensor([[[-9.0, 9.0], [9.0, -9.0]]])
    masks = torch.tensor([[2.0, 1.0]])  # the higher mask belongs to an absent class
    atm = ExitRecord(logits=masks, presence=absent_first, kind="atm")
    assert agreement_exits((atm, stage([1], 2)), (1,)).tolist() == [0]
    assert agreement_exits((atm, stage([0], 2)), (1,)).tolist() == [1]


def test_agreement_exits__of_heads_finer_than_tokens_are_refused():
    model, images = tiny_segmenter("setr_pup"), [random_image(8, 8)]
    with torch.no_grad():
        out = model(images, Dense(), with_records=True)
    with pytest.raises(ConfigError, match="one answer per token, and the decode head has more: leave it out"):
        agreement_exits(out.exit_records, out.ledger.tokens)


def test_random_exits__keep_the_counts_and_change_the_places():
    stages = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 2]])
    drawn = random_exits(stages, torch.Generator().manual_seed(0))
    assert drawn.shape == stages.shape
    assert drawn.flatten().sort().values.tolist() == stages.flatten().sort().values.tolist()
    assert not torch.equal(drawn, stages)
    assert torch.equal(drawn, random_exits(stages, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_prescribed__the_exits_of_a_method_give_its_result(head):
    model, images = tiny_segmenter(head), [random_image(16, 20), random_image(9, 33)]
    with torch.no_grad():
        out = model(images, DToP(0.3, keep_per_class=1))
        again = model(images, PrescribedExits(exit_index=torch.cat([s.flatten() for s in out.exit_index])))
    assert sum(int((s < 2).sum()) for s in out.exit_index) > 0
    assert out.ledger == again.ledger
    for a, b in zip(out.grid_logits, again.grid_logits):
        assert torch.equal(a, b)


def test_prescribed__tokens_told_to_stay_are_dense():
    model, images = tiny_segmenter("fcn"), [random_image(8, 8)]
    with torch.no_grad():
        out, dense = model(images, PrescribedExits(exit_index=torch.full((4,), 2))), model(images, Dense())
    assert_close(out.grid_logits[0], dense.grid_logits[0])


# Frozen tokens as context.


def in_context(model, image, exits):
    """Block by block on the whole grid in double precision; who has left is put back to what it was."""
    weights, image = Weights.of(model), image.double()
    config, prefix, places = weights.vit, weights.vit.num_prefix_tokens, model.config.exits
    grid = grid_of(image, config.patch_size)
    x = embed(weights.backbone, config, image)
    logits = torch.zeros(len(exits), model.config.num_classes, dtype=torch.float64)
    for i in range(config.depth):
        before = x.clone()
        x = run_block(weights.backbone, config, i, x, torch.ones(len(x), dtype=torch.bool), grid)
        for cell, exit in enumerate(exits):
            if exit < len(places) and places[exit] <= i:
                x[prefix + cell] = before[prefix + cell]
        for exit, place in enumerate(places):
            if place == i + 1:
                for cell in [c for c, own in enumerate(exits) if own == exit]:
                    logits[cell] = run_head(*weights.head(exit), x[prefix + cell][None])[0][0]
    last = final_norm(weights.backbone, config, x[prefix:])
    for cell in [c for c, own in enumerate(exits) if own == len(places)]:
        logits[cell] = run_head(*weights.head(None), last[cell][None])[0][0]
    return logits.T.reshape(-1, *grid)


@pytest.mark.parametrize("options", [{}, {"num_registers": 2, "rope": "half"}, {"class_token": False}])
@given(data=st.data(), seed=st.integers(0, 5))
def test_frozen_context__equals_blocks_on_the_whole_grid_with_who_left_put_back(options, data, seed):
    model = tiny_segmenter("fcn", seed=seed, **options)
    images = [random_image(8, 12, seed), random_image(9, 5, seed + 1)]
    exits = [data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for n in (6, 6)]
    with torch.no_grad():
        out = model(images, FrozenContext(exit_index=torch.tensor(exits[0] + exits[1])))
    for i, image in enumerate(images):
        assert out.exit_index[i].flatten().tolist() == exits[i]
        assert_close(out.grid_logits[i], in_context(model, image, exits[i]))


def test_frozen_context__of_tokens_told_to_stay_is_dense_and_of_others_is_not_that_without_context():
    model, images = tiny_segmenter("fcn"), [random_image(8, 12)]
    exits = torch.tensor([0, 0, 0, 1, 2, 2])
    with torch.no_grad():
        dense = model(images, Dense()).grid_logits[0].flatten(1)
        stay = model(images, FrozenContext(exit_index=torch.full((6,), 2))).grid_logits[0].flatten(1)
        context = model(images, FrozenContext(exit_index=exits)).grid_logits[0].flatten(1)
        alone = model(images, PrescribedExits(exit_index=exits)).grid_logits[0].flatten(1)
    assert torch.equal(stay, dense)
    assert_close(context[:, :3], alone[:, :3])  # at the first exit nobody has left yet
    assert (context[:, 3:] - alone[:, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"class_token": False}])
def test_frozen_context__costs_keys_and_values_of_who_left_and_the_products_of_live_queries_with_them(options):
    model, images = tiny_segmenter("fcn", **options), [random_image(8, 12), random_image(8, 8)]
    exits = torch.tensor([0, 0, 0, 1, 2, 2] + [0] * 4)
    with torch.no_grad():
        alone = model(images, PrescribedExits(exit_index=exits)).ledger
    ledger = with_frozen_keys(alone, model.backbone)
    prefix, d, hidden = int(options.get("class_token", True)), 32, 64

    def block(live, cells):
        queries, keys = live + prefix, cells + prefix
        if queries == 0:
            return 0
        return queries * d * d + 2 * keys * d * d + 2 * queries * keys * d + queries * (d * d + 2 * d * hidden)

    live = ([6, 3, 3, 2], [4, 0, 0, 0])
    assert [part.blocks for part in ledger.parts] == [sum(block(n, own[0]) for n in own) for own in live]
    assert [a.total - a.blocks for a in ledger.parts] == [b.total - b.blocks for b in alone.parts]
    assert ledger.live == alone.live


def test_frozen_context__a_decode_head_with_blocks_of_its_own_is_refused():
    model = tiny_segmenter("fcn", "eomt", final_norm=False)
    with pytest.raises(
        ConfigError, match=r"in which tokens that left are no keys: leave the line of frozen context out"
    ):
        model([random_image(8, 8)], FrozenContext(exit_index=torch.zeros(4, dtype=torch.int64)))


# A greedy rule that sees the labels.


def test_labelled_exits__leave_at_the_first_exit_that_says_their_label():
    model = tiny_segmenter("linear")
    fix_exit(model, 0, [0.3] * 6, label=[1, 1, 2, 3, 0, 2])
    fix_exit(model, 1, [0.3] * 6, label=[1, 2, 2, 1, 3, 0])
    with torch.no_grad():
        images = [random_image(4, 16), random_image(4, 8)]
        out = model(images, LabelledExits(labels=torch.tensor([1, 2, 3, -1, 4, 2])))
    assert out.exit_index[0].tolist() == [[0, 1, 2, 0]]
    assert out.exit_index[1].tolist() == [[2, 0]]
    assert out.ledger.live == ((4, 2, 2, 1), (2, 1, 1, 1))


def test_labelled_exits__go_by_heads_that_see_what_is_left():
    """Not by those of the dense pass: exit 2 may say otherwise once others are gone."""
    model, image = tiny_segmenter("fcn"), random_image(16, 20)
    labels = torch.arange(20) % 5
    with torch.no_grad():
        out = model([image], LabelledExits(labels=labels), with_records=True)
        again = model([image], PrescribedExits(exit_index=out.exit_index[0].flatten()), with_records=True)
    index = out.exit_index[0].flatten()
    for n in range(2):
        said = again.exit_records[n].logits.argmax(1)
        here = index >= n
        assert torch.equal(index[here] == n, (said == labels)[here])
    assert {0, 1, 2} == set(index.tolist())


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    patch=st.integers(1, 4),
    draw=st.randoms(use_true_random=False),
)
def test_patch_labels__are_the_most_frequent_of_each_patch(size, patch, draw):
    height, width = size
    rows = [[draw.choice([0, 1, 2, 255]) for _ in range(width)] for _ in range(height)]
    expected = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            seen = Counter(v for row in rows[top : top + patch] for v in row[left : left + patch] if v != 255)
            expected.append(max(sorted(seen), key=lambda v: seen[v]) if seen else -1)
    assert patch_labels(torch.tensor(rows), patch, 3, 255).tolist() == expected


@pytest.mark.parametrize("method", [LabelledExits(), FrozenContext()])
def test_references__are_no_methods_to_export(method):
    with pytest.raises(ConfigError, match="no method to export: choose another, such as dtop"):
        method.for_export()
