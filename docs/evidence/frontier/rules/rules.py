"""Try rules beside the published one: who may leave, and with what answer. Most of them are no part of the library.

    D="--data-root data/camvid"
    python docs/evidence/frontier/rules/rules.py heads neighbours runs/camvid-dense $D --out runs/neighbours
    python docs/evidence/frontier/rules/rules.py heads control runs/camvid-dense $D --out runs/control
    python docs/evidence/frontier/rules/rules.py expected 0.1 runs/camvid-dense $D --out runs/expected
    python docs/evidence/frontier/rules/rules.py run runs/neighbours $D --split val --json FILE
    python docs/evidence/frontier/rules/rules.py learned runs/camvid-dense $D --json FILE
    python docs/evidence/frontier/rules/rules.py context runs/camvid-dense $D --split val --json FILE

heads: fresh exit heads on a dense model whose other weights stay as they are. `neighbours` sees 3x3 patches twice, in
features (a depthwise convolution) and in answers (a convolution over class probabilities), of live patches as they are
and of others as they left; `control` is the FCN head without these.
expected: fine-tuning with exits on and `macs_weight`, now an option of the library.
run: DToP at four sets of thresholds. learned: in place of the best class's probability a small network's score of "the
last head will say the same" (agree) or "this is the label" (right), fitted on validation images; thresholds at which as
many leave on these images. context: the exits of DToP, where those that left stay keys and values, as they were, in
a few later blocks, or in all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenexit.training.loop as loop
from tokenexit.cli.progress import progress_bars
from tokenexit.data.registry import open_dataset
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens, pack_grids, unpack_grids
from tokenexit.engine.vit import ViT
from tokenexit.evaluation.evaluate import Tally, _EvaluatedImage, evaluate, timed_forward
from tokenexit.heads import HEADS, FCNHead, Head, HeadOutput
from tokenexit.methods import Dense, DToP, Method, ModelView
from tokenexit.methods.base import ExitRecord, Result
from tokenexit.methods.dtop import DToPState
from tokenexit.methods.reference import ContextState, FrozenContext, PrescribedExits, patch_labels
from tokenexit.methods.thresholded import Graded
from tokenexit.outputs.ledger import Ledger
from tokenexit.reducers.base import Site
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import TrainConfig
from tokenexit.training.parsing import parse_train

THRESHOLDS: tuple[tuple[float, ...], ...] = ((0.99, 0.95, 0.9), (0.98, 0.9, 0.8), (0.98, 0.8, 0.65), (0.9, 0.7, 0.5))


# -------------------------------------------------------------------------------------- heads that see their neighbours


class NeighbourHead(FCNHead):
    """FCN, before it a depthwise 3x3 convolution over features, behind it a 3x3 convolution over probabilities.

    Both start at zero, as FCN alone. What lies around live tokens is set by the method before a call, `around`.
    """

    def __init__(self, embed_dim: int, num_classes: int, channels: int = 256) -> None:
        super().__init__(embed_dim, num_classes, channels)
        self.features = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        self.answers = nn.Conv2d(num_classes, num_classes, 3, padding=1, bias=False)
        nn.init.zeros_(self.features.weight)
        nn.init.zeros_(self.answers.weight)
        self.around: tuple[Tensor, Tensor] | None = None

    def forward(self, tokens: Tokens) -> HeadOutput:
        here = tokens.position
        features = tokens.x if self.around is None else self.around[0].index_copy(0, here, tokens.x)
        x = tokens.x + _on_grids(self.features, features, tokens).index_select(0, here)
        logits = super().forward(tokens.with_x(x)).logits
        answers = logits if self.around is None else self.around[1].index_copy(0, here, logits.float())
        seen = _on_grids(self.answers, answers.float().softmax(1), tokens).index_select(0, here)
        return HeadOutput(logits + seen, tokens.packing)

    def ops(self, tokens: int, grid: Grid) -> Ops:
        cells, dim, classes = grid[0] * grid[1], self.proj.in_features, self.num_classes
        around = Ops(macs=9 * cells * (dim + classes**2))  # over the whole grid, the plainest way
        return super().ops(tokens, grid) + around


def _on_grids(layer: nn.Conv2d, cells: Tensor, tokens: Tokens) -> Tensor:
    return pack_grids([(members, layer(maps)) for members, maps in unpack_grids(cells, tokens.grids)])


HEADS["fcn_neighbours"] = NeighbourHead


@dataclass(frozen=True, kw_only=True)
class NeighbourState(DToPState):
    """`features (cells, C)`: of live patches as they are, of others as they left."""

    features: Tensor


@dataclass(frozen=True)
class NeighbourDToP(DToP):
    """DToP whose exit heads are told what lies around live tokens."""

    name: ClassVar[str] = "dtop_neighbours"

    def start(self, tokens: Tokens, model: ModelView) -> NeighbourState:
        return NeighbourState(**vars(super().start(tokens, model)), features=tokens.patches().x)

    def at_exit(self, n: int, tokens: Tokens, state: DToPState, model: ModelView) -> tuple[Tokens, DToPState]:
        assert isinstance(state, NeighbourState)
        patches, head = tokens.patches(), model.exit_heads[n]
        state = replace(state, features=state.features.index_copy(0, patches.position, patches.x))
        if isinstance(head, NeighbourHead):
            head.around = (state.features, state.logits.read())
        kept, after = super().at_exit(n, tokens, state, model)
        if isinstance(head, NeighbourHead):
            head.around = None
        return kept, after


def train_heads(options: argparse.Namespace) -> None:
    """Fit exit heads to a dense model that stays as it is."""
    config = _recipe("camvid_heads_only", options)
    kind = "fcn_neighbours" if options.what == "neighbours" else "fcn"
    exits = config.model.exits if options.exits is None else options.exits
    model = replace(config.model, exit_head=kind, exits=exits)
    loop.train(replace(config, model=model, class_weights=None, steps=options.steps or 400))


# ----------------------------------------------------------------------------------------- multiply-adds in the loss


def train_expected(options: argparse.Namespace) -> None:
    """Fine-tune with exits on and expected multiply-adds in the loss."""
    config = replace(_recipe("camvid_dtop_finetune", options), macs_weight=options.weight)
    loop.train(config if options.steps is None else replace(config, steps=options.steps))


# ---------------------------------------------------------------------------------------------- a score that is learned


@dataclass(frozen=True)
class LearnedDToP(DToP):
    """DToP with another score: a small network on what the classifier of an exit's head sees.

    scores: a network for each exit, none for the best class's probability. seen: a list to which exits add scores.
    """

    name: ClassVar[str] = "dtop_learned"

    scores: tuple[nn.Module, ...] = ()
    seen: list[Tensor] | None = None

    def grade(self, n: int, head: Head | ExitRecord, out: HeadOutput, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        best, label = super().grade(n, head, out, grids)
        if self.scores:
            with torch.autocast(best.device.type, enabled=False):
                best = torch.sigmoid(self.scores[n](head.hidden.float()).squeeze(1))  # type: ignore[union-attr]
        return best, label

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(graded.score)
        return super().decide(n, graded, live)


def watch(model: ExitSegmenter) -> None:
    """Let every exit head keep what its classifier was given, as `hidden`."""
    for head in model.exit_heads:
        assert isinstance(head, FCNHead)
        head.classifier.register_forward_pre_hook(lambda _, given, head=head: setattr(head, "hidden", given[0]))


def learned(options: argparse.Namespace) -> dict[str, Any]:
    """Fit scores on validation images, and run the rule with each on test images."""
    model = ExitSegmenter.from_pretrained(options.model).eval()
    watch(model)
    val = open_dataset("camvid", options.data_root, "val")
    hidden, agree, right = _dense_pass(model, val)
    scores = {name: tuple(map(_fit, hidden, target)) for name, target in (("agree", agree), ("right", right))}
    test = open_dataset("camvid", options.data_root, "test")
    rows: list[Method[Any]] = [Dense(), *(LearnedDToP(one) for one in THRESHOLDS)]
    methods: list[tuple[str, tuple[float, ...], tuple[float, ...], LearnedDToP]] = []
    for name, layers in scores.items():
        for one in THRESHOLDS:
            taus = _as_many_leave(model, val, one, layers)
            methods.append((name, one, taus, LearnedDToP(taus, scores=layers)))
    found = evaluate(
        model, test, [*rows, *(m[-1] for m in methods)], precision="bf16", progress=progress_bars()("running")
    )
    figures = [_figures(each) for each in found]
    for row, (name, one, taus, _) in zip(figures[len(rows) :], methods):
        row |= {"label": f"learned, {name}, as many leave as at {one}", "threshold": taus}
    return {"rows": figures}


def _dense_pass(model: ExitSegmenter, data: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return for every exit what its classifier is given, `(n, channels)`, whether it agrees, is right."""
    hidden, agree, right = ([list[Tensor]() for _ in model.exit_heads] for _ in range(3))
    for i in progress_bars()("fitting")(range(len(data))):
        image = _EvaluatedImage.of(data, i, model, {1.0})
        with inference(model.device, "bf16"):
            out = model([image.images[1.0]], Dense(), with_records=True)
        truth = patch_labels(image.truth, model.config.backbone.patch_size, model.config.num_classes, 255)
        answers = [record.logits.argmax(1) for record in out.exit_records if record.logits is not None]
        known = truth >= 0
        for n, head in enumerate(model.exit_heads):
            hidden[n].append(torch.as_tensor(head.hidden).float()[known])
            agree[n].append((answers[n] == answers[-1])[known])
            right[n].append((answers[n] == truth)[known])
    return [torch.cat(one) for one in hidden], [torch.cat(one) for one in agree], [torch.cat(one) for one in right]


def _fit(x: Tensor, y: Tensor) -> nn.Module:
    """Fit a network of one hidden layer on standardised inputs, in steps of 4,096 rows."""
    layer = nn.Sequential(
        nn.BatchNorm1d(x.shape[1], affine=False, momentum=None), nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 1)
    )
    layer(x)
    layer.eval()
    optimizer = torch.optim.AdamW(layer.parameters(), 3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        rows = torch.randint(len(x), (4096,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(layer(x[rows]).squeeze(1), y[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.requires_grad_(False)


def _as_many_leave(
    model: ExitSegmenter, data: Any, thresholds: Sequence[float], layers: tuple[nn.Module, ...]
) -> tuple[float, ...]:
    """Return thresholds of the learned score at which as many leave as by the best class's, exit by exit."""
    found: list[float] = []
    images = [_EvaluatedImage.of(data, i, model, {1.0}).images[1.0] for i in range(0, len(data), 2)]
    for n in range(len(thresholds)):
        mine: list[Tensor] = []
        others: list[Tensor] = []
        with inference(model.device, "bf16"):
            for image in images:
                for tau, scores, into in (
                    (thresholds, (), others),
                    ((*found, *[1.0] * (len(thresholds) - n)), layers, mine),
                ):
                    recorded: list[Tensor] = []
                    method = LearnedDToP(tau, scores=scores, seen=recorded)
                    model([image], method)
                    into.append(recorded[n])
        above = float((torch.cat(others) > thresholds[n]).float().sum()) / len(torch.cat(mine))
        found.append(float(torch.quantile(torch.cat(mine)[::7], max(0.0, 1.0 - above))))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------- what they give


@dataclass(frozen=True, eq=False)
class BriefContext(FrozenContext):
    """`FrozenContext` for a few blocks: tokens that left are gone behind them.

    blocks: how many. exits: number of blocks before each exit.
    """

    name: ClassVar[str] = "imposed_in_brief_context"

    blocks: int = 1
    exits: tuple[int, ...] = (3, 6, 9)

    def at_exit(self, n: int, tokens: Tokens, state: DToPState, model: ModelView) -> tuple[Tokens, DToPState]:
        assert isinstance(state, ContextState)
        assert self.exit_index is not None
        patches = tokens.patches()
        live = ~state.left.index_select(0, patches.position)
        _, seen = PrescribedExits.at_exit(self, n, tokens.keep(live), state, model)
        assert isinstance(seen, ContextState)
        frozen = state.frozen.index_copy(0, patches.position[live], patches.x[live])
        return tokens, replace(seen, frozen=frozen, left=self.exit_index <= n)

    def at_site(self, site: Site, tokens: Tokens, state: DToPState, qkv: Tensor | None) -> Tokens:  # noqa: ARG002
        assert isinstance(state, ContextState)
        assert self.exit_index is not None
        until = torch.tensor([*(exit + self.blocks for exit in self.exits), 10**6])[self.exit_index]
        here = tokens.patches().position
        stays = ~state.left[here] | (until[here] > site.after)
        tokens = tokens.keep(stays)
        patches = tokens.patches()
        x = torch.where(state.left[patches.position, None], state.frozen[patches.position], patches.x)
        return tokens.with_x(tokens.x.index_copy(0, tokens.patch_index(), x))

    def result(self, tokens: Tokens, state: DToPState, model: ModelView) -> Result:
        assert isinstance(state, ContextState)
        live = ~state.left.index_select(0, tokens.patches().position)
        return PrescribedExits.result(self, tokens.keep(live), state, model)


def brief_ledger(ledger: Ledger, backbone: ViT, exit_index: Tensor, exits: Sequence[int], blocks: int) -> Ledger:
    """Add to the ledger of one image, of DToP alone, what queries of live tokens and these keys take."""
    (live,), (part,), prefix = ledger.live, ledger.parts, backbone.config.num_prefix_tokens
    extra = Ops()
    for block, queries in enumerate(live[: backbone.config.depth]):
        keys = sum(int((exit_index == n).sum()) for n, at in enumerate(exits) if at <= block < at + blocks)
        if queries and keys:
            extra += backbone.frozen_ops(queries + prefix, keys)
    return replace(ledger, parts=(replace(part, blocks=part.blocks + extra.macs),))


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Run DToP's own exits where those that left stay keys and values, for a few blocks or to the end (9)."""
    model = ExitSegmenter.from_pretrained(options.model).eval()
    data = open_dataset("camvid", options.data_root, options.split)
    exits, spans = model.config.exits, (1, 2, 3, 9)
    alone = [Tally(DToP(one), f"dtop {one}", 11) for one in THRESHOLDS]
    kept = [[Tally(DToP(one), f"dtop {one}, in context for {m} blocks", 11) for m in spans] for one in THRESHOLDS]
    for i in progress_bars()("running")(range(len(data))):
        image = _EvaluatedImage.of(data, i, model, {1.0})
        for tally, others in zip(alone, kept):
            output, ms = timed_forward(model, image.images[1.0], tally.method, image.size, "bf16")
            tally.add(output, image, 255, exits, ms)
            index = torch.cat([one.flatten() for one in output.windows.exit_index])
            for span, other in zip(spans, others):
                method = BriefContext(exit_index=index, blocks=span, exits=exits)
                with inference(model.device, "bf16"):
                    stays = model.segment([image.images[1.0]], method, targets=[image.size])
                ledger = brief_ledger(output.windows.ledger, model.backbone, index, exits, span)
                stays = stays.with_windows(replace(stays.windows, ledger=ledger))
                other.add(stays, image, 255, exits, float("nan"))
    return {"rows": [_figures(row.finish()) for rows in zip(alone, *zip(*kept)) for row in rows]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run DToP at four sets of thresholds, and stops after every exit."""
    model = ExitSegmenter.from_pretrained(options.model).eval()
    data = open_dataset("camvid", options.data_root, options.split)
    kind: type[DToP] = NeighbourDToP if isinstance(model.exit_heads[0], NeighbourHead) else DToP
    thresholds = options.thresholds or THRESHOLDS
    methods: list[Method[Any]] = [Dense(), *(kind(tuple(one)) for one in thresholds)]
    stop = len(model.config.exits)
    methods += [kind(tuple(one), stop=stop) for one in thresholds]
    found = evaluate(model, data, methods, precision="bf16", references=["depths"], progress=progress_bars()("running"))
    return {"rows": [_figures(one) for one in found]}


def _figures(one: Any) -> dict[str, Any]:
    return {
        "label": one.label,
        "of_dense": round(one.share_of_dense, 4),
        "gmacs": round(one.gmacs_mean, 4),
        "mIoU": round(one.scores.miou, 3),
        "boundary_IoU": round(one.boundary_iou, 3),
        "live": [round(x, 4) for x in one.live_mean],
    }


def _recipe(name: str, options: argparse.Namespace) -> TrainConfig:
    places = ["--model.init_from", str(options.model), "--data.root", str(options.data_root), "--out", str(options.out)]
    config, _ = parse_train(["--config", name, *places, "--seed", str(options.seed)], lambda _: None)
    return config


def _taus(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split("/")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("heads", "expected", "run", "learned", "context"):
        command = commands.add_parser(name)
        if name == "heads":
            command.add_argument("what", choices=("neighbours", "control"))
            command.add_argument("--exits", type=int, nargs="+")
        if name == "expected":
            command.add_argument("weight", type=float)
        command.add_argument("model", type=Path)
        command.add_argument("--data-root", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--steps", type=int)
        command.add_argument("--split", default="val")
        command.add_argument("--thresholds", type=_taus, nargs="+")
        command.add_argument("--out", type=Path)
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    does = {"heads": train_heads, "expected": train_expected, "run": run, "learned": learned, "context": context}
    found = does[options.command](options)
    if found is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        for row in found["rows"]:
            print(f"{row['label']:60s} {row['of_dense']:7.1%} {row['mIoU']:6.2f}")


if __name__ == "__main__":
    main()
