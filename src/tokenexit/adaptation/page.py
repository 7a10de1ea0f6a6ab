"""The page of an adapted model: what it costs and keeps, what else was tried, other points, masks beside each other.

A plan is predicted from dense passes and then run. So that both stand in one chart, the runs are given in the figure
that predictions have (`Judge.figure`): 1 less the loss, in percent.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tokenexit.adaptation.adapt import Adaptation
from tokenexit.adaptation.choose import NONE_PASSES
from tokenexit.calibration.calibration_set import TrueRun, mean_error
from tokenexit.calibration.plans import AS_GOOD, Plan, TriedPlan, listed
from tokenexit.calibration.targets import UNITS, Average
from tokenexit.inputs.images import load_image
from tokenexit.methods import Dense
from tokenexit.outputs.windows import Segmentation
from tokenexit.report.chart import Point, Series, collapse_floor, line_chart_svg
from tokenexit.report.html import Block, Chart, Code, Facts, Figure, FigureRow, Legend, Section, write_report
from tokenexit.report.pictures import colorize, exit_legend, exit_map
from tokenexit.report.tables import Column, Swatch, Table
from tokenexit.runtime.precision import inference

TITLE = "A cheaper model"
COARSE = (
    " The end at full size is the dense model itself: what it lacks there to 100 is how coarse predictions are, which "
    "look at a few places of every token."
)
DEARER = 0.05
"""Share of dense by which another budget is above what the plan takes, to be named as an example."""


@dataclass(frozen=True)
class Judge:
    """How plans were judged: the unit of agreement, and whether labels said what is right.

    Attributes:
        average: "pixels", or "classes" so that rare ones count as much.
        labelled: number of labelled images; 0 where plans were compared with the dense model's answers.
    """

    average: Average
    labelled: int

    @property
    def figure(self) -> str:
        """Name of the figure that predictions have, 1 less the predicted loss."""
        return self.pixels if self.average == "pixels" else "class agreement"

    @property
    def help(self) -> str:
        """One sentence on that figure."""
        if self.average == "pixels":
            return "Share of pixels, in percent."
        return (
            "The mean over classes of what is left, in percent, once half of what a class lost and half of what it was "
            "given wrongly is taken off."
        )

    def of(self, run: TrueRun, patch_size: int) -> float:
        """Return that figure of a run; classes of less than a patch count as one (as in `DensePass.losses`)."""
        if self.average == "pixels":
            return 100.0 * (1.0 - mean_error(run, "pixels"))
        counts = run.confusion.double().sum(0)
        sizes = counts.sum(1)
        weight = 1.0 / (2.0 * (sizes > 0).sum() * sizes.clamp(min=patch_size**2))
        wrong = counts - counts.diag().diag()
        return _percent((wrong * (weight[:, None] + weight)).sum().item())

    @property
    def pixels(self) -> str:
        """Name of the share of pixels that are as they should be."""
        return "pixels right" if self.labelled else "pixels as before"

    @property
    def truth(self) -> str:
        """What plans are compared with."""
        return "the labels" if self.labelled else "the dense answers"

    @property
    def images(self) -> str:
        """The images that plans were run on."""
        return "the labelled images" if self.labelled else "the photos to choose on"

    @property
    def words(self) -> str:
        """Say who judged."""
        who = f"the labels of {self.labelled} images" if self.labelled else "the dense model's own answers at full size"
        unit = "every pixel" if self.average == "pixels" else "every class"
        return f"Plans are judged by {who}; {unit} counts the same."


def write_page(found: Adaptation, path: Path, command: str = "", shown: int = 4) -> Path:
    """Write the page as one HTML file, and return its path.

    Args:
        found: what `adapt_model` returned; its photos are read again.
        path: the file, which appears whole or not at all.
        command: the command that made the model, if one did.
        shown: number of test photos to show.

    Raises:
        ConfigError: if the file cannot be written.
        DataError: for a photo that can no longer be read.
    """
    judge = Judge(found.options.average, found.labelled)
    with inference(found.dense.device, found.options.precision):
        photos = list(_photos(found, shown))
    sections = [
        Section("Result", [_facts(found)]),
        Section("Plan", [*_plan(found, judge)]),
        Section("Other budgets", [*_budgets(found, judge, path.parent)]),
        Section("Blocks and sizes", [*_blocks(found, judge)]),
        Section("Test photos", photos),
        Section("Classes", [*_classes(found)]),
        Section("How it was made", [_how(found), _covers(found), *([Code(_readable(command))] if command else [])]),
    ]
    shortfall = f" This is the best that can be had: {found.shortfall}." if found.shortfall else ""
    summary = f"{found.measured.sentence()}.{shortfall}"
    return write_report(path, TITLE, sections, summary=summary, footer="Made by tokenexit adapt.")


def _facts(found: Adaptation) -> Facts:
    measured = found.measured
    low, high = (100 * (1 - end) for end in measured.disagreement_interval[::-1])
    return Facts(
        [
            (f"{measured.mac_ratio:.0%}", "of dense multiply-adds"),
            (f"{1 - measured.disagreement:.1%}", f"of pixels as before; {low:.1f} to {high:.1f} (95 % over photos)"),
            (
                f"{measured.speedup:.1f}x",
                f"as fast here: {measured.ms:.3g} ms a photo in place of {measured.dense_ms:.3g}",
            ),
            (
                f"{measured.bound:.{_decimals(measured.bound)}%}",
                f"of pixels unlike dense at most, with confidence {measured.confidence:g}",
            ),
        ]
    )


def _decimals(share: float) -> int:
    """Return the decimals of a share in percent that leave two digits, as the sentence has them."""
    return 0 if share >= 0.1 else 1 if share >= 0.01 else 2


# ------------------------------------------------------------------------------------------------------------ plans


def _plan(found: Adaptation, judge: Judge) -> Iterator[Block]:
    """Yield the plan in words, why it was taken, and the plans that were run."""
    yield f"{_capital(_in_words(found.tried[0]))}. {_why(found, judge)}"
    patch_size = found.dense.config.backbone.patch_size
    columns = [
        Column("plan", help="What the plan saves by; a simple plan is a rival of those that mix all three."),
        Column("of dense", "{:.1%}", "right", f"Multiply-adds over dense ones on {judge.images}."),
        Column(judge.pixels, "{:.1%}", "right", f"Mean over {judge.images}."),
    ]
    rows: list[list[Any]] = [
        ["chosen" if n == 0 else _kind(one), one.run.mac_ratio, one.agreement] for n, one in enumerate(found.tried)
    ]
    if judge.average == "classes":
        columns += [
            Column(judge.figure, "{:.1f}", "right", judge.help),
            Column("mIoU", "{:.1f}", "right", f"Against {judge.truth}, in percent: what plans are compared by."),
        ]
        rows = [[*row, judge.of(one.run, patch_size), _percent(one.loss)] for row, one in zip(rows, found.tried)]
    columns += [
        Column("ms", "{:.1f}", "right", "Median milliseconds of an image on this machine, the plans in turn."),
        Column("in words"),
    ]
    rows = [[*row, one.ms, str(one.plan)] for row, one in zip(rows, found.tried)]
    yield Table(columns, rows, caption=f"Plans that were run on {judge.images}")


def _in_words(one: TriedPlan) -> str:
    """Say what the plan does."""
    plan, distance = one.plan, getattr(one.method.inner, "frozen_context", 0)
    parts = []
    if plan.scale != 1.0:
        parts.append(f"the image runs at {plan.scale:g} of its sides")
    if plan.exits:
        parts.append(f"tokens may leave after {_blocks_named(plan.exits)} where their exit head is sure")
    if distance:
        parts.append(f"one in {distance**2} of them stays as key and value of those that go on")
    if plan.stop is not None:
        parts.append(f"{'all that are left stop' if plan.exits else 'everybody stops'} after block {plan.stop}")
    return "; ".join(parts) or "the dense model as it is"


def _why(found: Adaptation, judge: Judge) -> str:
    """Say in one sentence why this plan was taken."""
    best, *rivals = found.tried
    if not _within_budget(found):
        if found.shortfall.startswith(NONE_PASSES):
            return "It is the most careful of the plans, none of which passed the test."
        return "Plans were tested from safe to daring, and this is the last, the cheapest, that passed."
    rule = f"of plans as good (within {AS_GOOD:.0%} of the least loss) the simplest is taken"
    unit = judge.pixels if judge.average == "pixels" else f"mIoU against {judge.truth}"
    if not rivals:
        return f"No other plan met the budget; {rule}."
    least = min(rivals, key=lambda one: one.loss)
    if least.loss < best.loss:
        better = _percent(least.loss) - _percent(best.loss)
        return f"{_capital(rule)}: {least.plan} is better by {better:.2f} points only."
    return f"No plan that was run keeps more {unit}; {rule}."


def _within_budget(found: Adaptation) -> bool:
    """Return whether a budget was asked for, and not a bound."""
    return found.model.calibration is not None and not {*UNITS}.isdisjoint(found.model.calibration.asked)


def _kind(one: TriedPlan) -> str:
    return "best mix" if one.kind == "plan" else one.kind


def _budgets(found: Adaptation, judge: Judge, out: Path) -> Iterator[Block]:
    """Yield the curve of other budgets with the plans that were run, and how to take another point."""
    yield (
        f"{judge.words} The curve is the best plan at each budget as predicted from dense passes over {judge.images}; "
        "marks beside it are plans that were run on them. A prediction does not see all that tokens lose when others "
        "leave, so runs with exits tend to come out below it."
    )
    yield _chart(found, judge)
    columns = [
        Column("budget", "{:.0%}", help="Largest mean multiply-adds, as a share of dense."),
        Column("of dense", "{:.0%}", "right", "Predicted multiply-adds over dense ones."),
        Column(judge.figure, "{:.1f}", "right", f"Predicted, not run. {judge.help}"),
        Column("best plan"),
    ]
    rows = [[budget, plan.price, _percent(plan.loss), str(plan)] for budget, plan in found.curve]
    yield Table(columns, rows, caption="Best plan at each budget, predicted")
    budget = _another(found)
    photos = _photo_words(found)
    words = f"--images {photos} --budget {budget:g}"
    if found.model.config.exits:
        yield (
            "For another point with the exits that are there, choose size, stop and thresholds anew. With `--out` a "
            "copy is calibrated, and this model stays as it is:"
        )
        method = "" if found.dense.decode_head.takes_live_tokens else " --method dovit"
        yield Code(f"tokenexit calibrate {_as_word(out)} \\\n  {words} --plan dense{method}")
        yield "For a plan with exits elsewhere, adapt the source again with another budget:"
    else:
        yield "This plan has no exits to choose from: for another point, adapt the source again with another budget:"
    yield Code(f"tokenexit adapt SOURCE \\\n  {words} --out OTHER")


def _another(found: Adaptation) -> float:
    """Return a budget that is not the plan's own."""
    budgets = sorted(budget for budget, _ in found.curve)
    return next((one for one in budgets if one > found.measured.mac_ratio + DEARER), 0.7)


def _photo_words(found: Adaptation) -> str:
    """Return the folder that holds all photos, as a shell takes it, if they are in one."""
    folders = {photo.parent for photo in found.photos}
    return _as_word(folders.pop()) if len(folders) == 1 else "PHOTOS"


def _chart(found: Adaptation, judge: Judge) -> Chart:
    """Draw the figure of plans against their cost: the predicted curve, and every kind of plan that was run."""
    curve = {(plan.price, plan.loss): Point(100 * plan.price, _percent(plan.loss)) for _, plan in found.curve}
    series = [Series("best plan, predicted", sorted(curve.values()))] if curve else []
    best, *rivals = found.tried
    patch_size = found.dense.config.backbone.patch_size

    def measured(one: TriedPlan) -> Point:
        return Point(100 * one.run.mac_ratio, judge.of(one.run, patch_size))

    series.append(Series("chosen, run", [measured(best)]))
    for kind, members in groupby(sorted(rivals, key=_kind), key=_kind):
        series.append(Series(f"{kind}, run", sorted(map(measured, members))))
    figures = [point.y for one in series for point in one.points]
    floor = collapse_floor(figures, max(figures))
    svg = line_chart_svg(
        series, "share of dense multiply-adds, percent", f"{judge.figure}, percent", height=380, floor=floor
    )
    below = " Arrows stand for points below the chart." if floor is not None else ""
    return Chart(
        svg,
        f"Predicted figures and those of runs are both of {judge.images}, on which plans and thresholds were chosen."
        f"{below}",
    )


# ------------------------------------------------------------------------------------------------- blocks and sizes


def _blocks(found: Adaptation, judge: Judge) -> Iterator[Block]:
    """Yield how well tokens are answered after each block, at each size of the image, and what that costs."""
    blocks = [*found.heads, found.dense.depth]
    coarse = "" if found.labelled else COARSE
    yield (
        "After every block an exit head was fitted to the dense model's answers. A token may leave early where such a "
        "head already says what the dense model will say; where a small image or few blocks say it for all tokens, "
        f"exits have nothing to add.{coarse}"
    )
    yield _by_size(
        blocks,
        {scale: [_percent(loss) for loss in losses] for scale, losses in found.static_losses.items()},
        "{:.1f}",
        f"{_capital(judge.figure)} if all tokens stop after a block, by size of the image: predicted, percent",
    )
    yield _by_size(
        blocks, found.static_costs, "{:.0%}", "Multiply-adds over dense ones if all tokens stop there, by size"
    )
    columns = [
        Column("block", "{}"),
        Column("tokens", "{:.1%}", "right", "Share of held-out tokens to which the head gives the dense class."),
        Column("mean over classes", "{:.1%}", "right", "The mean of that share over classes."),
        Column("passes", "{}", "right", "Passes over the tokens until the head no longer improved."),
    ]
    rows = [[block, one.agreement, one.mean_agreement, one.passes] for block, one in found.heads.items()]
    yield Table(columns, rows, caption="Tokens at full size answered as the dense model does, held out from fitting")


def _by_size(blocks: Sequence[int], values: Mapping[float, Sequence[float]], form: str, caption: str) -> Table:
    """Make a table of one row for each block, and one column for each size."""
    scales = sorted(values, reverse=True)
    columns = [Column("block"), *(Column(f"{scale:g}", form, "right") for scale in scales)]
    names = [*map(str, blocks[:-1]), f"{blocks[-1]}, the end"]
    return Table(columns, [[name, *(values[s][n] for s in scales)] for n, name in enumerate(names)], caption=caption)


# ----------------------------------------------------------------------------------------------------------- photos


def _photos(found: Adaptation, shown: int) -> Iterator[Block]:
    """Yield some test photos with the masks of both models, evenly over the test part."""
    labels, plan = found.dense.classes, found.tried[0].plan
    yield "Exit heads, plan and thresholds were made without these photos, which stand evenly over the test part."
    yield Legend("Classes", [Swatch(name, colour) for name, colour in zip(labels.names, labels.palette)])
    if plan.exits:
        yield Legend("Exits", _exit_legend(plan))
    for number in _evenly(len(found.split.test), shown):
        photo = found.photos[found.split.test[number]]
        image = load_image(photo)
        dense, own = found.dense.predict(image, Dense()), found.model.predict(image, found.method)
        yield FigureRow(_figures(found, image, dense, own), title=_readable(photo.name))


def _figures(found: Adaptation, image: Image.Image, dense: Segmentation, own: Segmentation) -> list[Figure]:
    """Make figures of a photo, its dense mask, its adapted mask and, if tokens may leave by exits, the exit map."""
    palette = found.dense.classes.palette
    before, after = dense.labels[0].cpu(), own.labels[0].cpu()
    agreement = (before == after).double().mean().item()
    share = own.ledger.share_of_dense[0]
    figures = [
        Figure(image, "photo"),
        Figure(colorize(before.numpy(), palette), "dense mask", note=f"{dense.ledger.gmacs[0]:.3g} GMACs"),
        Figure(colorize(after.numpy(), palette), "cheaper mask", note=f"{agreement:.1%} of pixels as before"),
    ]
    if found.tried[0].plan.exits:
        height, width = own.sizes[0]
        drawn = exit_map(
            own.exit_index[0].cpu().numpy(),
            own.num_exits,
            (image.height, image.width),
            image=image,
            extent=(height / own.patch_size, width / own.patch_size),
        )
        figures.append(Figure(drawn, "exits", note=f"{share:.0%} of dense"))
    else:
        figures.append(Figure(_unlike(image, before != after), "pixels unlike", note=f"{share:.0%} of dense"))
    return figures


def _unlike(image: Image.Image, unlike: Tensor) -> Image.Image:
    """Draw the pixels that are no longer as they were, dark on a pale photo."""
    return exit_map(unlike.numpy().astype("int64"), 1, (image.height, image.width), image=image)


def _exit_legend(plan: Plan) -> list[Swatch]:
    """Return the legend of exit maps; where everybody stops, nobody stays to the end."""
    if plan.stop is None:
        return exit_legend(len(plan.exits), plan.exits)
    *some, last = exit_legend(len(plan.places), plan.places)[:-1]
    return [*some, last._replace(label=f"All that were left (after block {plan.stop})")]


def _evenly(count: int, shown: int) -> list[int]:
    """Return `shown` of `count` positions, evenly and in order; all if there are fewer."""
    shown = min(count, shown)
    return [(2 * n + 1) * count // (2 * shown) for n in range(shown)]


# ---------------------------------------------------------------------------------------------------------- classes


def _classes(found: Adaptation) -> Iterator[Block]:
    """Yield how much of each class stays, the weakest first and those that are not there last."""
    labels, shares = found.dense.classes, found.measured.agreement_by_class
    missing = sum(share is None for share in shares)
    yield (
        "Share of a class's pixels, where the dense model sees it, that have the same class in the cheaper model; on "
        f"the {found.measured.photos} test photos, the weakest first."
        + (f" Not there: {missing} of {len(shares)} classes." if missing else "")
    )
    rows = sorted(zip(labels.names, labels.palette, shares), key=lambda row: 2.0 if row[2] is None else row[2])
    columns = [Column("class"), Column("pixels as before", "{:.1%}", "right")]
    yield Table(columns, [[Swatch(name, colour), share] for name, colour, share in rows])


# --------------------------------------------------------------------------------------------------------- the rest


def _how(found: Adaptation) -> str:
    """Say what went in."""
    backbone, split, options = found.dense.config.backbone, found.split, found.options
    labels = (
        f"The plan was chosen on {found.labelled} images with labels; exit heads were fitted without any."
        if found.labelled
        else "No labels were used: the dense model's own answers are what heads were fitted to and plans compared with."
    )
    whole = (
        f"The whole model was given {options.finetune} steps more with its exits on, against its own dense twin."
        if options.finetune
        else "Backbone and decode head are those of the source, and so is the dense answer at full size."
    )
    return (
        f"A ViT of {found.dense.depth} blocks and width {backbone.embed_dim}, {len(found.photos)} photos: {split}. "
        f"{labels} {whole} The split and all that was drawn come from seed {options.seed}; the network ran in "
        f"{options.precision} on {found.dense.device}."
    )


def _covers(found: Adaptation) -> str:
    """Say what the figures hold for."""
    measured = found.measured
    chosen = (
        "that nothing was chosen on"
        if _within_budget(found)
        else "that the bound was tested on, from safe plans to daring ones, and that nothing else was chosen on"
    )
    return (
        f"The figures under the title are of {measured.photos} photos {chosen}. They hold for photos of the same kind: "
        "the bound is about others drawn as these were. Photos from elsewhere, of another camera, place or season, "
        "may keep less; to know, adapt with some of them or measure on them. Agreement with the dense model says "
        "nothing of how right that model is. Multiply-adds include exit heads and decode head, from true counts of "
        "tokens; milliseconds are those of this machine, one photo at a time, dense and the plan in turn."
    )


def _as_word(path: Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(_readable(str(path)))


def _readable(text: str) -> str:
    """Return a name with marks for bytes that are no text, which no page can hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _percent(loss: float) -> float:
    """Return 1 less a loss in percent; predicted losses of classes may pass 1."""
    return 100.0 * max(0.0, 1.0 - loss)


def _blocks_named(blocks: Sequence[int]) -> str:
    return f"{'blocks' if len(blocks) > 1 else 'block'} {listed(blocks)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
