"""Auto-gating: exits that do not pay are closed, by size and machine alone, and the reasons can be read."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.test_cli import fine, wrong
from tests.heads.test_eomt import eomt
from tokenexit.calibration import gating, latency
from tokenexit.calibration.gating import choose_exits, gate, gated_by_size
from tokenexit.calibration.latency import (
    Curve,
    Latency,
    latency_on_this_machine,
    measure_latency,
    nonnegative_fit,
)
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.methods import Dense, DoViT, DToP, FixedRatio, Gated, GatedBySize, Resized, Truncated
from tokenexit.segmenter import ExitSegmenter

milliseconds = st.floats(0.0, 10.0)
curves = st.builds(Curve, milliseconds, st.floats(0.0, 0.1), st.floats(0.0, 1e-3))


@pytest.fixture
def model() -> ExitSegmenter:
    torch.manual_seed(0)
    return ExitSegmenter("vit_tiny_patch16", 4, [1, 2], embed_dim=32, num_heads=2, depth=3).eval()


def block_by_block(
    costs: Latency, opened: set[int], exits: list[int], depth: int, tokens: int, live: list[float]
) -> float:
    """Oracle: walk through the blocks with whoever is live."""
    share, ms = 1.0, 0.0
    for block in range(depth):
        if block in exits and exits.index(block) in opened:
            n = exits.index(block)
            ms += costs.exits[n](share * tokens)
            share = live[n]
        ms += costs.block(share * tokens)
    return ms


@given(
    curves, st.tuples(curves, curves, curves), st.integers(1, 2000), st.lists(st.floats(0, 1), min_size=3, max_size=3)
)
def test_choose_exits__takes_the_fastest_of_all_sets(
    block: Curve, exits: tuple[Curve, ...], tokens: int, live: list[float]
) -> None:
    costs, live = Latency(block, exits), sorted(live, reverse=True)
    chosen = choose_exits(costs, [3, 6, 9], 12, tokens, live)

    def oracle(opened: set[int]) -> float:
        return block_by_block(costs, opened, [3, 6, 9], 12, tokens, live)

    times = [oracle({n for n in range(3) if keep[n]}) for keep in product([False, True], repeat=3)]
    assert chosen.expected_ms == pytest.approx(min(times))
    assert oracle(set(range(3)) - set(chosen.closed)) == pytest.approx(min(times))
    assert (chosen.dense_ms, chosen.open_ms) == (pytest.approx(oracle(set())), pytest.approx(oracle({0, 1, 2})))


@given(
    curves,
    st.tuples(curves, curves, curves),
    st.integers(1, 2000),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_choose_exits__leaves_the_exit_open_where_the_network_ends_and_counts_nothing_behind_it(
    block: Curve, exits: tuple[Curve, ...], tokens: int, live: list[float], last: int
) -> None:
    costs, live, after = Latency(block, exits), sorted(live, reverse=True), [3, 6, 9]
    chosen = choose_exits(costs, after, 12, tokens, live, last)

    def oracle(opened: set[int]) -> float:
        whole = block_by_block(costs, opened, after[: last + 1], after[last], tokens, live)
        share = live[max(opened)] if opened else 1.0
        return whole + exits[last](share * tokens)

    times = [oracle({n for n in range(last) if keep[n]}) for keep in product([False, True], repeat=last)]
    assert chosen.expected_ms == pytest.approx(min(times))
    assert set(chosen.closed) <= set(range(last))
    assert oracle(set(range(last)) - set(chosen.closed)) == pytest.approx(min(times))
    assert chosen.dense_ms == pytest.approx(12 * block(tokens))
    assert chosen.reasons[-1].endswith(f"on {tokens} tokens: open, as the method stops there")


def test_latency__of_a_method_that_stops_is_that_of_the_network_up_to_it() -> None:
    costs = Latency(Curve(1, 1, 0), (Curve(10, 0, 0), Curve(100, 0, 0)), Curve(1000, 0, 0))
    live = torch.tensor([[4, 2, 0]])
    assert costs.ms(live, (1, 3), 4).tolist() == [1000 + 5 + 10 + 2 * 3 + 100 + 1]
    assert costs.ms(live, (1, 3), 4, last=1).tolist() == [1000 + 5 + 10 + 2 * 3 + 100]
    assert costs.ms(live, (1, 3), 4, last=0).tolist() == [1000 + 5 + 10]


def test_choose_exits__keeps_cheap_exits_and_closes_dear_ones() -> None:
    block, cheap, dear = Curve(0, 0.01, 0), Curve(0.1, 0, 0), Curve(50.0, 0, 0)
    chosen = choose_exits(Latency(block, (cheap, dear)), [3, 6], 12, 1000, [0.5, 0.2])
    assert chosen.closed == (1,)
    first, second = chosen.reasons
    until = "an image is expected to take"
    assert first == f"exit 1 after block 3 takes 0.10 ms on 1000 tokens: open, as without it {until} 44.90 ms longer"
    assert second == f"exit 2 after block 6 takes 50.00 ms on 1000 tokens: closed, as with it {until} 32.00 ms longer"


def test_choose_exits__takes_an_exit_behind_every_block_of_a_large_backbone() -> None:
    depth, block, nothing, dear = 40, Curve(0, 0.01, 0), Curve(0, 0, 0), Curve(1e3, 0, 0)
    exits, live = list(range(1, depth)), [1 - n / depth for n in range(1, depth)]
    costs = Latency(block, tuple(dear if n % 3 == 0 else nothing for n in exits))
    assert choose_exits(costs, exits, depth, 400, live).closed == tuple(n - 1 for n in exits if n % 3 == 0)


def test_choose_exits__leaves_an_exit_open_that_makes_no_difference() -> None:
    nothing = Curve(0, 0, 0)
    assert choose_exits(Latency(nothing, (nothing,)), [3], 12, 1000, [0.5]).closed == ()


@given(st.tuples(milliseconds, st.floats(0, 0.1), st.floats(0, 1e-3)).filter(lambda abc: sum(abc) > 1e-3))
def test_curve__goes_through_points_of_such_a_curve(abc: tuple[float, float, float]) -> None:
    curve, counts = Curve(*abc), [36, 144, 576, 1600]
    found = Curve.through(counts, [curve(n) for n in counts])
    for n in (36, 300, 1600):
        assert found(n) == pytest.approx(curve(n), rel=1e-4)


def test_nonnegative_fit__lets_no_coefficient_below_zero() -> None:
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    features = torch.stack([torch.ones(4).double(), counts], 1).numpy()
    slope_down = nonnegative_fit(features, (10 - 2 * counts).numpy())
    assert min(slope_down) >= 0
    assert slope_down[1] == 0


def test_measure_latency__times_the_block_and_every_exit(model: ExitSegmenter) -> None:
    costs = measure_latency(model, DToP())
    assert len(costs.exits) == 2
    for curve in (costs.block, *costs.exits):
        assert 0 < curve(36) <= curve(1600)


def test_latency_on_this_machine__are_measured_once_for_a_model_method_and_precision(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(*asked: object) -> Latency:
        calls.append(asked[1:])
        return Latency(Curve(1, 2, 3), (Curve(0, 0, 1), Curve(0, 1, 0)))

    monkeypatch.setattr(latency, "measure_latency", measure)
    first = latency_on_this_machine(model, DToP())
    assert latency_on_this_machine(model, DToP(threshold=0.5)) == first
    assert len(calls) == 1
    latency_on_this_machine(model, DToP(), "bf16")
    assert len(calls) == 2
    for kept in (tmp_path / "tokenexit" / "latency").iterdir():
        kept.write_text("{")  # damaged: measured again
    assert latency_on_this_machine(model, DToP()) == first
    assert len(calls) == 3


@pytest.mark.parametrize(
    "poison",
    [
        "[" * 100_000,
        '{"block": [1, 2, 3], "exits": []}',
        '{"block": ["x", 2, 3], "exits": [[1, 2, 3], [1, 2, 3]]}',
        '{"block": [1e999, 2, 3], "exits": [[1, 2, 3], [1, 2, 3]]}',
        '{"block": [-1, 2, 3], "exits": [[1, 2, 3], [1, 2, 3]]}',
        '{"block": [1, 2], "exits": [[1, 2, 3], [1, 2, 3]]}',
        '{"block": [1, 2, 3], "exits": [[1, 2, 3], 7]}',
        "[]",
        "null",
    ],
)
def test_latency_on_this_machine__what_is_no_measurement_is_measured_again(
    poison: str, model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = Latency(Curve(1, 2, 3), (Curve(0, 0, 1), Curve(0, 1, 0)))
    monkeypatch.setattr(latency, "measure_latency", lambda *_: costs)
    assert latency_on_this_machine(model, DToP()) == costs
    (kept,) = (tmp_path / "tokenexit" / "latency").iterdir()
    kept.write_text(poison)
    assert latency_on_this_machine(model, DToP()) == costs
    assert '"block": [1, 2, 3]' in kept.read_text()


def test_gate__follows_the_shares_that_the_calibration_saw(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = Latency(Curve(0, 1, 0), (Curve(10, 0, 0), Curve(10, 0, 0)))
    monkeypatch.setattr(latency, "measure_latency", lambda *_: costs)
    assert gate(model, DToP(), (10, 10)).closed == ()  # a third of 100 tokens leaves, and again: 67 ms, 22 ms saved
    model.calibration = Calibration(reached={"live_after_exit": [0.99, 0.1]})
    assert gate(model, DToP(), (10, 10)).closed == (0,)
    model.calibration = Calibration(reached={"live_after_exit": [1.0, 0.99]})
    assert gate(model, DToP(), (10, 10)).closed == (0, 1)


def test_apply__wraps_only_where_exits_are_closed(model: ExitSegmenter) -> None:
    nothing = Curve(0, 0, 0)
    method = DToP()
    assert choose_exits(Latency(nothing, (nothing,)), [1], 3, 9, [0.5]).apply(method) is method
    closed = choose_exits(Latency(nothing, (Curve(1, 0, 0),)), [1], 3, 9, [0.5])
    assert closed.apply(method) == Gated(method, (0,))


def test_gate__counts_joint_blocks_that_dtop_spares_tokens_and_dovit_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last block of the backbone DoViT has nothing left to save, and DToP the two blocks of the head."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = Latency(Curve(0, 1, 0), (Curve(0, 0.1, 0), Curve(0, 0.1, 0)))
    monkeypatch.setattr(latency, "measure_latency", lambda *_: costs)
    masks = eomt(exits=(1, 4))
    spared = gate(masks, DToP(), (12, 12))
    assert spared.closed == ()
    assert spared.dense_ms == 6 * 144
    assert gate(masks, DoViT(), (12, 12)).closed == (1,)


@pytest.mark.parametrize(("method", "rest"), [(DToP(), 4.0), (DoViT(), 6.0)], ids=["DToP", "DoViT"])
def test_measure_latency__what_is_not_spared_is_the_rest(
    method: Any, rest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten milliseconds and one for a block, six blocks see DToP's live tokens, and four DoViT's."""
    masks = eomt(exits=(1, 4))

    def whole_or_part(call: Any, device: Any) -> float:
        return 10.0 if getattr(call, "func", None) is masks else 1.0

    monkeypatch.setattr(latency, "median_ms", whole_or_part)
    assert measure_latency(masks, method).rest(100.0) == pytest.approx(rest, rel=1e-6)


def test_gate__is_a_command_that_says_why(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        latency, "measure_latency", lambda *_: Latency(Curve(0, 1, 0), (Curve(1, 0, 0), Curve(1e3, 0, 0)))
    )
    model.save_pretrained(tmp_path / "model")
    text = fine(capsys, "gate", tmp_path / "model", "--image-size", 96, 160, "--method", "dtop")
    first, second, total = text.splitlines()
    assert first.startswith("exit 1 after block 1 takes 1.00 ms on 60 tokens: open")
    assert second.startswith("exit 2 after block 2 takes 1000.00 ms on 60 tokens: closed")
    assert total.endswith("with none 180.0")
    assert "has 3 numbers" in wrong(capsys, "gate", tmp_path / "model", "--image-size", 1, 2, 3)
    assert wrong(capsys, "gate", tmp_path / "model") == (
        "dense has no exits to close, and this model is not calibrated: calibrate it, or name --method."
    )


def test_gated_by_size__closes_what_gate_closes_at_every_size(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = Latency(Curve(0, 0.01, 1e-4), (Curve(1, 0, 0), Curve(3, 1e-3, 0)))
    monkeypatch.setattr(latency, "measure_latency", lambda *_: costs)
    method = gated_by_size(model, DToP())
    assert isinstance(method, GatedBySize)
    seen = set()
    for grid in ((1, 1), (3, 4), (5, 5), (9, 9), (10, 12), (16, 16), (20, 23), (32, 32), (64, 64), (300, 300)):
        found = gate(model, DToP(), grid)
        assert method.for_grid(grid) == found.apply(DToP())
        seen.add(found.closed)
    assert {(0, 1), ()} <= seen
    assert gated_by_size(model, Resized(DToP(), 0.5)) == Resized(method, 0.5)  # gates see the resized images


def test_gated_by_size__leaves_what_has_no_gates_and_what_always_pays(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        latency, "measure_latency", lambda *_: Latency(Curve(0, 1, 0), (Curve(0, 0, 0), Curve(0, 0, 0)))
    )
    for method in (DToP(), Dense(), FixedRatio(ratios=(0.5, 0.2)), Truncated()):
        assert gated_by_size(model, method) is method


@given(st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([(), (0,), (1,), (0, 1)])), max_size=6))
def test_changes__says_what_is_closed_at_every_number_of_patches(steps: list[tuple[int, tuple[int, ...]]]) -> None:
    # apart enough for steps of 5 % to see each
    apart = [step for n, step in enumerate(sorted(steps)) if n == 0 or step[0] > 1.2 * sorted(steps)[n - 1][0]]

    def closed(tokens: int) -> tuple[int, ...]:
        return next((numbers for start, numbers in reversed(apart) if start <= tokens), ())

    method = GatedBySize(DToP(), tuple(gating.changes(closed)))
    for tokens in {1, 4999, 5001} | {start + d for start, _ in apart for d in (-1, 0, 1) if start + d > 0}:
        expected = closed(tokens)
        assert method.for_grid((1, tokens)) == (Gated(DToP(), expected) if expected else DToP())


def test_latency__counts_heads_on_all_patches_where_a_method_scores_the_grid() -> None:
    costs = Latency(Curve(1, 1, 0), (Curve(0, 10, 0), Curve(0, 100, 0)), scored_on_grid=True)
    live = torch.tensor([[4, 2, 0]])
    assert costs.ms(live, (1, 3), 4).tolist() == [5 + 10 * 4 + 2 * 3 + 100 * 4 + 1]


def test_choose_exits__closes_a_late_exit_whose_head_still_sees_all_patches() -> None:
    block, cheap, dear = Curve(0, 1e-3, 0), Curve(0, 1e-4, 0), Curve(0, 5e-3, 0)
    live = [0.5, 0.05]
    assert choose_exits(Latency(block, (cheap, dear)), [3, 6], 12, 1000, live).closed == ()
    assert choose_exits(Latency(block, (cheap, dear), scored_on_grid=True), [3, 6], 12, 1000, live).closed == (1,)


@pytest.mark.parametrize(("method", "on_grid"), [(DToP(0.9), False), (DoViT(0.9), True)], ids=repr)
def test_latency_on_this_machine__knows_who_scores_the_grid(
    model: ExitSegmenter, method: DToP | DoViT, on_grid: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    curve = Curve(0, 1, 0)
    monkeypatch.setattr(latency, "measure_latency", lambda *_: Latency(curve, (curve,) * 2, curve))
    first, cached = (latency_on_this_machine(model, method) for _ in range(2))
    assert first.scored_on_grid is cached.scored_on_grid is on_grid
