"""The page of an adapted model says what was measured, tried and predicted, in one whole file."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import tiny_segmenter
from tests.report.test_model_report import Tags, cells
from tokenexit.adaptation import choose as adaptation
from tokenexit.adaptation import fit
from tokenexit.adaptation.adapt import Adaptation, adapt_model
from tokenexit.adaptation.options import Options
from tokenexit.adaptation.page import Judge, write_page
from tokenexit.calibration.plans import Held
from tokenexit.calibration.targets import Bound, Budget, CalibrationTarget
from tokenexit.cli import main
from tokenexit.data.registry import open_dataset
from tokenexit.errors import ConfigError
from tokenexit.inputs.labels import Labels
from tokenexit.methods import Dense
from tokenexit.segmenter import ExitSegmenter

EXITS = Held(scale=1.0, depth=3, exits=(1, 2))
BUDGET = Budget("budget", 0.7)
Adapt = Callable[..., Adaptation]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "my photos"
    folder.mkdir()
    scenes = open_dataset("scenes", None, "val", length=8, size=(32, 48))
    for i in range(len(scenes)):
        scenes[i].image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def adapt(photos: Path) -> Adapt:
    def adapted(
        held: Held = EXITS,
        target: CalibrationTarget = BUDGET,
        model: ExitSegmenter | None = None,
        **options: object,
    ) -> Adaptation:
        model = model or tiny_segmenter("linear", exits=(), depth=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "MOST_PASSES", 2)
            patch.setattr(adaptation, "LADDER", (0.9, 0.7, 0.5, 0.3))
            asked = Options(held=held, exit_head="linear", **options)  # type: ignore[arg-type]
            return adapt_model(model, [photos], target, None, asked, fewest=4)

    return adapted


@pytest.fixture(scope="module")
def found(adapt: Adapt) -> Adaptation:
    """A plan with exits among its rivals of other kinds: of one size, so that it is quick."""
    return adapt(Held(scale=1.0))


@pytest.fixture(scope="module")
def page(found: Adaptation, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "cheaper" / "report.html"
    assert write_page(found, path, "tokenexit adapt <source> --budget 0.7") == path
    return path.read_text(encoding="utf-8")


def written(found: Adaptation, folder: Path, shown: int = 4) -> str:
    return write_page(found, folder / "report.html", shown=shown).read_text(encoding="utf-8")


def images(page: str) -> list[str]:
    return re.findall(r'<img [^>]*alt="([^"]*)"', page)


def test_page__is_one_file_without_scripts_or_addresses(page: str) -> None:
    tags = Tags(page)
    assert "script" not in tags.count
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    assert tags.count["svg"] == 1
    assert "<h1>A cheaper model</h1>" in page


def test_page__begins_with_the_measured_sentence_and_its_figures(found: Adaptation, page: str) -> None:
    measured = found.measured
    assert f'<p class="summary">{measured.sentence()}.' in page
    low, high = (100 * (1 - end) for end in measured.disagreement_interval[::-1])
    assert f"{low:.1f} to {high:.1f} (95 % over photos)" in page
    assert f"<dd>{measured.speedup:.1f}x</dd>" in page
    assert f"{measured.ms:.3g} ms a photo in place of {measured.dense_ms:.3g}" in page
    assert f"with confidence {measured.confidence:g}</dt><dd>{measured.bound:.0%}</dd>" in page


def test_page__says_what_fell_short_and_why(found: Adaptation, tmp_path: Path) -> None:
    short = written(replace(found, shortfall="the head's <share> is large"), tmp_path)
    assert "This is the best that can be had: the head&#x27;s &lt;share&gt; is large.</p>" in short
    assert "best that can be had" not in written(replace(found, shortfall=""), tmp_path)


def test_page__has_a_row_for_every_plan_that_was_run(found: Adaptation, page: str) -> None:
    assert len(found.tried) > 1
    best, *rivals = found.tried
    assert cells(page, "chosen")[:2] == [f"{best.run.mac_ratio:.1%}", f"{best.agreement:.1%}"]
    assert cells(page, "chosen")[3:] == [f"{100 * (1 - best.loss):.1f}", f"{best.ms:.1f}", str(best.plan)]
    for one in rivals:
        row = cells(page, one.kind)
        assert (row[0], row[-1]) == (f"{one.run.mac_ratio:.1%}", str(one.plan))
        assert f"{one.kind}, run" in page


def test_page__says_why_the_plan_was_taken(found: Adaptation, tmp_path: Path) -> None:
    best, rival = found.tried[:2]
    assert "the simplest is taken" in written(found, tmp_path)
    better = replace(rival, loss=best.loss - 0.004)
    said = written(replace(found, tried=(best, better)), tmp_path)
    assert f"the simplest is taken: {better.plan} is better by 0.40 points only." in said
    assert "No other plan met the budget" in written(replace(found, tried=(best,)), tmp_path)


def test_page__has_a_point_of_the_curve_and_a_row_for_every_budget(found: Adaptation, page: str) -> None:
    assert len(found.curve) > 2
    for budget, plan in found.curve:
        figure = f"{100 * max(0, 1 - plan.loss):.1f}"
        assert cells(page, f"{budget:.0%}") == [f"{plan.price:.0%}", figure, str(plan)]
        assert f"percent {100 * plan.price:g}, class agreement" in page
    (tail,) = re.findall(r"tokenexit calibrate (.*?) \\\n", html.unescape(page))
    assert tail.endswith("cheaper")


def test_page__names_commands_for_another_point_as_a_shell_takes_them(
    found: Adaptation, page: str, photos: Path
) -> None:
    above = min(budget for budget, _ in found.curve if budget > found.measured.mac_ratio + 0.05)
    assert html.unescape(page).count(f"--images '{photos}' --budget {above:g}") == 2
    assert f"--budget {above:g} --plan dense</code>" in page


def test_page__has_a_row_of_losses_and_costs_for_every_block(found: Adaptation, page: str) -> None:
    blocks = ["1", "2", "3, the end"]
    losses, costs = (
        [re.findall(rf'<th scope="row">{block}</th>(.*?)</tr>', page)[table] for block in blocks] for table in (0, 1)
    )
    for n in range(3):
        assert f">{100 * max(0.0, 1 - found.static_losses[1.0][n]):.1f}</td>" in losses[n]
        assert f">{found.static_costs[1.0][n]:.0%}</td>" in costs[n]
    for block, head in found.heads.items():
        row = re.findall(rf'<th scope="row">{block}</th>(.*?)</tr>', page)[2]
        assert f">{head.agreement:.1%}</td>" in row


def test_page__shows_test_photos_alone_with_both_masks_and_exits(found: Adaptation, tmp_path: Path) -> None:
    page = written(found, tmp_path, shown=1)
    tested = {found.photos[n].name for n in found.split.test}
    (title,) = re.findall(r"<h3>(.*?)</h3>", page)
    assert title in tested
    last = "exits" if found.tried[0].plan.exits else "pixels unlike"
    assert images(page) == [f"{title}: {what}" for what in ("photo", "dense mask", "cheaper mask", last)]
    photo = next(one for one in found.photos if one.name == title)
    dense, own = found.dense.predict(photo, Dense()), found.model.predict(photo)
    agreement = (dense.labels[0] == own.labels[0]).double().mean().item()
    assert f"cheaper mask<small>{agreement:.1%} of pixels as before</small>" in page
    assert f"{last}<small>{own.ledger.share_of_dense[0]:.0%} of dense</small>" in page
    assert len(images(written(found, tmp_path, shown=99))) == 4 * len(found.split.test)
    assert images(written(found, tmp_path, shown=0)) == []


def test_page__has_every_class_with_what_stays_of_it_the_weakest_first(found: Adaptation, page: str) -> None:
    rows = re.findall(r'<th scope="row"><span class="swatch"[^>]*></span>(.*?)</th><td[^>]*>(.*?)</td>', page)
    named = dict(zip(found.dense.classes.names, found.measured.agreement_by_class))
    assert dict(rows) == {name: "–" if share is None else f"{share:.1%}" for name, share in named.items()}
    shares = [named[name] for name, _ in rows]
    there = [share for share in shares if share is not None]
    assert there == sorted(there)
    assert shares == [*there, *[None] * (len(shares) - len(there))]


def test_page__says_how_it_was_made(found: Adaptation, page: str, tmp_path: Path) -> None:
    assert f"8 photos: {found.split}." in page
    assert "No labels were used" in page
    assert "seed 0" in page
    assert "Photos from elsewhere" in page
    assert "<pre><code>tokenexit adapt &lt;source&gt; --budget 0.7</code></pre>" in page
    other = written(replace(found, labelled=7, options=replace(found.options, seed=3, finetune=20)), tmp_path)
    assert "The plan was chosen on 7 images with labels" in other
    assert "No labels were used" not in other
    assert "seed 3" in other
    assert "given 20 steps more" in other


def test_page__of_a_plan_by_pixels_has_no_figure_of_classes(adapt: Adapt, tmp_path: Path) -> None:
    page = written(adapt(average="pixels"), tmp_path)
    assert "pixels as before, percent" in page
    assert "class agreement" not in page
    assert "mIoU" not in page


def test_page__of_exits_has_a_legend_of_their_blocks(adapt: Adapt, tmp_path: Path) -> None:
    page = written(adapt(), tmp_path)
    assert "Exit 1 (after block 1)" in page
    assert "Exit 2 (after block 2)" in page
    assert "Stayed to the end" in page
    stopped = written(adapt(Held(scale=1.0, depth=2, exits=(1,)), Budget("budget", 0.6)), tmp_path)
    assert "all that are left stop after block 2" in stopped
    assert "All that were left (after block 2)" in stopped
    assert "Stayed to the end" not in stopped


@pytest.mark.parametrize(
    ("held", "said", "exits"),
    [
        (Held(scale=1.0, depth=1, exits=()), "Everybody stops after block 1.", (1,)),
        (Held(scale=0.5, depth=3, exits=()), "The image runs at 0.5 of its sides.", ()),
    ],
)
def test_page__of_a_static_plan_shows_what_changed_in_place_of_exits(
    held: Held, said: str, exits: tuple[int, ...], adapt: Adapt, tmp_path: Path
) -> None:
    found = adapt(held)
    assert found.model.config.exits == exits
    page = written(found, tmp_path)
    assert said in page
    assert "Stayed to the end" not in page
    assert [alt.split(": ")[1] for alt in images(page)][:4] == ["photo", "dense mask", "cheaper mask", "pixels unlike"]
    assert ("tokenexit calibrate" in page) == bool(exits)


def test_page__of_a_model_with_windows(adapt: Adapt, tmp_path: Path) -> None:
    model = tiny_segmenter("linear", exits=(), depth=3)
    model.preprocessing = replace(model.preprocessing, window=(24, 24), stride=(16, 16))
    found = adapt(Held(scale=0.8, depth=3, exits=(1,)), Budget("budget", 0.6), model)
    page = written(found, tmp_path)
    assert "The image runs at 0.8 of its sides; tokens may leave after block 1" in page
    assert len(images(page)) == 4 * len(found.split.test)


@pytest.mark.parametrize("count", [1, 150])
def test_page__of_one_class_and_of_many(count: int, adapt: Adapt, tmp_path: Path) -> None:
    labels = Labels(tuple(f"a<b> & `{n}`" for n in range(count)), tuple((n, 0, 255 - n) for n in range(count)))
    model = tiny_segmenter("linear", exits=(), depth=3, num_classes=count)
    model.preprocessing = replace(model.preprocessing, labels=labels)
    page = written(adapt(EXITS, Budget("budget", 0.8), model), tmp_path)
    assert "a<b>" not in page
    for n in range(count):
        assert page.count(f"a&lt;b&gt; &amp; `{n}`") >= 2  # the legend and the table


def test_page__of_a_bound_says_that_plans_were_tested(adapt: Adapt, tmp_path: Path) -> None:
    found = adapt(Held(scale=1.0, depth=2, exits=()), Bound("max_disagreement", 0.9, 0.5))
    page = written(replace(found, shortfall=""), tmp_path)
    assert "Plans were tested from safe to daring" in page
    assert "that the bound was tested on" in page
    failed = written(replace(found, shortfall="no plan passes the test of this bound"), tmp_path)
    assert "none of which passed the test" in failed


def test_page__takes_names_of_photos_that_are_no_text(found: Adaptation, tmp_path: Path) -> None:
    named = tmp_path / b"a\xff<i>.png".decode("utf-8", "surrogateescape")
    try:
        Image.new("RGB", (48, 32)).save(named)
    except (OSError, UnicodeError):
        pytest.skip("file names here are text")
    page = written(replace(found, photos=(named,) * len(found.photos)), tmp_path, shown=1)
    assert "<h3>a\ufffd&lt;i&gt;.png</h3>" in page


def test_page__that_cannot_be_written_is_refused(found: Adaptation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(found, tmp_path / "file" / "report.html", shown=0)


def test_judge__gives_runs_the_figure_that_predictions_have(found: Adaptation) -> None:
    confusion = torch.tensor([[[90, 10, 0], [0, 100, 0], [0, 0, 0]], [[95, 5, 0], [0, 300, 0], [0, 0, 0]]])
    run = replace(found.tried[0].run, confusion=confusion.int())
    assert Judge("pixels", 0).of(run, 4) == pytest.approx(100 - (5 + 1.25) / 2)
    # Two classes are there, of 200 and of 400 pixels; 15 are lost to the one and given to the other.
    assert Judge("classes", 0).of(run, 4) == pytest.approx(100 - 100 * 15 * (1 / 200 + 1 / 400) / 4)
    # A class of no pixels counts as a patch of 4 by 4.
    invented = replace(run, confusion=torch.tensor([[[92, 0, 8], [0, 100, 0], [0, 0, 0]]]).int())
    assert Judge("classes", 0).of(invented, 4) == pytest.approx(100 - 100 * 8 * (1 / 100 + 1 / 16) / 4)


def test_model_of_size_alone__is_saved_without_scores_and_predicts(adapt: Adapt, photos: Path, tmp_path: Path) -> None:
    found = adapt(Held(scale=0.5, depth=3, exits=()))
    found.model.save_pretrained(tmp_path / "model")
    assert found.model.calibration is not None
    assert found.model.calibration.scores is None
    assert main(["predict", str(tmp_path / "model"), str(photos), "--out", str(tmp_path / "masks")]) == 0
    assert list((tmp_path / "masks").rglob("*.png"))
