"""`adapt` from photos on disk to a saved model, interrupted or not, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenexit
from tests.adaptation.scenes import dense_model, draw
from tests.calibration.test_dense_pass import Noise
from tests.heads.test_eomt import eomt
from tests.helpers import tiny_segmenter
from tokenexit.adaptation import adapt as module
from tokenexit.adaptation import choose, features, fit, heads
from tokenexit.adaptation.adapt import Adaptation, adapt_model, check_out
from tokenexit.adaptation.options import Options
from tokenexit.calibration.plans import Held, TriedPlan
from tokenexit.calibration.targets import Bound, Budget, CalibrationTarget
from tokenexit.errors import CheckpointError, ConfigError, DataError
from tokenexit.methods import DoViT, DToP, Method
from tokenexit.pretrained import CONFIG_FILE
from tokenexit.segmenter import ExitSegmenter

BUDGET = Budget("budget", 0.6)
ONE_SIZE = Held(scale=1.0)
EXITS = Held(scale=1.0, depth=3, exits=(1, 2))
COUNT = 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("photos"), COUNT)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MOST_PASSES", 2)
    monkeypatch.setattr(choose, "LADDER", (0.9, 0.6, 0.3))


def adapted(
    photos: Path,
    out: Path | None = None,
    target: CalibrationTarget = BUDGET,
    held: Held = ONE_SIZE,
    model: ExitSegmenter | None = None,
    labelled: Any = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Adaptation:
    asked = Options(held=held, **({"exit_head": "linear"} | options))
    model = dense_model() if model is None else model
    return adapt_model(model, [photos], target, out, asked, labelled=labelled, fewest=5, say=say)


def image_of(photos: Path) -> Image.Image:
    return Image.open(photos / "00.png")


def same(a: ExitSegmenter, b: ExitSegmenter) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ------------------------------------------------------------------------------------------------------- end to end


def test_adapt__leaves_the_dense_prediction_and_saves_a_model_that_runs_the_plan(photos: Path, tmp_path: Path) -> None:
    source, out = dense_model(), tmp_path / "out"
    lines: list[str] = []
    before = {name: value.clone() for name, value in source.state_dict().items()}
    found = adapted(photos, out, model=source, held=Held(), say=lines.append)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    loaded, image = ExitSegmenter.from_pretrained(out), image_of(photos)
    assert same(loaded, found.model)
    with torch.no_grad():
        dense, own = (one.predict(image, "dense") for one in (source, loaded))
        assert torch.equal(dense.grid_logits[0], own.grid_logits[0])  # type: ignore[union-attr]
        planned = loaded.predict(image)
        assert torch.equal(planned.labels, loaded.predict(image, found.method).labels)  # type: ignore[arg-type]
    assert loaded.calibrated_method() == found.method
    assert loaded.calibration is not None
    assert loaded.calibration.asked["adapted"] is True
    assert loaded.calibration.guarantee == found.measured.sentence()
    assert loaded.calibration.images == {"fit": 6, "count": 2, "test": 2}
    assert found.tried[0].run.mac_ratio <= 0.6
    assert planned.ledger.share_of_dense[0] < 0.9
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "calibration.json", "config.json", "model.safetensors"]
    )
    assert list(found.heads) == [1, 2]
    assert lines[0] == "10 photos: 6 to fit exit heads, 2 to choose, 2 to test"
    assert lines[1].startswith("warning: fewer than 200 photos")


def test_adapt__places_exits_up_to_where_queries_join_and_never_behind(photos: Path, tmp_path: Path) -> None:
    dense = eomt(exits=(), depth=3)
    with pytest.raises(ConfigError, match="between 1 and 3, as queries join the last 2 of 5 blocks, got 4"):
        adapted(photos, model=dense, held=Held(scale=1.0, exits=(2, 4)))
    with pytest.raises(ConfigError, match="depth=2 cannot be held: this decode head reads the whole grid at the end"):
        adapted(photos, model=dense, held=Held(scale=1.0, depth=2))
    found = adapted(photos, tmp_path / "out", Budget("budget", 0.85), Held(scale=1.0, exits=(1, 3)), dense)
    assert list(found.heads) == [1, 2, 3]
    assert isinstance(found.method, DToP)
    assert found.model.config.exits == (1, 3)
    assert found.tried[0].run.mac_ratio <= 0.85
    loaded, image = ExitSegmenter.from_pretrained(tmp_path / "out"), image_of(photos)
    assert loaded.depth == 5
    planned = loaded.predict(image)
    assert planned.ledger.share_of_dense[0] < 1.0
    assert torch.equal(loaded.predict(image, "dense").labels, dense.predict(image, "dense").labels)  # type: ignore[arg-type]


def test_adapt__of_the_library_saves_nothing_without_out(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt_model, "__kwdefaults__", {**(adapt_model.__kwdefaults__ or {}), "fewest": 5})
    lines: list[str] = []
    model = tokenexit.adapt(dense_model(), photos, 0.7, exits=[2, 1], size=1, exit_head="linear", say=lines.append)
    assert isinstance(model, ExitSegmenter)
    assert model.calibration is not None
    assert lines[-1] == model.calibration.guarantee
    assert model.config.exits in ((1, 2),)
    model.predict(image_of(photos))


@pytest.mark.parametrize("classes", [1, 150])
def test_adapt__takes_models_of_few_and_many_classes(classes: int, photos: Path) -> None:
    found = adapted(photos, model=dense_model(num_classes=classes))
    assert found.tried[0].run.mac_ratio <= 0.6
    found.model.predict(image_of(photos))
    if classes == 1:
        assert found.measured.disagreement == 0.0
        assert found.shortfall == ""


def test_adapt__of_a_grid_head_passes_tokens_by_without_a_stop(photos: Path) -> None:
    found = adapted(photos, model=dense_model("setr_pup"), target=Budget("budget", 0.9))
    assert all(one.plan.stop is None for one in found.tried)
    assert found.model.predict(image_of(photos)).labels.shape[-2:] == (24, 36)  # type: ignore[union-attr]
    held = adapted(photos, model=dense_model("setr_pup"), target=Budget("budget", 0.9), held=EXITS)
    assert isinstance(held.method.inner, DoViT)
    assert held.model.config.exits == (1, 2)


def test_adapt__of_a_grid_head_without_a_class_token_blends_nothing(photos: Path) -> None:
    model = dense_model("setr_pup", class_token=False)
    found = adapted(photos, model=model, target=Budget("budget", 0.9), held=EXITS)
    assert isinstance(found.method.inner, DoViT)
    assert found.method.inner.blend_weight == 0.0


def test_adapt__of_an_atm_head_fits_exits_to_its_scores(photos: Path) -> None:
    found = adapted(photos, model=dense_model("atm"), held=EXITS, target=Budget("budget", 0.8))
    assert found.tried[0].run.mac_ratio <= 0.8
    found.model.predict(image_of(photos))


def test_adapt__without_exits_is_a_smaller_image(photos: Path, tmp_path: Path) -> None:
    found = adapted(photos, tmp_path / "out", held=Held(depth=3, exits=()))
    assert found.model.config.exits == ()
    assert found.method.input_scale < 1.0
    assert ExitSegmenter.from_pretrained(tmp_path / "out").calibrated_method() == found.method


def in_windows() -> ExitSegmenter:
    model = dense_model()
    model.preprocessing = replace(model.preprocessing, window=(16, 20), stride=(8, 16))
    return model


def test_adapt__within_milliseconds_keeps_what_was_asked(photos: Path, tmp_path: Path) -> None:
    found = adapted(photos, tmp_path / "out", Budget("latency_ms", 1e4))
    assert found.model.calibration is not None
    assert found.model.calibration.asked["latency_ms"] == 1e4
    assert found.tried[0].loss == 0.0  # there is time for everything
    found.model.predict(image_of(photos))


def test_adapt__in_windows(photos: Path) -> None:
    found = adapted(photos, model=in_windows())
    assert found.tried[0].run.mac_ratio <= 0.6
    assert found.measured.tokens == 4 * 20


# --------------------------------------------------------------------------------------------------- bounds, labels


def test_adapt__within_a_bound_that_passes_states_the_bound_that_was_tested(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 12)
    target = Bound("max_disagreement", 0.9, 0.8)
    found = adapted(photos, target=target)
    assert found.measured.bound == 0.9
    assert found.measured.confidence == 0.8
    assert "no plan passes" not in found.shortfall
    costs = [one.run.mac_ratio for one in found.tried]
    assert costs == sorted(costs)  # the last that passed is the cheapest


def test_adapt__within_an_impossible_bound_ends_with_the_safest_plan_and_says_why(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 44, (16, 16))
    found = adapted(photos, target=Bound("max_disagreement", 0.1))
    assert found.shortfall == "no plan passes the test of max_disagreement=0.1; this one is not guaranteed"
    assert len(found.tried) == 1
    assert found.measured.bound > 0.1


def test_adapt__within_a_bound_where_nothing_is_cheaper_is_one_sentence(photos: Path) -> None:
    with pytest.raises(ConfigError, match="no plan takes at most 90% of dense multiply-adds"):
        adapted(photos, target=Bound("max_disagreement", 0.5), held=Held(1.0, 3, ()))


class Labelled(Noise):
    """Noise whose last image has no label at all."""

    def __getitem__(self, index: int, /) -> Any:
        sample = super().__getitem__(index)
        return replace(sample, mask=sample.mask * 0 + 255) if index == self.count - 1 else sample


def test_adapt__with_labels_judges_by_them_and_not_by_dense(photos: Path) -> None:
    found = adapted(photos, labelled=Labelled(5))
    assert found.labelled == 4  # the image without labels says nothing
    assert found.shortfall == ""  # dense is no better on noise, however unlike it the plan is
    assert found.model.calibration is not None
    assert found.model.calibration.images["count"] == 4
    assert "pixels_wrong" in found.model.calibration.reached


def test_adapt__with_labels_still_tests_a_bound_against_dense(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 12)
    found = adapted(photos, target=Bound("max_disagreement", 0.9, 0.8), labelled=Labelled(5))
    assert "no plan passes" not in found.shortfall
    assert found.measured.bound == 0.9


def test_adapt__with_labels_of_other_classes_or_of_none_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model predicts 4 classes, the dataset has 5"):
        adapted(photos, tmp_path / "out", model=dense_model(num_classes=4), labelled=Labelled(5))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="have no labels"):
        adapted(photos, labelled=Labelled(1))


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({"head_share": 0.7}, "the decode head takes 70% of dense multiply-adds, which no exit saves"),
        ({"head_share": 0.1, "tokens": 54.0}, "the images are small, 54 tokens, of which most are needed"),
        ({"head_share": 0.1, "tokens": 900.0}, "exits answer 'road' least well, 20% of its pixels as dense does"),
    ],
)
def test_shortfall__names_what_stands_in_the_way(photos: Path, measured: dict[str, Any], reason: str) -> None:
    found = adapted(photos, held=EXITS)
    names = replace(found.model.classes, names=("sky", "road", "c", "d", "e"))
    found.model.preprocessing = replace(found.model.preprocessing, labels=names)
    figures = replace(
        found.measured, disagreement=0.2, mac_ratio=0.6, agreement_by_class=(0.9, 0.2, None, 0.5, 1.0), **measured
    )
    survey = type("Survey", (), {"labels": False})()
    said = choose.why_not(survey, found.tried[0], BUDGET, figures, found.model)
    assert said == f"agreement with dense has fallen off at this budget (20.0% of pixels are unlike): {reason}"
    said = choose.why_not(survey, found.tried[0], Bound("max_disagreement", 0.3), figures, found.model)
    assert said == f"within 0.3 this model takes 60% of dense, more than half: {reason}"
    assert choose.why_not(survey, found.tried[0], BUDGET, replace(figures, disagreement=0.01), found.model) == ""


# ------------------------------------------------------------------------------------------------------ interrupted


class Killed(Exception):
    """What ends a call in these tests."""


def test_adapt__interrupted_goes_on_without_running_again_what_is_done(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = adapted(photos, tmp_path / "never")
    fits: list[int] = []

    def kill_at(limit: int) -> None:
        def counted(kept: Any, block: int, *args: Any, **options: Any) -> Any:
            if len(fits) == limit:
                raise Killed
            fits.append(block)
            return fit.fit_head(kept, block, *args, **options)

        monkeypatch.setattr(heads, "fit_head", counted)

    passes: list[str] = []
    window = features._window

    def counted_window(*args: Any) -> Any:
        passes.append("window")
        return window(*args)

    monkeypatch.setattr(features, "_window", counted_window)
    for limit in (0, 1, 9):  # killed behind the dense pass, then behind the first head
        kill_at(limit)
        if limit < 9:
            with pytest.raises(Killed):
                adapted(photos, tmp_path / "out")
            assert not (tmp_path / "out" / CONFIG_FILE).exists()
    found = adapted(photos, tmp_path / "out")
    assert len(passes) == len(found.split.fit)
    assert fits == [1, 2]
    assert same(found.model, never.model)
    assert found.method == never.method
    assert found.tried[0].loss == never.tried[0].loss
    assert not (tmp_path / "out" / module.WORK).exists()


@pytest.fixture(scope="module")
def begun(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a call has fitted all heads and was interrupted."""
    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "MOST_PASSES", 1)
        patch.setattr(module, "Survey", lambda *args, **options: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            adapted(photos, out)
    return out


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": dense_model(seed=1)}, "source"),
        ({"seed": 1}, "seed"),
        ({"limit": 9}, "photos"),
        ({"exit_head": "fcn"}, "exit_head"),
        ({"precision": "bf16"}, "precision"),
        ({"target": Bound("max_disagreement", 0.9, 0.8)}, "split_for"),
    ],
)
def test_adapt__interrupted_does_not_go_on_with_what_another_call_made(
    change: dict[str, Any], key: str, photos: Path, begun: Path
) -> None:
    with pytest.raises(ConfigError, match=f"was made with {key}=") as error:
        adapted(photos, begun, **change)
    assert "choose another --out, or delete it" in str(error.value)


def test_adapt__interrupted_goes_on_at_another_budget(photos: Path, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    assert adapted(photos, tmp_path / "out", Budget("budget", 0.9)).tried[0].run.mac_ratio <= 0.9


def test_adapt__with_a_damaged_head_on_disk_says_what_to_delete(photos: Path, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    (tmp_path / "out" / module.WORK / "head002.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"head002.safetensors is missing or damaged: delete .*\.adapting"):
        adapted(photos, tmp_path / "out")


def test_adapt__on_a_disk_that_is_full_at_the_end_is_one_sentence_and_goes_on(
    photos: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(begun, tmp_path / "out")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ExitSegmenter, "save_pretrained", full)
        with pytest.raises(ConfigError, match=r"out cannot be written \(No space left on device\): choose another"):
            adapted(photos, tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG_FILE).exists()
    adapted(photos, tmp_path / "out")
    assert (tmp_path / "out" / CONFIG_FILE).exists()


# --------------------------------------------------------------------------------------------------------- refusals


def test_out__that_holds_another_model_is_refused_and_left(photos: Path, tmp_path: Path) -> None:
    dense_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other holds another model, which adapt did not make"):
        adapted(photos, tmp_path / "other")
    assert not (tmp_path / "other" / module.WORK).exists()
    with pytest.raises(ConfigError, match="other is the source itself, which would be replaced"):
        tokenexit.adapt(tmp_path / "other", photos, 0.5, out=tmp_path / "x" / ".." / "other")
    check_out(tmp_path / "new", tmp_path / "other")


def test_out__of_an_earlier_adapt_is_replaced(photos: Path, tmp_path: Path) -> None:
    adapted(photos, tmp_path / "out", held=EXITS)
    found = adapted(photos, tmp_path / "out", Budget("budget", 0.8), held=EXITS)
    assert ExitSegmenter.from_pretrained(tmp_path / "out").calibrated_method() == found.method


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": tiny_segmenter("linear", exits=(), depth=1)}, "at least 2 blocks, got 1: there is no place"),
        ({"held": Held(exits=(1, 3))}, "exits and depth must be between 1 and 2, got 3"),
        ({"held": Held(depth=7)}, "exits and depth must be between 1 and 2, got 7"),
        ({"exit_head": "mask_transformer"}, "exit_head must look at one token at a time"),
        ({"exit_head": "atm"}, "exit_head must look at one token at a time"),
        ({"target": Budget("latency_ms", 5.0), "model": in_windows()}, "this model takes windows: ask for a budget"),
        ({"target": Budget("latency_ms", 1e-3)}, "latency_ms=0.001 is out of reach: the cheapest plan takes"),
        ({"target": Bound("max_miou_drop", 1.0)}, "adapt bounds the mean share of pixels unlike dense alone"),
        ({"target": Bound("max_disagreement", 0.1, images_above=0.1)}, "adapt bounds the mean share"),
        ({"target": Bound("max_disagreement", 0.5), "finetune": 4}, "finetune goes with a budget"),
        ({"model": dense_model("atm"), "finetune": 4}, "finetune needs a decode head of this library"),
        ({"held": Held(1.0, 3, ())}, "budget=0.6 is out of reach with what is held"),
    ],
)
def test_adapt__refuses_in_one_sentence(change: dict[str, Any], said: str, photos: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        adapted(photos, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value"), [("limit", 0), ("finetune", -1)])
def test_options__out_of_range_are_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be at least"):
        Options(**{option: value})  # type: ignore[arg-type]


def test_adapt__refuses_a_confidence_of_a_budget(photos: Path) -> None:
    with pytest.raises(ConfigError, match="confidence belongs to a bound, and budget is a budget"):
        tokenexit.adapt(dense_model(), photos, 0.5, confidence=0.8)


@pytest.mark.parametrize("count", [0, 1])
def test_adapt__without_photos_or_with_one_says_so_and_writes_nothing(count: int, tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", count) if count else tmp_path / "photos"
    photos.mkdir(exist_ok=True)
    said = "holds no image" if count == 0 else "at least 60 photos, got 1"
    with pytest.raises(DataError if count == 0 else ConfigError, match=said):
        tokenexit.adapt(dense_model(), photos, 0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- fine-tune


def test_finetune__is_named_by_the_plan_so_that_another_plan_begins_anew(photos: Path) -> None:
    best = adapted(photos, held=EXITS).tried[0]
    names = {
        module._digest(one, options)
        for one in (best, replace(best, method=best.method.with_thresholds((0.5, 0.25))))
        for options in (Options(finetune=2), Options(finetune=3))
    }
    assert len(names) == 4


@pytest.mark.parametrize("better", [True, False])
def test_finetune__keeps_what_is_better_on_the_photos_to_choose_on(
    better: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    tune = module.finetune

    def tuned(model: Path, dense: Path, paths: Any, method: Method[Any], **options: Any) -> Path:
        assert len(paths) == 6
        return tune(model, dense, paths, method, batch_size=2, **(options | {"progress": False}))

    monkeypatch.setattr(module, "finetune", tuned)
    tried = module.try_plan

    def judged(*args: Any) -> TriedPlan | None:
        """Whatever two steps do."""
        one = tried(*args)
        return replace(one, loss=-1.0) if better and one is not None else None

    monkeypatch.setattr(module, "try_plan", judged)
    source = dense_model()
    found = adapted(photos, tmp_path / "out", held=EXITS, model=source, finetune=2, say=lines.append)
    loaded = ExitSegmenter.from_pretrained(tmp_path / "out")
    assert same(loaded, found.model)
    assert loaded.calibrated_method() == found.method
    kept = all(torch.equal(a, b) for a, b in zip(source.backbone.parameters(), loaded.backbone.parameters()))
    assert kept != better
    assert any(line.startswith("fine-tuned: " if better else "fine-tuning did not help") for line in lines)


def test_finetune__of_a_plan_without_exits_is_left_out(photos: Path) -> None:
    lines: list[str] = []
    adapted(photos, held=Held(depth=3, exits=()), finetune=2, say=lines.append)
    assert any(line.startswith("not fine-tuned: the plan (image at") for line in lines)
