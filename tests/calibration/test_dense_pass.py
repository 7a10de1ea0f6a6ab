"""Exits and costs composed from a dense pass, against a slow oracle and against true runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import SOFTMAX_TOKEN_HEADS, tiny_segmenter
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, true_run
from tokenexit.calibration.dense_pass import DensePass, MacTable, compose, live_counts, sampled, with_thresholds
from tokenexit.calibration.threshold_path import build_path
from tokenexit.data.base import Sample
from tokenexit.errors import ConfigError
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.methods import Dense, DoViT, DToP, Resized
from tokenexit.methods.paumer import PAUMER
from tokenexit.methods.reference import PrescribedExits

CLASSES = 5


class Noise:
    """Images of noise, of two sizes in turn, whose truth is noise as well."""

    def __init__(self, count: int, sizes: tuple[tuple[int, int], ...] = ((16, 20), (12, 24))) -> None:
        self.count, self.sizes = count, sizes
        self.labels: Labels = default_labels(CLASSES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng(index)
        size = self.sizes[index % len(self.sizes)]
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        return Sample(image, rng.integers(0, CLASSES, size), f"noise-{index}")


def calibration_set(count: int = 6, **model: Any) -> CalibrationSet:
    return CalibrationSet(tiny_segmenter(**model), Noise(count), tuple(range(count)))


def oracle(dense: DensePass, method: Any, limits: tuple[float, ...]) -> list[int]:
    """Token by token and image by image, from the words of the rules."""
    exits, exit_index, first = len(limits), [], 0
    for h, w in dense.grids:
        cells = range(first, first + h * w)
        left = dict.fromkeys(cells, exits)
        named: dict[int, int] = {}
        for n in range(exits):
            live = [i for i in cells if left[i] == exits]
            sure = [i for i in live if dense.uncertainty[n][i].item() < limits[n]]
            if isinstance(method, DoViT) and method.min_improvement is not None and n > 0:
                grown = {i: dense.uncertainty[n - 1][i].item() - dense.uncertainty[n][i].item() for i in live}
                sure = [i for i in live if i in sure or grown[i] < method.min_improvement]
            named |= {i: int(dense.label[n][i]) for i in live}
            if method.boundary_guard:
                sure = [i for i in sure if all(named[i] == named[j] for j in beside(i, first, h, w))]
            if isinstance(method, DToP):
                for c in range(dense.num_classes):
                    own = sorted(
                        (i for i in sure if dense.label[n][i] == c), key=lambda i: (dense.uncertainty[n][i], i)
                    )
                    sure = [i for i in sure if i not in own[: method.keep_per_class]]
            if method.cap is not None:
                going = sorted((i for i in live if i not in sure), key=lambda i: (-dense.uncertainty[n][i], i))
                sure += going[int(method.cap[n] * h * w + 1e-9) :]
            left |= dict.fromkeys(sure, n)
        exit_index += [left[i] for i in cells]
        first += h * w
    return exit_index


def beside(i: int, first: int, h: int, w: int) -> list[int]:
    row, column = divmod(i - first, w)
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [first + r * w + c for r, c in around if 0 <= r < h and 0 <= c < w]


def random_pass(seed: int, exits: int = 3, grids: tuple[tuple[int, int], ...] = ((3, 4), (1, 1), (2, 5))) -> DensePass:
    """Few distinct doubts, so that ties are common."""
    rng = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in grids)
    uncertainty = torch.randint(0, 9, (exits, cells), generator=rng).half() / 8
    label = torch.randint(0, 3, (exits, cells), generator=rng).short()
    said = torch.randint(0, 3, (exits + 1, cells, 4), generator=rng).to(torch.uint8)
    return DensePass.made(uncertainty, label, said, grids, 3)


limits_of_three = st.tuples(*[st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.7, 1.0])] * 3)
caps = st.none() | st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 1.0])] * 3)


@given(st.integers(0, 10**6), limits_of_three, st.integers(0, 3), caps, st.booleans())
def test_compose__equals_the_oracle_for_dtop(seed: int, limits: Any, k: int, cap: Any, guard: bool) -> None:
    dense, method = random_pass(seed), DToP(keep_per_class=k, cap=cap, boundary_guard=guard)
    assert compose(dense, method, limits).tolist() == oracle(dense, method, limits)


@given(st.integers(0, 10**6), limits_of_three, st.none() | st.sampled_from([-0.2, 0.1]), caps, st.booleans())
def test_compose__equals_the_oracle_for_dovit(
    seed: int, limits: Any, delta: float | None, cap: Any, guard: bool
) -> None:
    dense, method = random_pass(seed), DoViT(min_improvement=delta, cap=cap, boundary_guard=guard)
    assert compose(dense, method, limits).tolist() == oracle(dense, method, limits)


@given(st.integers(0, 10**6), limits_of_three, st.integers(0, 3), caps, st.booleans(), st.integers(1, 3))
def test_compose__lets_all_leave_at_a_stop(seed: int, limits: Any, k: int, cap: Any, guard: bool, stop: int) -> None:
    dense, free = random_pass(seed), DToP(keep_per_class=k, cap=cap, boundary_guard=guard)
    expected = [min(exit, stop - 1) for exit in oracle(dense, free, limits)]
    assert compose(dense, replace(free, stop=stop), limits).tolist() == expected


@pytest.mark.parametrize("head", ["fcn", "atm"])
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("stop", [1, 2])
def test_mac_table__of_a_method_that_stops_is_the_ledger_of_its_run(head: str, stop: int, frozen: int) -> None:
    images = calibration_set(exit_head=head, num_registers=1)
    method = DToP(0.3, keep_per_class=1, stop=stop, frozen_context=frozen)
    run = true_run(images, method, dense_reference(images))
    grids = tuple(images.model.backbone.patch_embed.grid(*size) for size in ((16, 20), (12, 24)) * 3)
    costs = MacTable(images.model, method, grids)
    live = torch.cat([run.tokens[:, None], run.live], dim=1)
    assert torch.equal(costs.macs(live), run.macs)
    assert torch.equal(costs.dense, run.dense_macs)
    assert (run.live[:, stop - 1 :] == 0).all()
    behind = live.clone()
    behind[:, stop:] = 7  # what a table is told of tokens behind the stop costs nothing
    assert torch.equal(costs.macs(behind), run.macs)


def test_build_path__moves_no_limit_at_a_stop_or_behind_it() -> None:
    images = calibration_set(4, exits=(1, 2, 3))
    method = DToP(keep_per_class=1, stop=2)
    dense = DensePass.of(images, method)
    path = build_path(dense, method, lambda own: MacTable(images.model, method, own.grids), "pixels", torch.zeros(4))
    assert len(path) > 10
    assert (path.limits[-1] == torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)).all()
    only = replace(method, stop=1)
    path = build_path(dense, only, lambda own: MacTable(images.model, only, own.grids), "pixels", torch.zeros(4))
    assert (path.end, path.limits_at(0.0)) == (0.0, (0.0, 0.0, 0.0))


@pytest.mark.parametrize("method", [Dense(), DToP(0.3, keep_per_class=1, stop=2)], ids=repr)
def test_true_run__of_a_resized_method_costs_over_dense_at_full_size(method: Any) -> None:
    images = calibration_set()
    reference = dense_reference(images)
    run, whole = true_run(images, Resized(method, 0.6), reference), true_run(images, Dense(), reference)
    assert torch.equal(run.dense_macs, whole.macs)
    assert run.tokens.tolist() == [9, 8] * 3  # 10 x 12 and 7 x 14 pixels
    assert 0 < run.mac_ratio < whole.mac_ratio
    assert run.confusion.sum(dim=(1, 2)).tolist() == [16 * 20, 12 * 24] * 3


METHODS = [
    DToP(keep_per_class=1),
    DToP(keep_per_class=0, cap=(0.4,)),
    DoViT(),
    DoViT(cap=(0.6,)),
    DoViT(scoring="live"),
    DToP(keep_per_class=0, score="margin", temperature=1.5, boundary_guard=True),
    PAUMER(),
    DoViT(score="entropy", temperature=0.7, boundary_guard=True),
]


def middle_limit(dense: DensePass) -> float:
    """Between two doubts, so that rounding to half precision decides nothing."""
    uncertainties = dense.uncertainty[0].float().unique()
    gaps = uncertainties.diff()
    at = len(gaps) // 4 + int(gaps[len(gaps) // 4 : 3 * len(gaps) // 4].argmax())
    return float((uncertainties[at] + uncertainties[at + 1]) / 2)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_dense_pass__is_exact_at_the_first_exit(method: Any) -> None:
    images = calibration_set(exits=(2,))
    dense = DensePass.of(images, method)
    limits = (middle_limit(dense),)
    live = live_counts(dense, compose(dense, method, limits))
    run = true_run(images, with_thresholds(method, limits), dense_reference(images))
    assert live[:, 1].tolist() == run.live[:, 0].tolist()
    assert 0 < live[:, 1].sum() < live[:, 0].sum()
    costs = MacTable(images.model, method, dense.grids)
    assert costs.macs(live).tolist() == run.macs.tolist()
    assert costs.dense.tolist() == run.dense_macs.tolist()


@pytest.mark.parametrize("head", [*SOFTMAX_TOKEN_HEADS, "atm"])
@pytest.mark.parametrize(
    "method",
    [DToP(keep_per_class=2), DToP(keep_per_class=0, frozen_context=1), DoViT()],
    ids=["dtop", "all seen", "dovit"],
)
def test_costs__are_the_ledgers_for_the_counts_of_a_true_run(head: str, method: Any) -> None:
    if head == "atm" and method.name == "dovit":
        return
    images = calibration_set(3, exit_head=head)
    chosen = with_thresholds(method, (0.4, 0.3))
    run = true_run(images, chosen, dense_reference(images))
    live = torch.cat([run.tokens[:, None], run.live], 1)
    grids = DensePass.of(images, chosen).grids
    assert MacTable(images.model, chosen, grids).macs(live).tolist() == run.macs.tolist()


@pytest.mark.parametrize("method", [DToP(keep_per_class=2), DoViT()], ids=["dtop", "dovit"])
def test_costs__of_a_model_with_stage_adapters_are_the_ledgers(method: Any) -> None:
    images = calibration_set(3, exit_head="fcn", stage_adapter=True)
    chosen = with_thresholds(method, (0.4, 0.3))
    run = true_run(images, chosen, dense_reference(images))
    live = torch.cat([run.tokens[:, None], run.live], 1)
    assert live[:, -1].sum() < live[:, 0].sum()
    grids = DensePass.of(images, chosen).grids
    assert MacTable(images.model, chosen, grids).macs(live).tolist() == run.macs.tolist()


@pytest.mark.parametrize("decode", ["fcn", "setr_pup", "atm"])
def test_dense_pass__knows_the_dense_answer(decode: str) -> None:
    images = calibration_set(2, exit_head="atm" if decode == "atm" else "fcn", decode_head=decode)
    method = DToP() if decode == "atm" else DoViT()
    dense = DensePass.of(images, method)
    never = torch.full_like(dense.image, 2)
    assert dense.losses("pixels").gather(0, never[None]).sum() == 0
    if decode != "setr_pup":  # whose random weights name one class everywhere
        assert dense.losses("pixels")[0].sum() > 0
    assert dense.said.shape == (3, sum(h * w for h, w in dense.grids), 16)


def test_losses__count_samples_by_the_words_of_the_docstring() -> None:
    dense = random_pass(5)
    a, b = dense.said[0].long(), dense.said[-1].long()
    assert dense.losses("pixels")[0].sum().item() == pytest.approx((a != b).double().mean().item())
    counts = torch.bincount(b.flatten(), minlength=3).clamp(min=16)
    expected = sum((1 / counts[x] + 1 / counts[y]).item() / 6 for x, y in zip(a.flatten(), b.flatten()) if x != y)
    assert dense.losses("classes")[0].sum().item() == pytest.approx(expected, rel=1e-5)


def test_first__is_the_pass_of_the_first_images() -> None:
    images, method = calibration_set(4), DToP()
    whole, part = DensePass.of(images, method).first(2), DensePass.of(images.part([0, 1]), method)
    assert torch.equal(whole.uncertainty, part.uncertainty)
    assert torch.equal(whole.said, part.said)
    assert whole.grids == part.grids


def test_dense_pass__refuses_what_it_cannot_compose() -> None:
    with pytest.raises(ConfigError, match="method 'dense' has no thresholds"):
        DensePass.of(calibration_set(1), Dense())
    with pytest.raises(ConfigError, match="method 'imposed' has no thresholds"):
        DensePass.of(calibration_set(1), PrescribedExits())
    with pytest.raises(ConfigError, match="images decide for each other"):
        DensePass.of(calibration_set(1), DoViT(batch_mode="mean"))


# -------------------------------------------------------------------------------------------------------- true runs


def test_true_run__does_not_depend_on_how_images_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    images, method = calibration_set(5), DToP(threshold=0.6, keep_per_class=1)
    reference = dense_reference(images)
    together = true_run(images, method, reference)
    monkeypatch.setattr("tokenexit.calibration.calibration_set.BATCH_PIXELS", 1)
    singly = true_run(images, method, reference)
    assert torch.equal(together.macs, singly.macs)
    assert torch.equal(together.confusion, singly.confusion)
    assert torch.equal(together.histograms.counts, singly.histograms.counts)
    assert together.mac_ratio < 1.1


def test_error__pools_pixels_or_averages_over_the_classes_of_the_reference() -> None:
    confusion = torch.tensor([[[6, 2, 0], [1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 4, 0], [0, 0, 0]], [[0] * 3] * 3])
    assert error(confusion, "pixels").tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert error(confusion, "classes").tolist() == pytest.approx([(2 / 8 + 1 / 2) / 2, 0.0, 0.0])


def test_true_run__of_windows_counts_images() -> None:
    from dataclasses import replace

    images = calibration_set(3)
    images.model.preprocessing = replace(images.model.preprocessing, window=(12, 12), stride=(8, 8))
    method = DToP(threshold=0.6)
    run = true_run(images, method, dense_reference(images))
    assert len(run.macs) == len(run.histograms.counts) == 3
    assert (run.histograms.counts[:, 0].sum(1) == run.tokens).all()  # the first exit sees every token
    dense = DensePass.of(images, method)
    assert len(dense) > 3
    never = MacTable(images.model, method, dense.grids).share(torch.tensor([[h * w] * 3 for h, w in dense.grids]))
    assert never == pytest.approx(true_run(images, DToP(threshold=1.0), dense_reference(images)).mac_ratio)


# ------------------------------------------------------------------------------------------- other sizes, other wishes


def slowly_sampled(labels: torch.Tensor, grid: Any, size: tuple[int, int], patch: int) -> list[list[int]]:
    """Place by place: 4 x 4 of each token, row by row, where the network sees them, as a share of the image's sides."""
    found, (h, w) = [], labels.shape
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = []
            for i in range(4):
                for j in range(4):
                    y, x = (row + (i + 0.5) / 4) * patch / size[0], (column + (j + 0.5) / 4) * patch / size[1]
                    inside = y < 1 and x < 1
                    places.append(int(labels[int(y * h + 1e-4), int(x * w + 1e-4)]) if inside else -1)
            found.append(places)
    return found


@pytest.mark.parametrize("size", [(16, 20), (13, 26), (5, 3), (17, 17)])
@pytest.mark.parametrize("side", [(16, 20), (29, 41), (7, 100), (1, 1)])
@pytest.mark.parametrize("patch", [4, 6])
def test_sampled__equals_the_oracle_at_any_size_and_in_the_padding(
    size: tuple[int, int], side: tuple[int, int], patch: int
) -> None:
    labels = torch.randint(-1, 200, side)
    grid = tuple(-(-n // patch) for n in size)
    found = sampled(labels, grid, size, patch)  # type: ignore[arg-type]
    assert found.dtype == torch.int16
    assert found.tolist() == slowly_sampled(labels, grid, size, patch)


def test_dense_pass__that_is_asked_for_its_own_answers_is_the_one_without() -> None:
    images = calibration_set(4, exit_head="linear")  # patches of 4 pixels, which are the places themselves
    without = DensePass.of(images, DToP())
    maps = [labels for _, _, out in images.forward(Dense(), "dense") for labels in out.labels]
    asked = DensePass.of(images, DToP(), 1.0, maps)
    assert torch.equal(asked.wanted, without.wanted)
    for average in ("pixels", "classes"):
        assert torch.equal(asked.losses(average), without.losses(average))


def test_dense_pass__at_another_size_has_its_grids_and_is_compared_with_the_full_one() -> None:
    images = calibration_set(4, exit_head="linear")
    maps = [labels for _, _, out in images.forward(Dense(), "dense") for labels in out.labels]
    small = DensePass.of(images, DToP(), 0.5, maps)
    assert small.grids == ((2, 3), (2, 3)) * 2
    assert small.wanted.shape == (len(small.image), 16)
    run = true_run(images, Resized(Dense(), 0.5), dense_reference(images))
    predicted = small.losses("pixels")[-1].sum().item()
    assert predicted == pytest.approx(error(run.confusion, "pixels").mean().item(), abs=0.1)
    assert predicted > 0.05


@pytest.mark.parametrize("average", ["pixels", "classes"])
def test_losses__do_not_count_what_has_no_truth(average: str) -> None:
    dense = random_pass(0)
    half = dense.wanted.clone()
    half[::2] = -1
    found = replace(dense, wanted=half).losses(average)
    assert (found[:, ::2] == 0).all()
    other = dense.said.clone()
    other[:, ::2] = 2  # said where nothing counts
    assert torch.equal(replace(dense, wanted=half, said=other).losses(average), found)
    wrong = (dense.said[:, 1::2] != half[1::2]).float()
    if average == "pixels":
        assert torch.allclose(found.sum(1), wrong.mean((1, 2)))
    assert (replace(dense, wanted=torch.full_like(half, -1)).losses(average) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(("numbers", "stop"), [((0, 2), None), ((1, 2), 2), ((2,), 1), ((0, 1, 2), 3)])
def test_mac_table__of_some_exits_is_the_ledger_of_the_model_with_these_alone(
    scale: float, numbers: tuple[int, ...], stop: int | None
) -> None:
    images = calibration_set(exit_head="fcn", exits=(1, 2, 3), num_registers=1)
    few = replace(images, model=images.model.with_exits([images.model.config.exits[n] for n in numbers]))
    method = DToP(0.3, keep_per_class=1, stop=stop)
    run = true_run(few, method if scale == 1.0 else Resized(method, scale), dense_reference(images))
    full = DensePass.of(images, DToP()).grids
    grids = full if scale == 1.0 else DensePass.of(images, DToP(), scale).grids
    table = MacTable(images.model, DToP(), grids, full).at_exits(numbers, None if stop is None else stop - 1)
    live = torch.cat([run.tokens[:, None], run.live], dim=1)
    assert torch.equal(table.macs(live), run.macs)
    assert torch.equal(table.dense, run.dense_macs)
    assert table.share(live) == run.mac_ratio
    assert torch.equal(table.first(2).macs(live[:2]), run.macs[:2])
