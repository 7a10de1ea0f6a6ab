"""Plans priced by time: tables from parts and factors, and searches that follow them. No real clock is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.calibration.test_plans import survey_of
from tests.helpers import tiny_segmenter
from tokenexit.calibration import clock as module
from tokenexit.calibration.clock import Clock, TimeTable
from tokenexit.calibration.latency import Curve, Latency
from tokenexit.calibration.plans import Plan, choose_plan, priced_by, search_plans, try_plan
from tokenexit.calibration.survey import Survey
from tokenexit.calibration.targets import Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Resized

BY_TOKENS = Latency(Curve(0.0, 1.0, 0.0), (Curve(0.0, 0.1, 0.0),) * 3)
"""A machine on which a block takes a millisecond a token, and an exit a tenth of it."""
BY_CALLS = Latency(Curve(5.0, 0.0, 0.0), (Curve(5.0, 0.0, 0.0),) * 3)
"""A machine on which tokens cost nothing and every call, of a block or of an exit, takes the same."""


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that prices a survey on a machine whose clock shows what its parts take, times a factor."""

    def price(latency: Latency, factor: float = 1.0, survey: Survey | None = None) -> Survey:
        survey = survey_of(scales=(1.0, 0.5)) if survey is None else survey
        monkeypatch.setattr(module, "latency_on_this_machine", lambda *_: latency)

        def timed(images: Any, runs: Sequence[Any], count: int, title: str = "") -> list[list[float]]:
            return [
                [factor * ms(latency, model, method, images, i) for i in images.spread(count)] for model, method in runs
            ]

        monkeypatch.setattr(module, "timed_in_turn", timed)
        return survey.by_the_clock()

    return price


def ms(latency: Latency, model: Any, method: Any, images: Any, position: int) -> float:
    """Milliseconds of one image from the live counts of a run, added up block by block."""
    image = model.preprocessing.to_tensor(images.data[images.indices[position]].image)
    with torch.no_grad():
        ledger = model.segment([image], method, targets=[(1, 1)]).ledger
    after, exits = ledger.live_after(model.config.exits, 0), model.config.exits
    last = method.last_exit
    live, total = ledger.tokens[0], 0.0
    for block in range(1, model.config.backbone.depth + 1):
        total += latency.block(live)
        if block in exits:
            total += latency.exits[exits.index(block)](live)
            live = after[exits.index(block)]
            if last == exits.index(block):
                break
    return total + latency.rest(float(ledger.tokens[0]))


@given(
    live=st.lists(st.tuples(*[st.integers(0, 50)] * 4), min_size=1, max_size=4),
    numbers=st.sets(st.integers(0, 2), min_size=1).map(sorted),
    factor=st.floats(0.5, 2.0),
    stops=st.booleans(),
)
def test_table__is_the_sum_of_its_parts(live: Any, numbers: list[int], factor: float, stops: bool) -> None:
    latency = Latency(Curve(1.0, 0.5, 0.01), tuple(Curve(0.1 * n, 0.2, 0.0) for n in range(3)), Curve(2.0, 0.1, 0.0))
    dense = torch.arange(1.0, len(live) + 1).double()
    whole = TimeTable(latency, (1, 3, 4), 6, None, dense, factor)
    last = len(numbers) - 1 if stops else None
    table = whole.at_exits(numbers, last)
    exits = [whole.exits[n] for n in numbers]
    expected = []
    for row in live:
        total, count = latency.rest(float(row[0])), 0
        for block in range(1, 7):
            total += latency.block(float(row[count]))
            if block in exits:
                n = exits.index(block)
                total += latency.exits[numbers[n]](float(row[n]))
                count = n + 1
                if last == n:
                    break
        expected.append(total)
    counts = torch.tensor([row[: len(numbers) + 1] for row in live])
    assert table.ms(counts).tolist() == pytest.approx(expected)
    assert table.share(counts) == pytest.approx(factor * sum(expected) / dense.sum().item())
    assert table.first(1).share(counts[:1]) == pytest.approx(factor * expected[0])


def test_clock__learns_from_dense_runs_by_what_each_size_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    survey = survey_of(scales=(1.0, 0.5))
    monkeypatch.setattr(module, "latency_on_this_machine", lambda *_: BY_TOKENS)

    def timed(images: Any, runs: Sequence[Any], count: int, title: str = "") -> list[list[float]]:
        return [[30.0 if isinstance(method, Resized) else 90.0] * len(images.spread(count)) for _, method in runs]

    monkeypatch.setattr(module, "timed_in_turn", timed)
    found = survey.by_the_clock()
    assert found.clock is not None
    assert found.clock.dense_ms == pytest.approx(90.0, rel=0.2)  # images are of two sizes, and all are counted
    prices = found.static_prices
    assert prices[1.0][-1] == pytest.approx(1.0)
    assert prices[0.5][-1] == pytest.approx(30.0 / 90.0)


def test_clock__leaves_the_survey_in_multiply_adds_as_it_is(on: Any) -> None:
    survey = survey_of(scales=(1.0, 0.5))
    before = search_plans(survey, 0.5)
    timed = on(BY_CALLS, survey=survey)
    assert survey.clock is None
    assert search_plans(survey, 0.5) == before
    assert timed.static_costs == survey.static_costs
    assert timed.static_prices != survey.static_prices


def test_search__where_calls_cost_and_tokens_do_not_stops_everybody(on: Any) -> None:
    survey = on(BY_CALLS)
    plans = search_plans(survey, 0.8)  # 4 blocks: one exit and a stop after 3 take 4 calls, a stop after 2 takes 3
    assert plans
    assert all(plan.stop == 2 or plan.stop == 1 for plan in plans)
    assert not any(plan.exits for plan in plans)
    assert any(plan.exits for plan in search_plans(survey_of(scales=(1.0, 0.5)), 0.8))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_choose__keeps_within_the_time_that_runs_take(on: Any, factor: float) -> None:
    survey = survey_of(scales=(1.0, 0.5))
    plain = on(BY_TOKENS, factor, survey)
    assert plain.clock is not None
    priced, share = priced_by(survey, Budget("latency_ms", 0.6 * plain.clock.dense_ms))
    assert share == pytest.approx(0.6)
    found = choose_plan(priced, share)
    for one in found:
        images = replace(survey.images, model=survey.model.with_exits(one.plan.places))
        spent = sum(ms(BY_TOKENS, images.model, one.method, images, i) for i in range(len(images)))
        bare = images.model.with_exits(())
        dense = sum((ms(BY_TOKENS, bare, module.Dense(), images, i) for i in range(len(images))), 0.0)
        assert one.plan.price == pytest.approx(spent / dense, rel=1e-6)
        assert spent / dense <= 0.6 + 1e-6


def test_try_plan__of_a_static_plan_that_takes_longer_than_predicted_is_smaller(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = on(BY_TOKENS)
    monkeypatch.setattr(
        Clock, "share_of", lambda _clock, _images, method, *_: 0.3 if isinstance(method, Resized) else 0.9
    )
    one = try_plan(survey, Plan(stop=2), 0.6, "stop alone")
    assert one is not None
    assert (one.plan.scale, one.plan.stop, one.plan.price) == (0.5, 2, 0.3)
    assert try_plan(survey, Plan(stop=2), 0.2, "stop alone") is None


def test_budgets__of_each_unit_are_shares_of_dense(on: Any) -> None:
    survey = survey_of(scales=(1.0, 0.5))
    dense: Tensor = survey.costs[1.0].dense
    gmacs = dense.sum().item() / len(survey.images) / 1e9
    assert priced_by(survey, Budget("budget", 0.5)) == (survey, 0.5)
    assert priced_by(survey, Budget("budget_gmacs", 0.5 * gmacs))[1] == pytest.approx(0.5)


def test_clock__out_of_reach_says_milliseconds(on: Any) -> None:
    survey = on(BY_CALLS)
    assert survey.clock is not None
    with pytest.raises(ConfigError, match=r"latency_ms=2 is out of reach: the cheapest plan takes .* ms here"):
        choose_plan(survey, 2.0 / survey.clock.dense_ms)


def test_clock__of_a_model_with_windows_is_refused() -> None:
    model = tiny_segmenter("linear", exits=(1, 2))
    model.preprocessing = replace(model.preprocessing, window=(11, 14), stride=(7, 9))
    with pytest.raises(ConfigError, match="this model takes windows: ask for a budget"):
        survey_of(model, count=4).by_the_clock()
