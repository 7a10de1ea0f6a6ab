import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.data.pictures import LABELS, TinyDataset
from tokenexit.data.base import Sample
from tokenexit.data.loader import (
    Cached,
    Draw,
    EvaluationSet,
    ResumableSampler,
    Spread,
    TrainingSet,
    augmentation_rng,
    collate_evaluation,
    collate_training,
    epoch_order,
    step_draws,
)
from tokenexit.data.transforms import Compose, training_transform
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.preprocessing import Preprocessing

lengths = st.integers(1, 50)
seeds = st.integers(0, 2**40)
small = st.integers(0, 20)


def training_set(seed: int = 7, crop: tuple[int, int] = (8, 10)) -> TrainingSet:
    return TrainingSet(TinyDataset(), training_transform(crop), Preprocessing(), seed)


def same(a, b) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"]) and a["name"] == b["name"]


# ------------------------------------------------------------------------------------------------------------ order


@given(lengths, seeds, small)
def test_epoch_order__visits_every_image_once_and_repeats_for_equal_numbers(length, seed, epoch):
    order = epoch_order(length, seed, epoch)
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(order, epoch_order(length, seed, epoch))


def test_epoch_order__differs_between_epochs_and_seeds():
    orders = {tuple(epoch_order(30, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(lengths, seeds, st.integers(1, 9))
def test_step_draws__one_line_of_images_cut_into_batches_shows_every_epoch_in_full(length, seed, batch_size):
    steps = -(-3 * length // batch_size)
    line = [draw for step in range(steps) for draw in step_draws(length, seed, step, batch_size)]
    for epoch in range(3):
        indices = [draw.index for draw in line if draw.epoch == epoch]
        assert indices == epoch_order(length, seed, epoch).tolist()
    assert all(len(step_draws(length, seed, step, batch_size)) == batch_size for step in range(steps))


@given(lengths, seeds, st.integers(1, 6), small, st.integers(1, 10))
def test_sampler__resumed_at_any_step_goes_on_as_if_never_stopped(length, seed, batch_size, done, left):
    whole = list(ResumableSampler(length, batch_size, seed, stop_step=done + left))
    resumed = ResumableSampler(length, batch_size, seed, start_step=done, stop_step=done + left)
    assert list(resumed) == whole[done:]
    assert len(resumed) == left
    later = ResumableSampler(length, batch_size, seed, stop_step=done + left)
    later.set_step(done)
    assert list(later) == whole[done:]


@given(lengths, seeds, st.integers(1, 4), st.integers(1, 4), small)
def test_sampler__processes_together_see_the_batches_of_a_single_one(length, seed, local, num_processes, step):
    batch_size = local * num_processes
    parts = [
        ResumableSampler(length, batch_size, seed, rank=rank, num_processes=num_processes).batch(step)
        for rank in range(num_processes)
    ]
    assert [draw for part in parts for draw in part] == ResumableSampler(length, batch_size, seed).batch(step)
    assert {len(part) for part in parts} == {local}


def test_sampler__without_a_last_step_it_does_not_end_and_has_no_length():
    sampler = ResumableSampler(3, 2, 0)
    batches = iter(sampler)
    assert len([next(batches) for _ in range(20)]) == 20
    with pytest.raises(TypeError, match="no length"):
        len(sampler)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 0}, "dataset length must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"start_step": -1}, "step must be a whole number of at least 0, got -1"),
        ({"stop_step": 1.5}, "stop_step must be a whole number of at least 0, got 1.5"),
        ({"rank": 2, "num_processes": 2}, "rank must be from 0 to 1, got 2"),
        ({"num_processes": 3}, "must be a multiple of the 3 processes, got 4"),
    ],
)
def test_sampler__impossible_numbers_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        ResumableSampler(**{"length": 5, "batch_size": 4, "seed": 0, **changes})


# ----------------------------------------------------------------------------------------------------- augmentation


def test_training_set__gives_a_normalised_image_and_its_mask():
    item = training_set()[0]
    assert item["image"].shape == (3, 8, 10)
    assert item["image"].dtype == torch.float32
    assert item["image"].abs().max() <= 1.0
    assert item["mask"].shape == (8, 10)
    assert item["mask"].dtype == torch.int64
    assert set(item["mask"].unique().tolist()) <= {0, 1, 2, 255}
    assert item["name"] == "tiny0"


def test_training_set__augmentation_depends_on_seed_epoch_and_index_alone():
    first = training_set()
    first[3], first[1]  # what was asked before plays no part
    assert same(first[Draw(2, 1)], training_set()[Draw(2, 1)])
    assert not same(first[Draw(2, 1)], first[Draw(3, 1)])
    assert not same(first[Draw(2, 1)], training_set(seed=8)[Draw(2, 1)])


def test_training_set__a_plain_index_means_the_epoch_that_was_set():
    items = training_set()
    assert len(items) == 5
    assert same(items[1], items[Draw(0, 1)])
    items.set_epoch(4)
    assert same(items[1], items[Draw(4, 1)])


def test_augmentation_rng__no_two_of_seed_epoch_index_share_their_numbers():
    drawn = {augmentation_rng(s, e, i).random() for s in range(4) for e in range(4) for i in range(4)}
    assert len(drawn) == 64


@pytest.mark.parametrize("seed", [-1, 1.0, None, True])
def test_training_set__an_impossible_seed_is_refused(seed):
    with pytest.raises(ConfigError, match="seed must be a whole number of at least 0, got "):
        training_set(seed=seed)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader__batches_are_the_same_with_and_without_workers_and_after_a_resume(workers):
    def batches(start: int, workers: int) -> list:
        sampler = ResumableSampler(5, 4, 7, start_step=start, stop_step=4)
        loader = DataLoader(training_set(), batch_sampler=sampler, collate_fn=collate_training, num_workers=workers)
        return list(loader)

    whole, resumed = batches(0, 0), batches(2, workers)
    assert whole[0]["image"].shape == (4, 3, 8, 10)
    assert whole[0]["mask"].shape == (4, 8, 10)
    assert len(whole[0]["name"]) == 4
    assert [same(a, b) for a, b in zip(whole[2:], resumed)] == [True, True]


# ------------------------------------------------------------------------------------------------------- collation


def test_collate_training__images_of_different_sizes_are_refused():
    items = TrainingSet(TinyDataset(), Compose(()), Preprocessing(), 0)
    with pytest.raises(DataError, match=r"sizes \[\(12, 16\), \(12, 17\)\].*Pad or Resize"):
        collate_training([items[0], items[1]])


def test_evaluation__images_go_through_preprocessing_and_masks_keep_their_size():
    items = EvaluationSet(TinyDataset(), Preprocessing(resize=6))
    batch = collate_evaluation([items[k] for k in range(len(items))])
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 6, round(w / 2 + 0.01)) for w in range(16, 21)]
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(12, w) for w in range(16, 21)]
    assert batch["name"] == [f"tiny{k}" for k in range(5)]


# ----------------------------------------------------------------------------------------------------------- cache


def test_cached__decodes_each_image_once():
    dataset = TinyDataset()
    cached = Cached(dataset).preload()
    for index in (0, 4, -1, 0):
        assert np.array_equal(cached[index].mask, dataset[index % 5].mask)
    assert len(cached) == 5
    assert cached.labels == LABELS
    assert dataset.reads == [3, 1, 1, 1, 3]  # one by the cache, the others by this test
    assert [sample.name for sample in cached] == [f"tiny{k}" for k in range(5)]


def test_cached__stops_keeping_at_its_limit_and_goes_on_reading():
    dataset = TinyDataset()
    cached = Cached(dataset, max_bytes=2 * 4 * 12 * 17).preload()
    for index in range(5):
        cached[index]
    assert dataset.reads == [1, 1, 2, 1, 1]


def test_cached__what_is_kept_cannot_be_written_to():
    sample: Sample = Cached(TinyDataset())[0]
    with pytest.raises(ValueError, match="read-only"):
        sample.mask[0, 0] = 1


def test_cached__gives_the_same_training_images():
    plain = TrainingSet(TinyDataset(), training_transform((8, 10)), Preprocessing(), 3)
    kept = TrainingSet(Cached(TinyDataset()), training_transform((8, 10)), Preprocessing(), 3)
    for epoch in range(4):
        assert same(plain[Draw(epoch, 2)], kept[Draw(epoch, 2)])


def test_spread__takes_samples_from_all_of_a_dataset() -> None:
    names = [sample.name for sample in Spread(TinyDataset(10), 4)]
    assert names == ["tiny0", "tiny2", "tiny5", "tiny7"]
    assert len(Spread(TinyDataset(3), 100)) == 3
    with pytest.raises(IndexError):
        _ = Spread(TinyDataset(10), 4)[4]
