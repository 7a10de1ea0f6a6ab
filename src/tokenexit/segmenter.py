"""`ExitSegmenter` has backbone, heads and the loop. This file is the map of the library.

    images -> embed -> blocks -> exit 1 -> blocks -> ... -> last block -> result

The method is an argument of the call and its state a value, so one model serves several methods, thresholds and
threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.checkpoints.calibration import Calibration
from tokenexit.checkpoints.files import read_state_dict
from tokenexit.checkpoints.load import LoadReport, load_backbone
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig, vit_config
from tokenexit.engine.window_policy import WindowPolicy
from tokenexit.errors import ConfigError
from tokenexit.heads import EoMTHead, Head, HeadSpec, ModuleHead, StageAdapter, build_head, normalize_head
from tokenexit.heads.eomt import hand_over, take_joint_blocks
from tokenexit.hub.fetch import resolve_weights
from tokenexit.inputs.images import ImageSource, load_image
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, Method, MethodLike, ModelView, Result, as_method
from tokenexit.methods.resized import resize
from tokenexit.outputs.huggingface import ImageSegmentation, label_maps
from tokenexit.outputs.ledger import Size, write_ledger
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.outputs.segmentation import SegmentationOutput, concatenated
from tokenexit.outputs.windows import Segmentation, segment_windows
from tokenexit.pretrained import PretrainedMixin, SegmenterConfig
from tokenexit.reducers.base import Site


@dataclass
class Work:
    """What one call of the loop ran.

    Attributes:
        attended: for every block, the number of tokens of each image that its attention ran on.
        fed: the same of its MLP, before which a reducer may have merged some.
        reduction: work of the comparisons of each image.
        frozen: for every block, the number of tokens of each image that were keys and values alone.
        cover: in the end, see `Tokens`.
    """

    attended: list[tuple[int, ...]]
    fed: list[tuple[int, ...]]
    reduction: list[Ops]
    frozen: list[tuple[int, ...]] = field(default_factory=list)
    cover: Tensor | None = None


def run_tokens(
    backbone: ViT, exits: Sequence[int], tokens: Tokens, method: Method[Any], model: ModelView
) -> tuple[Result, Work]:
    """Run the loop of all methods: blocks, an exit, blocks on the tokens that are left, and at the end the map of all.

    It ends at the method's `last_exit`, if there is one: nothing runs behind it, prefix tokens neither.

    exits: number of blocks before each exit. tokens: embedded images. Returns the method's result and the work done.
    """
    config, last = backbone.config, method.last_exit
    work = Work([], [], [method.embed_ops(grid, config) for grid in tokens.grids])
    state = method.start(tokens, model)
    for step in plan(config.depth, exits, method.sites(config.depth)):
        if isinstance(step, range):
            tokens = backbone.run(tokens, step.start, step.stop)
            work.attended += [tokens.packing.lengths] * len(step)
            work.fed += [tokens.packing.lengths] * len(step)
            work.frozen += [_frozen(tokens)] * len(step)
        elif isinstance(step, Site):
            tokens = _at_site(backbone, step, tokens, method, state, work)
        else:
            tokens, state = method.at_exit(step, tokens, state, model)
            if step == last:
                break
    else:
        work.attended.append(tokens.packing.lengths)  # those that are left behind the last block
        work.fed.append(tokens.packing.lengths)
    nobody = [(0,) * len(tokens.grids)] * (config.depth + 1 - len(work.fed))
    work.attended += nobody
    work.fed += nobody
    work.cover = tokens.cover
    return method.result(tokens, state, model), work


def plan(depth: int, exits: Sequence[int], sites: Sequence[Site]) -> Iterator[range | int | Site]:
    """Yield the steps of a network in order: blocks that run at once, an exit's number, a site.

    A site inside a block stands for the whole block. Where an exit and sites have one place, the exit comes first, and
    tokens come back before others are reduced.
    """
    at, number = 0, {block: n for n, block in enumerate(exits)}
    for place in sorted({*exits, *(site.after for site in sites), depth}):
        if place > at:
            yield range(at, place)
            at = place
        if place in number:
            yield number[place]
        here = sorted((site for site in sites if site.after == place), key=lambda site: (site.inside, not site.rejoins))
        yield from here
        at += any(site.inside for site in here)


def _at_site(backbone: ViT, site: Site, tokens: Tokens, method: Method[Any], state: Any, work: Work) -> Tokens:
    """Change the tokens at a site, and run the block that it lies inside of."""
    for i, (live, grid) in enumerate(zip(tokens.live, tokens.grids)):
        work.reduction[i] += method.site_ops(site, live, grid, backbone.config)
    if not site.inside:
        return method.at_site(site, tokens, state, None)
    work.attended.append(tokens.packing.lengths)
    work.frozen.append(_frozen(tokens))
    tokens, qkv = backbone.attend(tokens, site.after, site.weighed)
    tokens = method.at_site(site, tokens, state, qkv)
    work.fed.append(tokens.packing.lengths)
    return backbone.feed(tokens, site.after)


def _frozen(tokens: Tokens) -> tuple[int, ...]:
    """Return the number of frozen tokens of each image."""
    return (0,) * len(tokens.grids) if tokens.frozen is None else tokens.frozen.packing.lengths


class ExitSegmenter(PretrainedMixin):
    """A plain ViT segmenter whose tokens may leave early.

    Args:
        backbone: a preset's name (`tokenexit.engine.vit_config.PRESETS`) or a `ViTConfig`.
        num_classes: number K of classes.
        exits: number of blocks before each exit, increasing.
        exit_head: a head for all exits, or a list with one for each; a name of `tokenexit.heads.HEADS`, or a mapping
            with `kind` and options.
        decode_head: the head at the end, likewise. "eomt" takes the last blocks of the backbone and its final norm;
            `exits` may then be as deep as what is left. Or a `ModuleHead`, which `tokenexit.wrap` makes of your own
            module.
        preprocessing: how images become inputs; saved with the model.
        stage_adapter: a `StageAdapter` for each exit, through which the decode head reads tokens that DoViT or PAUMER
            stopped there; other methods pass it by.
        weights: backbone weights to start from, a timm-named `.safetensors` or `.pth` file or `hf-hub:OWNER/NAME`.
        **backbone_options: fields of `ViTConfig` to change, for example `class_token=False`.

    Attributes:
        config: all that rebuilds the model without its weights.
        preprocessing: how images become inputs.
        backbone: the `ViT`.
        exit_heads: the heads of the exits, in order.
        decode_head: the head at the end.
        stage_adapters: the adapters of the exits, in order; empty without `stage_adapter`.
        load_report: which weights were loaded, missing, unexpected or resized; None without `weights`.
        calibration: the `Calibration` of `calibration.json`, None for a model that was not calibrated.
        records: contents of `training.json` and `evaluation.json` that were found beside the model, by file name.

    Raises:
        ConfigError: for an unknown backbone, head or option, and for values that contradict each other.
        CheckpointError: for weights that cannot be read or do not fit the backbone.
    """

    def __init__(
        self,
        backbone: str | ViTConfig = "vit_tiny_patch16",
        num_classes: int = 11,
        exits: Sequence[int] = (3, 6, 9),
        exit_head: HeadSpec | Sequence[HeadSpec] = "fcn",
        decode_head: HeadSpec | ModuleHead = "fcn",
        preprocessing: Preprocessing | None = None,
        weights: str | Path | None = None,
        stage_adapter: bool = False,
        **backbone_options: Any,
    ) -> None:
        super().__init__()
        vit, spec, whole = vit_config(backbone, **backbone_options), normalize_head(decode_head), None
        if spec["kind"] == "eomt" and vit.final_norm:  # a whole ViT, whose end becomes the head
            whole = vit
            vit, spec = take_joint_blocks(whole, spec)
        specs = [exit_head] * len(exits) if isinstance(exit_head, str | Mapping) else list(exit_head)
        if len(specs) != len(exits):
            raise ConfigError(
                f"exit_head has {len(specs)} heads for {len(exits)} exits: give one head, or one for each exit."
            )
        self.config = SegmenterConfig(
            backbone=vit,
            num_classes=num_classes,
            exits=tuple(exits),
            exit_heads=tuple(normalize_head(spec) for spec in specs),
            decode_head=spec,
            stage_adapter=stage_adapter,
        )
        self.preprocessing = preprocessing or Preprocessing(labels=default_labels(num_classes))
        check_labels(self.preprocessing, num_classes)
        dim = self.config.backbone.embed_dim
        self.backbone = ViT(self.config.backbone)
        self.exit_heads = nn.ModuleList(build_head(spec, dim, num_classes) for spec in specs)
        self.decode_head = build_head(decode_head if whole is None else spec, dim, num_classes)
        self.load_report: LoadReport | None = None
        self.calibration: Calibration | None = None
        self.records: dict[str, Any] = {}
        if weights is not None:
            path = resolve_weights(weights)
            loaded = self.backbone if whole is None else ViT(whole)
            self.load_report = load_backbone(loaded, read_state_dict(path), source=f"weights '{path}'")
            if isinstance(self.decode_head, EoMTHead) and loaded is not self.backbone:
                hand_over(loaded, self.backbone, self.decode_head)
        self.stage_adapters = nn.ModuleList()
        if stage_adapter:
            self.stage_adapters.extend(self._new_adapters(len(exits)))  # whose norms are copies of what was loaded

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.device

    @property
    def depth(self) -> int:
        """Number of blocks of the whole ViT, those included that an `eomt` head holds."""
        return self.config.backbone.depth + self.decode_head.joint_blocks

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        method: MethodLike | None = None,
        targets: Sequence[Size] | None = None,
        with_records: bool = False,
        labels: Tensor | None = None,
        mask_shares: Sequence[float] = (),
    ) -> SegmentationOutput:
        """Segment a batch of tensors; `model(images)` calls it.

        Args:
            images: `(B, 3, H, W)` or a list of `(3, H, W)` fp32, as `Preprocessing` makes them; sizes may differ.
            method: a method, its name or its specification; `Dense()` if not given.
            targets: height and width in pixels of the maps that the output's `labels` and `logits` return; image sizes
                if not given.
            with_records: record the full map of every exit, as training always does for its losses.
            labels: masks `(B, H, W)` int64, for the output's `loss`: `segmentation_loss` with its defaults and the
                `ignore_index` of the preprocessing's labels.
            mask_shares: in training of an `eomt` head, for each of its blocks the probability with which a query sees
                its own mask alone; it then predicts, and learns, before each of them, too.

        Returns:
            Maps, exit indices and ledger of all images.

        Raises:
            ConfigError: for images of another shape, and for a method that cannot run on this model.
            DataError: for labels that do not belong to the images.
        """
        images = _as_list(images)
        if targets is not None and len(targets) != len(images):
            raise ConfigError(f"targets has {len(targets)} sizes for {len(images)} images: give one for each.")
        method = Dense() if method is None else as_method(method)
        if mask_shares and len(mask_shares) != self.decode_head.joint_blocks:
            raise ConfigError(
                f"mask_shares has {len(mask_shares)} values for {self.decode_head.joint_blocks} blocks of the decode "
                "head: give one for each, and none to a head other than eomt."
            )
        model = replace(self.view(self.training or with_records or labels is not None), mask_shares=tuple(mask_shares))
        method.check(model)
        full = _sizes(images)
        targets = full if targets is None else tuple(targets)
        images = [resize(image, method.input_scale) for image in images]
        grids = [self.backbone.patch_embed.grid(*size) for size in _sizes(images)]
        outputs = [
            self._run([images[i] for i in run], each, model, full[run.start : run.stop], targets[run.start : run.stop])
            for run, each in method.runs(grids)
        ]
        output = outputs[0] if len(outputs) == 1 else concatenated(outputs)
        if labels is None:
            return output
        return replace(output, loss=segmentation_loss(output, labels, self.classes.ignore_index))

    def _run(
        self,
        images: Sequence[Tensor],
        method: Method[Any],
        model: ModelView,
        full: Sequence[Size],
        targets: tuple[Size, ...],
    ) -> SegmentationOutput:
        """Run images that share one method, and split the result into images. full: their sizes before resizing."""
        tokens = method.embed(images, self.backbone)
        result, work = run_tokens(self.backbone, self.config.exits, tokens, method, model)

        scale, grids = self.decode_head.scale, tokens.grids
        full_grids = [self.backbone.patch_embed.grid(*size) for size in full]
        heads = model.exit_heads
        cells = [h * w for h, w in grids]
        exit_index = torch.split(result.exit_index, cells)
        groups = () if work.cover is None else torch.split(work.cover, cells)
        return SegmentationOutput(
            grid_logits=_maps(result.logits, grids, scale),
            value=result.value,
            queries=() if result.queries is None else tuple(result.queries),
            frozen=() if result.frozen is None else _maps(result.frozen, grids),
            exit_index=tuple(s.view(grid) for s, grid in zip(exit_index, grids)),
            num_exits=model.num_exits,
            ledger=write_ledger(
                self.backbone,
                heads,
                self.decode_head,
                grids,
                work.attended,
                result.exit_records,
                full_grids,
                work.fed,
                work.reduction,
                work.frozen,
            ),
            sizes=_sizes(images),
            targets=targets,
            patch_size=self.config.backbone.patch_size,
            upscale=self.decode_head.upscale,
            exit_records=result.exit_records,
            groups=tuple(own.view(grid) for own, grid in zip(groups, grids)),
        )

    def with_exits(self, blocks: Sequence[int]) -> ExitSegmenter:
        """Return this model with some of its exits alone; weights are shared.

        Args:
            blocks: number of blocks before each exit, increasing; some of `config.exits`, or none.

        Raises:
            ConfigError: for a place where the model has no exit.
        """
        missing = sorted(set(blocks) - set(self.config.exits))
        if missing:
            raise ConfigError(f"exits must be some of {self.config.exits}, got {missing[0]}: it has no exit there.")
        numbers = [self.config.exits.index(block) for block in blocks]
        specs = [self.config.exit_heads[n] for n in numbers]
        model = self.with_exit_heads(blocks, specs, [self.exit_heads[n] for n in numbers])
        if self.config.stage_adapter:
            model._modules["stage_adapters"] = nn.ModuleList(self.stage_adapters[n] for n in numbers)
        return model

    def with_exit_heads(
        self, blocks: Sequence[int], specs: Sequence[HeadSpec], heads: Sequence[nn.Module]
    ) -> ExitSegmenter:
        """Return this model with other exits, neither calibrated nor with records; weights are shared.

        Stage adapters, where it has them, are new ones.

        Args:
            blocks: number of blocks before each exit, increasing.
            specs: specification of each exit's head.
            heads: the heads themselves.

        Raises:
            ConfigError: for places that the backbone does not have.
        """
        model = copy(self)
        model._modules = {**self._modules, "exit_heads": nn.ModuleList(heads)}
        normal = tuple(normalize_head(spec) for spec in specs)
        model.config = replace(self.config, exits=tuple(blocks), exit_heads=normal)
        model.calibration, model.records = None, {}
        return model.with_stage_adapters() if self.config.stage_adapter else model

    def with_stage_adapters(self) -> ExitSegmenter:
        """Return this model, not calibrated, with new stage adapters, which change nothing yet; weights are shared."""
        model = copy(self)
        adapters = nn.ModuleList(self._new_adapters(len(self.config.exits)))
        model._modules = {**self._modules, "stage_adapters": adapters.train(self.training)}
        model.config = replace(self.config, stage_adapter=True)
        model.calibration = None
        return model

    def _new_adapters(self, number: int) -> list[StageAdapter]:
        norm, width = self.backbone.norm, self.config.backbone.embed_dim
        return [StageAdapter(norm, width).to(self.backbone.patch_embed.proj.weight) for _ in range(number)]

    def with_window_policy(self, policy: WindowPolicy) -> ExitSegmenter:
        """Return this model, not calibrated, with a network that chooses windows for `Supertokens`; weights are shared.

        Args:
            policy: the network, for patches of this backbone's size.
        """
        model = copy(self)
        model._modules = {**self._modules, "backbone": self.backbone.with_window_policy(policy)}
        model.config = replace(self.config, backbone=model.backbone.config)
        model.calibration = None
        return model

    def check(self, method: MethodLike) -> None:
        """Check that a method can run on this model.

        Args:
            method: a method, its name or its specification.

        Raises:
            ConfigError: if it cannot, with the reason and what to do.
        """
        as_method(method).check(self.view())

    def view(self, with_records: bool = False) -> ModelView:
        """Return the part of this model that a method may know.

        Args:
            with_records: record the full map of every exit.
        """
        return ModelView(
            exits=self.config.exits,
            exit_heads=[head for head in self.exit_heads if isinstance(head, Head)],
            decode_head=self.decode_head,
            norm=self.backbone.norm,
            backbone=self.config.backbone,
            num_classes=self.config.num_classes,
            has_class_token=self.config.backbone.class_token,
            with_records=with_records,
            stage_adapters=[adapter for adapter in self.stage_adapters if isinstance(adapter, StageAdapter)],
        )

    def segment(
        self,
        images: Tensor | Sequence[Tensor],
        method: MethodLike | None = None,
        targets: Sequence[Size] | None = None,
        with_records: bool = False,
    ) -> Segmentation:
        """Segment a batch of tensors in the windows of `preprocessing`, if it has them; else as a call of the model.

        Args:
            images: `(B, 3, H, W)` or a list of `(3, H, W)` fp32; sizes may differ.
            method: a method, its name or its specification; `Dense()` if not given.
            targets: height and width in pixels of the maps that the output returns; image sizes if not given.
            with_records: record the full map of every exit.

        Returns:
            A `SegmentationOutput`, or a `WindowedOutput` that is read in the same way.

        Raises:
            ConfigError: for images of another shape, and for a method that cannot run on this model.
        """
        window, stride = self.preprocessing.window, self.preprocessing.stride
        if window is None or stride is None:
            return self(images, method, targets, with_records)  # type: ignore[no-any-return]
        return segment_windows(
            lambda crops, method: self(crops, method, with_records=with_records),
            _as_list(images),
            window,
            stride,
            Dense() if method is None else as_method(method),
            patch_size=self.config.backbone.patch_size,
            targets=targets,
        )

    @torch.no_grad()
    def predict(self, images: ImageSource | Sequence[ImageSource], method: MethodLike | None = None) -> Segmentation:
        """Segment images of any kind; maps come back at the sizes of the images.

        Images are taken whole, or in the windows of `preprocessing` if it has them. The model must be in evaluation
        mode, which `from_pretrained` and `eval()` set.

        Args:
            images: a path, the bytes of a file, a PIL image or a numpy array (see `tokenexit.load_image`), or a list.
            method: a method, its name or its specification; if not given, the calibrated method, and `Dense()` for a
                model that was not calibrated.

        Returns:
            A `SegmentationOutput`, or a `WindowedOutput` that is read in the same way; `labels` are `(B, H, W)` int64,
            or a list of `(H, W)` if sizes differ.

        Raises:
            DataError: for an image that cannot be read.
            ConfigError: in training mode, for weights of a lower precision, for an empty list, and for a method that
                cannot run on this model.
            CheckpointError: for a calibration that was made for other weights.
        """
        if self.training:
            raise ConfigError("predict needs the model in evaluation mode: call model.eval() first.")
        if (dtype := self.backbone.patch_embed.proj.weight.dtype) != torch.float32:
            raise ConfigError(
                f"predict needs float32 weights, got {dtype}: call model.float(), and predict within torch.autocast "
                "for a lower precision."
            )
        sources: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        if not sources:
            raise ConfigError("predict got no images: give a path, a PIL image or an array, or a list of them.")
        loaded = [load_image(source) for source in sources]
        tensors = [self.preprocessing.to_tensor(image).to(self.device) for image in loaded]
        method = self.calibrated_method() if method is None else method
        return self.segment(tensors, method, targets=[(p.height, p.width) for p in loaded])

    @property
    def classes(self) -> Labels:
        """Names and colours of the classes, and the value of ignored pixels: those of `preprocessing`, or defaults."""
        return self.preprocessing.labels or default_labels(self.config.num_classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class by its index."""
        return dict(enumerate(self.classes.names))

    def post_process_semantic_segmentation(
        self, outputs: Segmentation, target_sizes: Sequence[Size] | None = None
    ) -> list[Tensor]:
        """Return the class of every pixel, as transformers' processors do.

        Args:
            outputs: result of a call of the model.
            target_sizes: height and width in pixels of each map; the call's targets if not given.

        Returns:
            One `(H, W)` int64 map per image.

        Raises:
            ConfigError: for another number of sizes than images.
        """
        return label_maps(outputs, target_sizes)

    def pipeline(self, method: MethodLike | None = None) -> ImageSegmentation:
        """Return a callable that works as Hugging Face's `image-segmentation` pipeline.

        Args:
            method: as in `predict`.

        Returns:
            A callable from an image, or a list of them, to its segments: dictionaries of `label`, `mask` and `score`.
        """
        return ImageSegmentation(lambda image: self.predict(image, method), self.id2label)


def check_labels(preprocessing: Preprocessing, num_classes: int) -> None:
    """Reject names of another number of classes."""
    labels = preprocessing.labels
    if labels is not None and labels.num_classes != num_classes:
        raise ConfigError(
            f"preprocessing names {labels.num_classes} classes and num_classes={num_classes}: make them agree."
        )


def _sizes(images: Sequence[Tensor]) -> tuple[Size, ...]:
    """Return heights and widths in pixels."""
    return tuple((image.shape[1], image.shape[2]) for image in images)


def _maps(rows: Tensor, grids: Sequence[Grid], scale: int = 1) -> tuple[Tensor, ...]:
    """Split rows of all images, `(cells scale^2, K)`, into one map `(K, h scale, w scale)` for each."""
    parts = torch.split(rows, [h * w * scale * scale for h, w in grids])
    return tuple(part.view(h * scale, w * scale, -1).permute(2, 0, 1) for part, (h, w) in zip(parts, grids))


def _as_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return a batch as a list of `(3, H, W)`. Raises `ConfigError` for other shapes."""
    batch = list(images)
    if not batch:
        raise ConfigError("images is empty: pass at least one (3, H, W) tensor.")
    for image in batch:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ConfigError(f"an image has shape {tuple(image.shape)}: pass (3, H, W) tensors with H, W >= 1.")
    return batch
