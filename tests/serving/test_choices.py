"""The dial between all of the network for every token and as little as can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.live import small_model
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, Method, Reduced, Resized
from tokenexit.reducers import ALGM, MPM
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.choices import Choices, dial_position, dialled

LIMITS = st.floats(0.002, 0.9)


def thresholds(method: Method[Any]) -> tuple[Any, ...]:
    found: tuple[Any, ...] = method.threshold  # type: ignore[attr-defined]
    return found


def calibrated(model: ExitSegmenter, method: dict[str, Any]) -> ExitSegmenter:
    model.calibration = Calibration(model=model.fingerprint(), method=json.loads(json.dumps(method)))
    return model


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return small_model()


def test_dial__ends_where_nobody_leaves_and_where_everybody_does() -> None:
    assert thresholds(dialled(DToP(0.9), 1.0, 3)) == (1.0, 1.0, 1.0)
    assert thresholds(dialled(DToP((0.9, 0.8, 0.99)), 0.0, 3)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("method", [DToP(0.95), DoViT((0.98, 0.9)), PAUMER(), DToP(((0.9, 0.99), 0.8))])
def test_dial__at_a_methods_own_place_gives_its_thresholds(method: Method[Any]) -> None:
    from tokenexit.methods.thresholded import per_exit

    found = thresholds(dialled(method, dial_position(method, 2), 2))
    for own, wanted in zip(found, per_exit(thresholds(method), 2)):
        assert own == pytest.approx(wanted, abs=1e-6)


@given(LIMITS, LIMITS, st.floats(0, 1), st.floats(0, 1))
def test_dial__more_compute_never_lowers_a_threshold(a: float, b: float, x: float, y: float) -> None:
    method = DToP((1 - a, 1 - b))
    low, high = (dialled(method, at, 2) for at in sorted((x, y)))
    assert all(p <= q for p, q in zip(thresholds(low), thresholds(high)))


@given(LIMITS, st.floats(0.001, 0.999))
def test_dial__with_one_threshold_does_not_depend_on_where_it_was(limit: float, compute: float) -> None:
    (found,) = thresholds(dialled(DToP(1 - limit), compute, 1))
    (other,) = thresholds(dialled(DToP(0.97), compute, 1))
    assert found == pytest.approx(other, abs=0.02) or not 0.05 < dial_position(DToP(1 - limit), 1) < 0.95


def test_dial__an_exit_that_is_never_taken_stays_so_until_the_end() -> None:
    method = DToP((1.0, 0.9))
    assert thresholds(dialled(method, 0.2, 2))[0] == 1.0


def test_dial__keeps_what_else_the_method_has() -> None:
    moved = dialled(DToP(0.9, keep_per_class=2, boundary_guard=True), 0.3, 2)
    assert isinstance(moved, DToP)
    assert (moved.keep_per_class, moved.boundary_guard) == (2, True)


def test_choose__without_options_is_dense_on_an_uncalibrated_model_as_in_every_command(model: ExitSegmenter) -> None:
    assert Choices(model).choose(None) == Choices(model).usual == Dense()
    assert Choices(model).choose("dense", compute=0.3) == Dense()


def test_choose__takes_one_threshold_or_one_for_each_exit(model: ExitSegmenter) -> None:
    assert Choices(model).choose("dtop", "0.9") == DToP(0.9)
    assert Choices(model).choose("dovit", "0.9/0.8") == DoViT((0.9, 0.8))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "resnet"}, "method 'resnet' is unknown: choose one of dense, dtop"),
        ({"name": "dtop", "threshold": "much"}, "threshold must be a number, got 'much'"),
        ({"name": "dtop", "threshold": "1.5"}, "threshold must be in [0, 1], got 1.5"),
        ({"name": "dtop", "threshold": "0.9/0.8/0.7"}, "3 values for 2 exits"),
        ({"name": "dtop", "compute": 1.5}, "compute must lie in [0, 1], got 1.5"),
        ({"name": "dtop", "compute": float("nan")}, "compute must lie in [0, 1], got nan"),
        ({"name": "dense", "compute": 1.5}, "compute must lie in [0, 1], got 1.5"),
        ({"name": None, "compute": 0.5}, "need a method, as this model is not calibrated"),
        ({"name": None, "threshold": "0.5"}, "need a method, as this model is not calibrated"),
        ({"name": "dtop", "threshold": "0.9", "compute": 0.5}, "one of the two"),
        ({"name": "dense", "threshold": "0.9"}, "has no thresholds"),
        ({"name": "truncated", "compute": 0.5}, "has no thresholds"),
    ],
)
def test_choose__refuses_in_words(model: ExitSegmenter, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Choices(model).choose(**asked)
    assert words in str(refused.value)


def test_offers__say_what_a_model_cannot_run() -> None:
    choices = Choices(small_model(exit_head="setr_pup"))
    refusals = {offer.name: offer.refusal for offer in choices.offers()}
    assert refusals["dense"] is None
    assert refusals["dovit"] is None
    assert "grid" in str(refusals["dtop"])
    assert choices.usual == Dense()


def test_calibration__is_what_runs_and_where_the_dial_begins() -> None:
    spec = {"name": "dtop", "threshold": [0.9, 0.6], "keep_per_class": 3}
    choices = Choices(calibrated(small_model(), spec))
    assert choices.choose(None) == choices.choose("dtop") == DToP((0.9, 0.6), keep_per_class=3)
    offers = {offer.name: offer for offer in choices.offers()}
    assert [name for name, offer in offers.items() if offer.calibrated] == ["dtop"]
    at = offers["dtop"].compute
    assert at is not None
    assert thresholds(choices.choose("dtop", compute=at)) == pytest.approx((0.9, 0.6), abs=1e-6)
    first, second = thresholds(choices.choose("dtop", compute=at / 2))
    assert 1 - first == pytest.approx(0.1**0.5, abs=1e-5)
    assert 1 - second == pytest.approx(0.4**0.5, abs=1e-5)


def test_offers__hold_the_calibrated_method_whichever_it_is() -> None:
    assert [offer.name for offer in Choices(small_model()).offers()] == ["dense", "dtop", "dovit"]
    choices = Choices(calibrated(small_model(), {"name": "paumer", "threshold": [0.9, 0.6]}))
    assert [offer.name for offer in choices.offers() if offer.calibrated] == ["paumer"]


def test_offers__hold_a_plan_around_a_method_and_its_dial_moves_the_method_inside() -> None:
    inside = {"name": "gated", "method": {"name": "dtop", "threshold": [0.9, 0.6], "stop": 2}, "closed": [0]}
    choices = Choices(calibrated(small_model(), {"name": "resized", "method": inside, "scale": 0.7}))
    *others, offer = choices.offers()
    assert [other.name for other in others] == ["dense", "dtop", "dovit"]
    assert (offer.name, offer.title, offer.calibrated, offer.refusal) == ("resized", "Resized", True, None)
    assert offer.compute is not None
    moved = choices.choose("resized", compute=offer.compute / 2)
    assert (moved.input_scale, moved.last_exit) == (0.7, 1)
    assert moved.thresholds != (0.9, 0.6)
    assert choices.choose("resized", compute=offer.compute).thresholds == pytest.approx((0.9, 0.6), abs=1e-6)


def test_offers__of_a_resized_dense_model_have_no_dial() -> None:
    choices = Choices(calibrated(small_model(), {"name": "resized", "method": {"name": "dense"}, "scale": 0.7}))
    (offer,) = (offer for offer in choices.offers() if offer.calibrated)
    assert offer.compute is None
    assert choices.choose("resized", compute=0.3) == Resized(Dense(), 0.7)


def test_calibration__of_other_weights_is_refused_at_the_start() -> None:
    model = small_model()
    model.calibration = Calibration(model="another", method={"name": "dtop"})
    with pytest.raises(CheckpointError, match="other weights"):
        Choices(model)


def test_merging__stands_beside_every_method_that_a_request_names() -> None:
    by = MPM((1,))
    choices = Choices(small_model(), by)
    assert choices.choose(None) == Reduced(Dense(), by)
    assert choices.choose("dtop", "0.9") == Reduced(DToP(0.9), by)
    assert (
        choices.choose("dovit", compute=0.5).thresholds
        == Choices(small_model()).choose("dovit", compute=0.5).thresholds
    )
    assert all(offer.refusal is None for offer in choices.offers() if offer.name in ("dense", "dtop"))
    sized = {"name": "resized", "scale": 0.5, "method": {"name": "dtop", "threshold": 0.9}}
    assert Choices(calibrated(small_model(), sized), by).choose(None) == Resized(Reduced(DToP(0.9), by), 0.5)
    with pytest.raises(ConfigError, match="this backbone has"):
        Choices(small_model(), ALGM(0.9, 1, 40))


def test_merging__that_was_calibrated_runs_and_has_its_dial() -> None:
    spec = {"name": "reduced", "method": {"name": "dtop", "threshold": [0.9, 0.6]}, "by": {"name": "mpm", "after": [1]}}
    choices = Choices(calibrated(small_model(), spec))
    assert choices.choose(None) == Reduced(DToP((0.9, 0.6)), MPM((1,)))
    assert [offer.name for offer in choices.offers() if offer.calibrated] == ["reduced"]
    assert choices.choose(None, compute=1.0).thresholds == (1.0, 1.0)
    with pytest.raises(ConfigError, match="one reducer works at a time"):
        Choices(calibrated(small_model(), spec), MPM((1,)))
