"""DToP: Dynamic Token Pruning (Tang et al., ICCV 2023, arXiv 2308.01045).

After a few blocks an auxiliary head scores every live token. A token whose best class scores above the threshold is
easy: its prediction goes to the canvas and it takes no part in later blocks. Of each predicted class the k most
confident easy tokens stay, as context and, for ATM heads, as witnesses that the class is present. The canvas is the
result.

Source: the paper, and where it is silent the official release (github.com/zbwxp/Dynamic-Token-Pruning). Where this
differs from the release, and why:

- images are packed, not looped over; the result of an image does not depend on its batch;
- prefix tokens are never scored and never leave; the paper runs without any, so does `class_token=False`;
- features of exited tokens are dropped, not set to zero; nobody reads them either way;
- `finish="frozen"` is offered beside the published finish, in which a later head's presence re-weighs what left;
- a decode head of masks (EoMT), which is younger than the paper, sees live tokens in its blocks, and the features with
  which others left where it makes masks of the whole grid: the backdrop. `finish="masks"`, ours, takes its answer for
  exited tokens, too;
- `keep_in_window`, ours and off by default: the most confident easy token of each square of patches stays, too, so
  that context is spread over the image and not only over classes;
- `frozen_context`, ours and off by default: some of the tokens that left stay as keys and values of those that go on,
  spread evenly over the image, with the features they left with;
- `context_weight`, ours and off by default: tokens that stay count in attention for those of their class that have
  left, so that what is common in the image does not become rare in its context.

Legend: P live patch tokens of the batch, cells = all patches of all images, K classes, B images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokenexit.engine.tokens import Grid, Tokens, cell_packing
from tokenexit.errors import ConfigError
from tokenexit.heads import Head, HeadOutput, class_scores
from tokenexit.methods.base import (
    Canvas,
    ExitRecord,
    Method,
    ModelView,
    Result,
    Value,
    all_stay,
    decode_grid,
    option,
    record_of,
)
from tokenexit.methods.selection import confidence, inherit, lattice, scale_logits
from tokenexit.methods.thresholded import Graded, ThresholdMethod, check_share, of_exit, per_exit

Finish = Literal["auto", "presence_last", "frozen", "masks"]

KEEP_PER_CLASS = 5
"""As published."""
PLANNED_CONTEXTS: tuple[dict[str, int], ...] = (
    {"keep_per_class": 1, "frozen_context": 3},
    {"keep_per_class": 0, "keep_in_window": 4, "frozen_context": 2},
)
"""What plans compare with `KEEP_PER_CLASS` alone: a little for little, and what was best without training."""


@dataclass(frozen=True)
class DToPState:
    """The state that travels from exit to exit.

    Attributes:
        logits: canvas `(cells, K)` of (mask) logits.
        scores: canvas `(cells, K)` of scores where the finish needs it, else None.
        exit_index: canvas `(cells,)` int64 of the last exit that saw each token.
        label: canvas `(cells,)` int64 of the class that the last head to see a token predicted, for the boundary guard.
        presence: `(B, K, 2)` of the last head that saw a token of the image (ATM), else None.
        exit_records: one for each exit so far.
        backdrop: for a decode head of masks, canvas `(cells, C)`: features of each token when an exit last saw it; else
            None.
    """

    logits: Canvas
    scores: Canvas | None
    exit_index: Canvas
    label: Canvas
    presence: Tensor | None = None
    exit_records: tuple[ExitRecord, ...] = ()
    backdrop: Canvas | None = None
    mass: Tensor | None = None


@dataclass(frozen=True)
class DToP(ThresholdMethod[DToPState]):
    """Dynamic Token Pruning: a token whose best class scores above the threshold leaves with that prediction.

    Attributes:
        threshold: p0 of the paper, a score in [0, 1]; 0.95 is published for ATM heads, 0.98 is better for FCN heads.
            One for all exits or one for each; thresholds by class are not published for DToP.
        keep_per_class: k of the paper, how many tokens of each predicted class stay at every exit; 5 as published, 0
            keeps none.
        keep_in_window: side, in patches, of squares in each of which the most confident easy token stays, whatever its
            class; beside the k of each class. 0 is published; with 4 and no training a model in which one class is
            most of the image loses far less (docs/evidence/frontier.md).
        finish: "presence_last" scores exited tokens with the presence of the last head, as the release does with ATM
            heads throughout; "frozen" keeps the scores a token left with; "masks" takes the masks of a decode head that
            has them for exited tokens, too; "auto" is presence_last where all heads are ATM, else frozen.
        detach_canvas: in training, stop the gradient of later losses into tokens that exited earlier (published: no).
        context_weight: power p in [0, 1]. Tokens that leave are shared out among live ones of their image and predicted
            class; one that then stands for m patches counts as m ** p keys in attention. 0 is published; 0.5 helps a
            model that was trained without exits where one class is most of the image (docs/evidence/frontier.md).
        frozen_context: distance w of rows and columns on whose crossings tokens that leave stay as context: keys and
            values in all later blocks, with the features they left with, at a sixth of a live token's price. 0 is
            published; 2 with keep_in_window=4 wins back what a model that was trained without exits loses where one
            class is most of the image (docs/evidence/frontier.md).
        threshold_warmup: share of the training over which thresholds fall from 1 to their value.
        cap: for each exit the share of an image's tokens that may go on, see `ThresholdMethod`.
        score: "probability", "margin" or "entropy"; the published "probability" of ATM heads is presence times sigmoid.
        temperature: of the exit heads' softmax, one for all exits or one for each.
        boundary_guard: no exits where predicted classes meet.
        stop: the exit, 1 the first, at which all tokens that are left leave, whatever k, guard and cap say; the network
            ends there. None lets them go on to the end.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "dtop"
    title: ClassVar[str] = "DToP"
    may_gate: ClassVar[bool] = True
    decodes_grid: ClassVar[bool] = False

    keep_per_class: int = option(
        KEEP_PER_CLASS, "most confident tokens of each predicted class that stay at every exit"
    )
    finish: Finish = option(
        "auto", "scores of exited tokens in the result", choices=("auto", "presence_last", "frozen", "masks")
    )
    detach_canvas: bool = option(False, "no gradient of later losses into tokens that exited earlier")
    keep_in_window: int = option(
        0,
        "side in patches of windows in each of which the most confident token that may leave stays, whatever its "
        "class; 0 for none",
        kw_only=True,
    )
    context_weight: float = option(
        0.0,
        "power of the number of patches that a live token stands for, which have left, by which attention counts it",
        kw_only=True,
    )
    frozen_context: int = option(
        0,
        "distance of rows and columns on whose crossings tokens that left stay keys and values of those that go on; "
        "0 for none",
        kw_only=True,
    )
    stop: int | None = option(
        None, "number of the exit at which all tokens that are left leave, 1 the first", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_per_class < 0:
            raise ConfigError(f"keep_per_class must be at least 0, got {self.keep_per_class}: use 0 to keep none.")
        check_share("context_weight", self.context_weight)
        if self.keep_in_window < 0 or self.keep_in_window == 1:
            raise ConfigError(
                f"keep_in_window must be 0 or at least 2 patches, got {self.keep_in_window}: in windows of one patch "
                "nobody would leave."
            )
        if self.frozen_context < 0:
            raise ConfigError(
                f"frozen_context must be at least 0, got {self.frozen_context}: 1 keeps all tokens as keys, 0 none."
            )
        if self.frozen_context and self.context_weight:
            raise ConfigError("frozen_context and context_weight do not go together: leave one at 0.")
        if self.finish not in get_args(Finish):
            raise ConfigError(f"finish must be auto, presence_last, frozen or masks, got '{self.finish}': choose one.")
        if self.stop is not None and self.stop < 1:
            raise ConfigError(f"stop must be at least 1, got {self.stop}: it counts exits, 1 is the first.")

    @property
    def last_exit(self) -> int | None:
        return None if self.stop is None else self.stop - 1

    @property
    def contexts(self) -> tuple[DToP, ...]:
        chosen = (self.keep_per_class, self.keep_in_window, self.frozen_context, self.context_weight)
        if chosen != (KEEP_PER_CLASS, 0, 0, 0.0):
            return ()
        return tuple(replace(self, **context) for context in PLANNED_CONTEXTS)  # type: ignore[arg-type]

    @property
    def seen_on(self) -> float:
        return 1 / self.frozen_context**2 if self.frozen_context else 0.0

    @property
    def min_live(self) -> int:
        return int(self.keep_per_class > 0 or self.keep_in_window > 0)

    def for_export(self) -> Method[Any]:
        if self.min_live == 0:
            raise ConfigError(
                "with keep_per_class=0 no token may be left, and heads cannot be traced on none: export with 1 or more."
            )
        return super().for_export()

    def check(self, model: ModelView) -> None:
        super().check(model)
        if self.stop is not None and self.stop > model.num_exits:
            raise ConfigError(
                f"stop must be at most {model.num_exits}, the number of exits, got {self.stop}: choose one of them."
            )
        if self.stop is not None and model.with_records:
            raise ConfigError("a stop leaves no map at later exits: train and record exits without it.")
        heads = (*model.exit_heads, model.decode_head)
        temperatures = per_exit(self.temperature, model.num_exits, "temperature")
        if any(head.kind == "atm" and (self.score == "entropy" or t != 1.0) for head, t in zip(heads, temperatures)):
            raise ConfigError(
                "scores of ATM heads are no distribution over classes, and this model has an ATM exit head: "
                "leave temperature at 1, and choose score='probability' or 'margin'."
            )
        if not all(head.takes_live_tokens for head in heads):
            raise ConfigError(
                "DToP runs its heads on live tokens only, and this model has a head that needs the whole grid: "
                "use DoViT, or token heads (linear, fcn, setr_naive, atm, mask_transformer)."
            )
        if self.finish == "masks" and model.decode_head.kind != "masks":
            raise ConfigError("finish='masks' needs a decode head of masks (eomt): use finish='frozen'.")
        if self.stop is not None and model.decode_head.kind == "masks":
            raise ConfigError(
                "stop ends the network before a decode head of masks, whose answers are finer than those of exits: "
                "leave it out."
            )
        for name in ("context_weight", "frozen_context"):
            if getattr(self, name) and model.decode_head.kind == "masks":
                raise ConfigError(
                    f"{name} is of the backbone's attention, and this model's last blocks are its decode head's "
                    "(eomt): leave it at 0."
                )
        if self.finish == "presence_last" and _kinds(model) != {"atm"}:
            raise ConfigError(
                "finish='presence_last' needs ATM heads at every exit and at the end: use finish='frozen'."
            )
        if model.with_records and len(_kinds(model) - {"masks"}) > 1:
            raise ConfigError(
                "DToP cannot record exits of a model that mixes ATM and softmax heads, as training does: "
                "use one kind of head throughout."
            )

    def start(self, tokens: Tokens, model: ModelView) -> DToPState:
        empty = Canvas(tokens.x.new_zeros((tokens.cells, model.num_classes), dtype=torch.float32))
        everywhere = all_stay(tokens, model.num_exits)
        return DToPState(
            logits=empty,
            scores=empty if canvas_value(model, self.finish) == "scores" else None,
            exit_index=Canvas(everywhere),
            label=Canvas(everywhere),
            backdrop=Canvas(tokens.patches().x) if model.decode_head.takes_backdrop else None,
            mass=torch.ones(tokens.cells, device=tokens.x.device) if self.context_weight else None,
        )

    def at_exit(self, n: int, tokens: Tokens, state: DToPState, model: ModelView) -> tuple[Tokens, DToPState]:
        # Score: the exit head sees live tokens only.
        head, patches = model.exit_heads[n], tokens.patches()
        out = head(patches)

        # Rule: candidates are above p0; the k most confident of each class stay, and one of each window if asked for.
        with torch.no_grad():
            score, label = self.grade(n, head, out, patches.grids)
            labels = state.label.write(patches.position, label)
            last_label = patches.spread(labels.read()) if self.boundary_guard else None
            graded = Graded(
                score, label, patches.packing, patches.grids, model.num_classes, last_label, patches.position
            )
            leaves = self.decide(n, graded, torch.ones_like(label, dtype=torch.bool))

        # Canvas: the head's logits, where later heads will not write again.
        state = self._write(head, patches, out, state, model)
        state = replace(state, label=labels, exit_index=state.exit_index.write(patches.position, n))
        if state.backdrop is not None:
            state = replace(state, backdrop=state.backdrop.write(patches.position, patches.x))

        # Carrier: the retained tokens alone; tokens that leave take no part in later blocks. None follows a stop.
        if n == self.last_exit:
            return tokens, state
        kept = tokens.keep(~leaves)
        merged = state.mass is not None and patches.cover is not None  # which count by their size from here on
        if kept is tokens and not merged:
            return tokens, state
        if self.frozen_context:
            seen_on = leaves & lattice(patches.grids, self.frozen_context, patches.position)
            kept = replace(kept, frozen=tokens.freeze(seen_on).frozen)
        return (kept, state) if state.mass is None else self._weighed(kept, state.mass, patches, graded, leaves, state)

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        """Let easy tokens leave, but for the k most confident of each predicted class (`PruneHead` of the release).

        At a stop all leave.
        """
        if n == self.last_exit:
            return live
        easy = self.guard(graded, live & self.confident(n, graded))
        stay = graded.most_confident(easy, self.keep_per_class)  # some of the easy ones
        if self.keep_in_window:
            stay = stay | graded.most_confident_in_windows(easy, self.keep_in_window)
        return self.limit(n, graded, easy ^ stay, live)

    def grade(self, n: int, head: Head | ExitRecord, out: HeadOutput, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        logits = scale_logits(out.logits, of_exit(self.temperature, n))
        image = None if out.presence is None else out.packing.image_index()
        probabilities = class_scores(head.kind, logits, out.presence, image)
        best, label = probabilities.max(dim=-1)
        return best if self.score == "probability" else confidence(probabilities, self.score), label

    def result(self, tokens: Tokens, state: DToPState, model: ModelView) -> Result:
        patches = tokens.patches()
        if self.last_exit is None:
            state = replace(state, exit_index=state.exit_index.write(patches.position, model.num_exits))
        exit_index = tokens.spread(state.exit_index.read())
        if state.backdrop is not None:
            return self._masks(tokens, state, exit_index, model)
        if self.last_exit is None:
            patches = patches.with_x(model.norm(patches.x))
            out = model.decode_head(patches)
            state = self._write(model.decode_head, patches, out, state, model)
        else:  # nobody is left for later heads
            did_not_run = (ExitRecord(),) * (model.num_exits - self.last_exit)
            state = replace(state, exit_records=(*state.exit_records, *did_not_run))
        value = canvas_value(model, self.finish)
        if value == "logits" and model.decode_head.kind == "atm":  # presence_last
            image = cell_packing(tokens).image_index()
            scores = class_scores("atm", tokens.spread(state.logits.read()), state.presence, image)
            return Result(scores, "scores", state.exit_records, exit_index)
        canvas = state.logits if state.scores is None else state.scores
        return Result(tokens.spread(canvas.read()), value, state.exit_records, exit_index)

    def _masks(self, tokens: Tokens, state: DToPState, exit_index: Tensor, model: ModelView) -> Result:
        """Finish with a decode head of masks, which sees the backdrop behind live tokens."""
        assert state.backdrop is not None
        result = decode_grid(tokens, state.exit_records, exit_index, model, state.backdrop.read())
        if self.finish == "masks" or state.scores is None:
            return result
        return replace(result, frozen=state.scores.read())

    def _weighed(
        self, kept: Tokens, mass: Tensor, patches: Tokens, graded: Graded, leaves: Tensor, state: DToPState
    ) -> tuple[Tokens, DToPState]:
        """Return the kept tokens with their weights as keys; they inherit what left stands for."""
        with torch.no_grad():
            images, image = len(graded.grids), graded.packing.image_index()
            if patches.cover is not None:  # a merged token stands for its cells
                mass = torch.zeros_like(mass).index_add(0, patches.cover, mass)
            own = mass.index_select(0, patches.position)
            own = inherit(own, leaves, graded.label, image, images, graded.num_classes)
            mass = torch.zeros_like(mass).index_copy(0, patches.position, own)
            counts = torch.cat([mass**self.context_weight, mass.new_ones(1)])  # the last for prefix tokens
            weight = counts.index_select(0, torch.where(kept.position < 0, mass.shape[0], kept.position))
            if kept.detail is not None:  # a token that is split later leaves an equal part to each of its cells
                mass = patches.spread(mass.index_copy(0, patches.position, own / patches.sizes()))
                kept = replace(kept, detail=replace(kept.detail, weight=mass**self.context_weight))
        return replace(kept, weight=weight), replace(state, mass=mass)

    def _write(self, head: Head, patches: Tokens, out: HeadOutput, state: DToPState, model: ModelView) -> DToPState:
        """Write a head's output to the live cells of the canvas; exited cells stay as they are."""
        logits = (state.logits.detached() if self.detach_canvas else state.logits).write(patches.position, out.logits)
        if model.with_records:
            logits = logits.settled()
        scores = state.scores
        if scores is not None:
            live = class_scores(head.kind, out.logits, out.presence, out.packing.image_index())
            scores = scores.write(patches.position, live)
        presence = _latest_presence(out, state.presence)
        recorded = (patches.spread(logits.rows), patches) if model.with_records else (None, None)
        record = record_of(head, patches, replace(out, presence=presence), *recorded)
        return replace(
            state, logits=logits, scores=scores, presence=presence, exit_records=(*state.exit_records, record)
        )


def _kinds(model: ModelView) -> set[str]:
    return {head.kind for head in (*model.exit_heads, model.decode_head)}


def canvas_value(model: ModelView, finish: str) -> Value:
    """Return what the canvas must hold so that all its cells mean the same."""
    kinds = _kinds(model)
    if kinds == {"softmax"} or (kinds == {"atm"} and finish != "frozen"):
        return "logits"
    return "scores"


def _latest_presence(out: HeadOutput, before: Tensor | None) -> Tensor | None:
    """Return the presence logits of this head; for an image of which it saw no token, those of the last that did."""
    if out.presence is None or before is None or min(out.packing.lengths) > 0:
        return out.presence if out.presence is not None else before
    saw = out.packing.offsets.diff() > 0
    return torch.where(saw[:, None, None], out.presence, before.to(out.presence.dtype))
