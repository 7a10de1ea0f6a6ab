"""DoViT: Dynamic Token-Pass Transformers (Liu et al., WACV 2024, arXiv 2308.01944).

At each exit a light head scores the whole grid; patches with a score above the threshold are stopped. The class token
takes up their mean, and only the kept tokens go through the following blocks, computed separately. In the end all
tokens are put back in place, stopped ones with the features they had when they stopped, and the ordinary decode head
reads the full grid. Where the paper is silent, this follows the official release (github.com/FLHonker/DoViT-code,
backbone `do_vit.py`), whose checkpoints are the exits here.

Where this differs from the release, and why:

- `batch_mode="exact"`: every image keeps its own tokens; the release keeps as many of each image as the batch does
  on average, so that an image's answer depends on its neighbours ("mean");
- the second criterion compares with the previous exit's score; in the release it compares with zero, and so
  stops every token until scores have passed delta, at the start of a training. It is off by default;
- the sequence is put back at exits and at the end, not after every block;
- `rejoin`, off by default, lets stopped patches run through the last blocks again;
- a model with `stage_adapter`, off by default, has an adapter of each exit in place of the final norm for the patches
  that stopped there;
- the threshold warm-up is a function of the saved training step, which the release forgets at a restart.

Legend: P live patch tokens of the batch, cells = all patches of all images, T all tokens with prefix, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing, Tokens, cell_packing, scatter
from tokenexit.errors import ConfigError
from tokenexit.heads import Head, HeadOutput
from tokenexit.methods.base import (
    Canvas,
    ExitRecord,
    Method,
    ModelView,
    Result,
    Thresholds,
    all_stay,
    check_rejoin,
    check_rejoin_place,
    decode_grid,
    option,
    record_of,
    rejoin_sites,
)
from tokenexit.methods.selection import nobody, pooled_label, pooled_score
from tokenexit.methods.thresholded import Graded, ThresholdMethod, check_share, of_exit, per_class
from tokenexit.reducers.base import Site


@dataclass(frozen=True)
class DoViTState:
    """The state that travels from exit to exit.

    Attributes:
        full: the complete sequence, stopped tokens with the features they stopped with.
        keep: `(cells,)` bool, patches that no exit has stopped.
        score: `(cells,)` scores of the previous exit, None before the first.
        exit_index: canvas `(cells,)` int64 of the last exit at which each token was live; with `rejoin`, of the exit
            at which it stopped.
        label: `(cells,)` int64, the class predicted for each patch when last computed; None without boundary guard.
        exit_records: one for each exit so far.
    """

    full: Tokens
    keep: Tensor
    score: Tensor | None
    exit_index: Canvas
    label: Tensor | None
    exit_records: tuple[ExitRecord, ...] = ()


@dataclass(frozen=True)
class DoViT(ThresholdMethod[DoViTState]):
    """Dynamic Token-Pass: a patch whose score is above the threshold stops; the decode head reads its last features.

    Attributes:
        threshold: tau of the paper, a score in [0, 1]. Published: 0.985 (Cityscapes), 0.95 to 0.98 (ADE20K). One for
            all exits or one for each; thresholds by class are not published for DoViT.
        min_improvement: delta of the paper, stop also where the score grew by less since the previous exit; None is
            off.
        blend_trigger: blend into the class token only if the share of stopped tokens is strictly above this.
        blend_weight: weight in [0, 1] of the stopped tokens' mean in the class token, 0.5 as published, 0 without
            blend.
        batch_mode: "exact", or "mean" for the release's one token count per batch.
        scoring: "grid" scores all patches, as published; "live" skips stopped ones at inference, with the same result
            for heads that look at one token at a time. Where exits are recorded, as in training, the grid is scored.
        detach_aux: stop the exit heads' losses from reaching the backbone; published: no.
        rejoin: number of last blocks before which stopped patches come back, with the features they stopped with, to
            run through them as all others (last-layer fusion, of Token Cropr); None, as published, never.
        threshold_warmup: share of the training over which thresholds fall from 1 to their value; 0.875 in the published
            Segmenter recipes.
        cap: for each exit the share of an image's tokens that may go on, see `ThresholdMethod`.
        score: "probability", "margin" or "entropy".
        temperature: of the exit heads' softmax, one for all exits or one for each.
        boundary_guard: no exits where predicted classes meet.

    Raises:
        ConfigError: for a value out of range, and for options that exclude each other.
    """

    name: ClassVar[str] = "dovit"
    title: ClassVar[str] = "DoViT"
    may_gate: ClassVar[bool] = True
    decodes_grid: ClassVar[bool] = True

    threshold: Thresholds = 0.985
    min_improvement: float | None = option(None, "growth of the score since the previous exit below which patches stop")
    blend_trigger: float = option(0.1, "share of stopped tokens above which they are blended into the class token")
    blend_weight: float = option(0.5, "share of the stopped tokens' mean in the class token")
    batch_mode: Literal["exact", "mean"] = option(
        "exact", "number of live tokens: each image's own, or the batch's mean", choices=("exact", "mean")
    )
    scoring: Literal["grid", "live"] = option(
        "grid", "patches that exit heads score: all, or live ones", choices=("grid", "live")
    )
    detach_aux: bool = option(False, "no gradient of the exit heads' losses into the backbone")
    rejoin: int | None = option(None, "number of last blocks before which tokens that left come back", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and self.batch_mode == "mean":
            raise ConfigError("cap limits every image by itself, which batch_mode='mean' does not: use 'exact'.")
        check_share("blend_trigger", self.blend_trigger)
        check_share("blend_weight", self.blend_weight)
        check_rejoin(self.rejoin)
        if self.batch_mode not in ("exact", "mean"):
            raise ConfigError(f"batch_mode must be exact or mean, got '{self.batch_mode}': choose one.")
        if self.scoring not in ("grid", "live"):
            raise ConfigError(f"scoring must be grid or live, got '{self.scoring}': choose one.")
        if self.scoring == "live" and self.batch_mode == "mean":
            raise ConfigError(
                "batch_mode='mean' drops tokens that must be scored again later: "
                "use scoring='grid', or batch_mode='exact'."
            )

    @property
    def batch_independent(self) -> bool:
        return self.batch_mode == "exact"

    @property
    def scores_grid(self) -> bool:
        return self.scoring == "grid"

    @property
    def adapts_stopped(self) -> bool:
        return self.rejoin is None

    def for_export(self) -> Method[Any]:
        if not self.batch_independent:
            raise ConfigError("batch_mode='mean' means nothing for one image: export with batch_mode='exact'.")
        return super().for_export()

    def check(self, model: ModelView) -> None:
        super().check(model)
        check_rejoin_place(self.rejoin, model)
        if any(head.kind != "softmax" for head in model.exit_heads):
            raise ConfigError(
                "DoViT scores tokens by class probability, and this model has ATM exit heads: "
                "use DToP, or exit heads such as fcn."
            )
        if self.blend_weight > 0.0 and not model.has_class_token:
            raise ConfigError(
                "DoViT blends stopped tokens into the class token, and this model has none: "
                "build it with class_token=True, or set blend_weight=0."
            )
        if self.scoring == "live" and not all(h.pointwise and h.upscale == 1 for h in model.exit_heads):
            raise ConfigError(
                "scoring='live' needs exit heads that look at one token at a time (linear, fcn): use scoring='grid'."
            )

    def start(self, tokens: Tokens, model: ModelView) -> DoViTState:
        if self.batch_mode == "mean" and not tokens.packing.uniform:
            raise ConfigError(
                "batch_mode='mean' needs images of one size in a batch: resize them, or use batch_mode='exact'."
            )
        keep = torch.ones(tokens.cells, dtype=torch.bool, device=tokens.x.device)
        label = torch.zeros_like(keep, dtype=torch.int64) if self.boundary_guard else None
        return DoViTState(tokens.unmerged(), keep, None, Canvas(all_stay(tokens, model.num_exits)), label)

    def at_exit(self, n: int, tokens: Tokens, state: DoViTState, model: ModelView) -> tuple[Tokens, DoViTState]:
        # Reconstruction: all tokens in grid order, stopped ones with stale features.
        full = _put_back(state.full, tokens)
        patches, live = full.patches(), tokens.patches()

        # Score, and decide; the decision carries no gradient.
        score, label, record = self._graded(n, patches, live, model)
        with torch.no_grad():
            cells = cell_packing(tokens)
            last_label = None if state.label is None else _latest_label(tokens, live, label, state.label)
            graded = Graded(score, label, cells, tokens.grids, model.num_classes, last_label, earlier=state.score)
            candidates = _that_stand(state.keep, tokens)  # of merged cells, the one that is decided for
            keep = tokens.spread(candidates ^ self.decide(n, graded, candidates))
            chosen = keep if self.batch_mode == "exact" else _mean_count(keep, cells)
            stopped = ~chosen
            # Who is live at the end is seen there, unless all come back before it.
            seen = live.position if self.rejoin is None else live.position[stopped[live.position]]
            exit_index = state.exit_index.write(seen, n)

        # Carrier: the class token takes up the mean of everything stopped so far.
        if self.blend_weight > 0.0 and not nobody(stopped):
            mean, share = _stopped_mean(patches.x, stopped, cells, full)
            full = blend(full, mean, share > self.blend_trigger, self.blend_weight)

        # Separate: only the chosen tokens go on.
        state = DoViTState(full, keep, score, exit_index, last_label, (*state.exit_records, record))
        if tokens.cover is None and nobody(stopped):
            return full, state
        return replace(full, cover=tokens.cover, detail=tokens.detail).keep(_that_stand(chosen, tokens)), state

    def sites(self, depth: int) -> tuple[Site, ...]:
        return rejoin_sites(self.rejoin, depth)

    def at_site(self, site: Site, tokens: Tokens, state: DoViTState, qkv: Tensor | None) -> Tokens:
        full = _put_back(state.full, tokens)
        return full if tokens.cover is None else replace(full, cover=tokens.cover).keep(tokens.stands())

    def result(self, tokens: Tokens, state: DoViTState, model: ModelView) -> Result:
        full = _put_back(state.full, tokens)
        exit_index = state.exit_index
        if self.rejoin is None:
            exit_index = exit_index.write(tokens.patches().position, model.num_exits)
        stale = self.adapts_stopped  # tokens that came back have features of the last block
        return decode_grid(full, state.exit_records, tokens.spread(exit_index.read()), model, stale=stale)

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        """Stop patches above tau, and those whose score no longer grows (`do_vit.py` of the release)."""
        stop = self.confident(n, graded)
        if self.min_improvement is not None and graded.earlier is not None:
            stop |= graded.score - graded.earlier < self.min_improvement
        return self.limit(n, graded, live & self.guard(graded, stop), live)

    def grade(self, n: int, head: Head | ExitRecord, out: HeadOutput, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        temperature = of_exit(self.temperature, n)
        score = pooled_score(out.logits, grids, head.scale, head.upscale, self.score, temperature)
        if self.boundary_guard or per_class(self.threshold):
            return score, pooled_label(out.logits, grids, head.scale, head.upscale)
        return score, torch.zeros_like(score, dtype=torch.int64)

    def _graded(self, n: int, patches: Tokens, live: Tokens, model: ModelView) -> tuple[Tensor, Tensor, ExitRecord]:
        """Return score and class of every patch, `(cells,)` each, detached, and the record of the head's run.

        Patches that were not scored have a score of 0. Classes are computed where a rule needs them, else they are 0.
        """
        head = model.exit_heads[n]
        on_grid = self.scores_grid or model.with_records
        seen = patches if on_grid else live
        if self.detach_aux:
            seen = seen.with_x(seen.x.detach())
        out = head(seen)
        with torch.no_grad():
            score, label = self.grade(n, head, out, seen.grids)
            if not on_grid:
                score = live.spread(scatter(score.new_zeros(patches.cells), live.position, score))
                label = live.spread(scatter(label.new_zeros(patches.cells), live.position, label))
        return score, label, record_of(head, seen, out, out.logits if model.with_records else None)


def blend(full: Tokens, mean: Tensor, applies: Tensor, weight: float) -> Tokens:
    """Replace the class token by `(1 - weight) class token + weight mean` where `applies`.

    mean: `(B, C)` of each image's stopped tokens; applies: `(B,)` bool.
    """
    rows = full.packing.offsets[:-1].long()  # the class token is the first token of each image
    token = full.x.index_select(0, rows)
    blended = torch.where(applies[:, None], (1.0 - weight) * token + weight * mean.to(token.dtype), token)
    return full.with_x(full.x.index_copy(0, rows, blended))


def _that_stand(cells: Tensor, tokens: Tokens) -> Tensor:
    """Return those of `cells (cells,)` bool that stand for themselves, which is all of them until tokens merge."""
    return cells if tokens.cover is None else cells & tokens.stands()


def _latest_label(tokens: Tokens, live: Tokens, label: Tensor, before: Tensor) -> Tensor:
    """Return the class of each patch when last computed: `label (cells,)` of what is live, else `before (cells,)`."""
    was_live = scatter(torch.zeros_like(label, dtype=torch.bool), live.position, torch.ones_like(live.position))
    return torch.where(tokens.spread(was_live), tokens.spread(label), before)


def _stopped_mean(x: Tensor, stopped: Tensor, cells: Packing, full: Tokens) -> tuple[Tensor, Tensor]:
    """Return the mean feature `(B, C)` of each image's stopped patches, and their share of all its tokens `(B,)`."""
    image = cells.image_index()
    # Integers and fp32, as half precision cannot count far enough.
    images = len(cells.lengths)
    total = torch.zeros(images, x.shape[1], device=x.device).index_add(0, image, x.float() * stopped[:, None])
    if images == 1:
        count = stopped.sum(0, keepdim=True)
    else:
        count = torch.zeros(images, dtype=torch.int64, device=x.device).index_add(0, image, stopped.long())
    return total / count.clamp(min=1)[:, None], count / torch.tensor(full.packing.lengths, device=x.device)


def _mean_count(keep: Tensor, cells: Packing) -> Tensor:
    """Keep the batch's mean number of tokens in every image, those to be kept first.

    This is the batch mode of the release (`do_vit.py`).
    """
    images = len(cells.lengths)
    masks = keep.unflatten(0, (images, cells.longest))
    # floor(mean(kept + class token)) - class token; integers, as half precision cannot count far enough.
    count = keep.sum() // images
    order = torch.sort(masks.int(), dim=1, descending=True, stable=True).indices
    first = torch.arange(cells.longest, device=keep.device) < count
    return torch.zeros_like(masks).scatter(1, order, first.expand(images, -1)).flatten()


def _put_back(full: Tokens, tokens: Tokens) -> Tokens:
    """Reconstruct the complete sequence: the live tokens' features are written to their rows.

    Cells of merged tokens have the features of the one that stands for them.
    """
    if tokens.packing is full.packing:  # nobody has left or merged
        return full.with_x(tokens.x)
    rows = _rows_in_full(full, tokens)
    x = scatter(full.x, rows, tokens.x)
    if tokens.cover is not None:
        if full.phases is not None and tokens.phases is not None:  # tokens that came apart have their own
            full = replace(full, phases=scatter(full.phases, rows, tokens.phases))
        image = cell_packing(tokens).image_index()
        own = torch.arange(tokens.cells, device=x.device) + (image + 1) * tokens.num_prefix  # the row of each cell
        x = x.index_copy(0, own, x.index_select(0, own[tokens.cover]))
    return full.with_x(x)


def _rows_in_full(full: Tokens, tokens: Tokens) -> Tensor:
    """Return the row of each token in the complete sequence, `(T,)` int64."""
    prefix = tokens.num_prefix
    if len(tokens.grids) == 1:
        return torch.cat([torch.arange(prefix, device=tokens.x.device), tokens.position[prefix:] + prefix])
    rows = tokens.position + (tokens.packing.image_index() + 1) * prefix
    return rows.index_copy(0, tokens.prefix_index(), full.prefix_index()) if prefix else rows
