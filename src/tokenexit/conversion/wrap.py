"""A backbone that somebody has as a module, and its decode head, become an `ExitSegmenter` that answers as they do."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.conversion.modules import Backbone, read_backbone
from tokenexit.conversion.rename import State
from tokenexit.engine.vit import ViT
from tokenexit.errors import ConfigError
from tokenexit.heads import Head, HeadSpec, ModuleHead, build_head
from tokenexit.heads.base import TokenBatchNorm
from tokenexit.heads.module import in_short, named, probed
from tokenexit.inputs.images import ImageSource, load_image
from tokenexit.inputs.labels import Labels, default_labels, default_palette
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.outputs.ledger import Size
from tokenexit.segmenter import ExitSegmenter

TOLERANCE = 1e-5
"""Largest difference of a feature from the original's, times the larger of 1 and the largest feature."""
COMPARED = 2
"""Number of images that are compared."""


def wrap(
    backbone: nn.Module,
    head: nn.Module | None = None,
    *,
    num_classes: int | None = None,
    labels: Labels | Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    share: bool = False,
    images: Sequence[ImageSource | Tensor] | None = None,
    normed: bool = True,
    head_options: Mapping[str, Any] | None = None,
) -> ExitSegmenter:
    """Turn a plain ViT of another library and its decode head into a segmenter without exits, in evaluation mode.

    Of timm it takes ViT, DeiT, DeiT-3, DINOv2 and DINOv3, of transformers ViT, DeiT, DINOv2 with and without registers
    and DINOv3, and the modules of DINOv2's own code. Original and result are run on the first images in fp32, and
    features of all patches must agree to 1e-5 of the largest one (in fp64, where a deep network's rounding alone is
    more).

    Args:
        backbone: the module; that of an image classifier is taken out of it.
        head: the decode head, with its weights: a linear layer, or a module from the last feature map `(B, C, h, w)` to
            class logits `(B, K, s h, s w)`, whatever h and w. Linear layers and 1x1 convolutions, after a BatchNorm or
            not, become the heads `linear` and `dinov2_linear`, which every method takes; other modules are grid heads.
            Without one, a fresh linear layer for `num_classes`, to be trained.
        num_classes: number K of classes; needed without a head, else its own.
        labels: names of the classes, or `Labels`.
        preprocessing: how images become inputs; if not given, the mean and std that the module says (timm), else those
            of ImageNet.
        share: use the parameters of the backbone and the head itself, which goes into evaluation mode, instead of
            copies, so that what changes one changes the other. What needs another shape is copied even then: queries,
            keys and values of transformers, which are one layer here, and the halves of its gated MLP; and class token
            and registers where rows of the position table are added to them (DINOv2 with registers outside timm, DeiT
            with a distillation token).
        images: images to compare on, files or inputs `(3, H, W)`, resized to the module's own size; noise if not given.
        normed: whether the head reads features after the backbone's last norm, if it has one; else before it.
        head_options: arguments by name that build the head's class, saved with the model.

    Returns:
        The model, on the backbone's device.

    Raises:
        ConfigError: for a module that is no plain ViT, a head that reads more than the last feature map, features that
            differ, and options that contradict each other.
        DataError: for an image that cannot be read.
    """
    for what, module in (("backbone", backbone), ("head", head)):
        if not isinstance(module, nn.Module) and not (what == "head" and module is None):
            raise ConfigError(f"{what} is {_kind(module)}: give the torch.nn.Module with its weights.")
    read = read_backbone(backbone)
    if not normed:
        state = {key: value for key, value in read.state.items() if not key.startswith("norm.")}
        read = replace(read, config=replace(read.config, final_norm=False), state=state)
    device = _device(read.module, head, share)
    decode_head, head_state = _decode_head(head, read, num_classes, share, head_options)
    classes = decode_head.num_classes
    preprocessing = _preprocessing(preprocessing, labels, classes, read)
    with torch.device("meta"):  # no memory: all weights are put in their places
        model = ExitSegmenter(read.config, classes, (), (), _spec(decode_head), preprocessing)
    _put(model.backbone, read.state, share)
    _put(decode_head, head_state, share)
    model.decode_head = decode_head
    _check_same(read, model.eval(), normed, _inputs(images, preprocessing))
    return model.to(device)


# ---------------------------------------------------------------------------------------------------------- the heads


def _decode_head(
    head: nn.Module | None,
    read: Backbone,
    num_classes: int | None,
    share: bool,
    options: Mapping[str, Any] | None,
) -> tuple[Head, State]:
    """Return the decode head, and the weights that are still to be put in it."""
    dim, (rows, columns) = read.config.embed_dim, read.grid
    if head is None:
        if num_classes is None:
            raise ConfigError("wrap needs a decode head: give it with its weights, or num_classes for a fresh one.")
        return build_head("linear", dim, num_classes), {}
    if isinstance(head, Head):
        raise ConfigError(f"head is tokenexit's own {type(head).__name__}: give an ExitSegmenter its name and weights.")
    pointwise = _pointwise(head)
    if pointwise is None:
        module = head if share else copy.deepcopy(head).float()
        with _evaluated(module):
            classes, scale = probed(module, dim, ((rows, columns), (rows + 1, columns + 2)))
        _check_classes(num_classes, classes)
        return ModuleHead(module, dim, classes, scale, options), {}
    if options:
        raise ConfigError(f"head_options are given, and {named(head)} is saved as a head of tokenexit: leave them out.")
    kind, state = pointwise
    classes, width = state["classifier.weight"].shape
    if width != dim:
        raise ConfigError(f"{named(head)} takes {width} channels and the backbone gives {dim}: give its own backbone.")
    _check_classes(num_classes, classes)
    with torch.device("meta"):
        return build_head(kind, dim, classes), state


def _spec(head: Head) -> HeadSpec | ModuleHead:
    if isinstance(head, ModuleHead):
        return head
    return "dinov2_linear" if hasattr(head, "norm") else "linear"


def _pointwise(head: nn.Module) -> tuple[str, State] | None:
    """Return which of our heads this is, and its weights under our names; None for any other module."""
    layers = [layer for layer in _flat(head) if not isinstance(layer, nn.Dropout | nn.Dropout2d | nn.Identity)]
    norm = layers.pop(0) if len(layers) == 2 else None
    if len(layers) != 1:
        return None
    (layer,) = layers
    if type(layer) is nn.Conv2d:
        plain = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1 and layer.padding in ("valid", (0, 0))
    else:
        plain = type(layer) is nn.Linear and norm is None
    if not plain:
        return None
    assert isinstance(layer.weight, Tensor)
    with torch.no_grad():
        weight = layer.weight if layer.weight.ndim == 2 else layer.weight.flatten(1)
        bias = layer.weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias
    state: State = {"classifier.weight": weight, "classifier.bias": bias}  # type: ignore[dict-item]
    if norm is None:
        return "linear", state
    like = TokenBatchNorm(1)
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.eps != like.eps:
        return None
    found = norm.state_dict(keep_vars=True)
    if found.keys() != like.state_dict().keys():  # without weights, or without running statistics
        return None
    return "dinov2_linear", state | {f"norm.{key}": value for key, value in found.items()}


def _flat(module: nn.Module) -> list[nn.Module]:
    return list(chain.from_iterable(map(_flat, module))) if type(module) is nn.Sequential else [module]


def _check_classes(given: int | None, found: int) -> None:
    if given is not None and given != found:
        raise ConfigError(f"num_classes={given} and the head has {found}: leave it out, or give another head.")


# -------------------------------------------------------------------------------------------------------- the weights


def _device(backbone: nn.Module, head: nn.Module | None, share: bool) -> torch.device:
    """Return the backbone's device; what is shared must be of fp32 and on one device."""
    tensors: list[Tensor] = [*backbone.parameters(), *(() if head is None else head.parameters())]
    if share:
        kinds, devices = ({str(getattr(t, of)) for t in tensors} for of in ("dtype", "device"))
        if kinds != {"torch.float32"}:
            raise ConfigError(
                f"share=True needs float32 weights, got {' and '.join(sorted(kinds))}: call .float() on both modules, "
                "or copy them."
            )
        if len(devices) != 1:
            raise ConfigError(
                f"share=True needs both modules on one device, got {' and '.join(sorted(devices))}: move one."
            )
    return tensors[0].device


def _put(module: nn.Module, state: State, share: bool) -> None:
    """Make the entries of `state` the weights of a module: shared ones as they are, others copied in fp32."""
    trains = any(value.requires_grad for value in state.values())
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        own = value if share else value.detach().clone()
        if not share and own.is_floating_point():
            own = own.float()
        if leaf in place._buffers:
            place._buffers[leaf] = own
        elif share and isinstance(value, nn.Parameter):
            place.register_parameter(leaf, value)
        else:
            needs_grad = value.requires_grad if isinstance(value, nn.Parameter) else trains
            place.register_parameter(leaf, nn.Parameter(own.detach(), needs_grad))


def _preprocessing(
    given: Preprocessing | None, labels: Labels | Sequence[str] | None, num_classes: int, read: Backbone
) -> Preprocessing:
    if labels is not None and not isinstance(labels, Labels):
        if isinstance(labels, str):
            raise ConfigError(f"labels is '{labels}': give a list of names, one for each class.")
        labels = Labels(tuple(labels), default_palette(len(labels)), default_labels(num_classes).ignore_index)
    if given is None:
        mean, std = read.normalisation
        given = Preprocessing(mean=mean, std=std)
    return replace(given, labels=labels or given.labels or default_labels(num_classes))


# ----------------------------------------------------------------------------------------------------- the comparison


def _inputs(images: Sequence[ImageSource | Tensor] | None, preprocessing: Preprocessing) -> list[Tensor]:
    """Return the first images as inputs `(3, H, W)`, of noise if there are none."""
    if images is None:
        return [torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))]
    given: list[Any] = list(images)[:COMPARED] if isinstance(images, list | tuple) else [images]
    if not given:
        raise ConfigError("images is empty: give one, or leave it out.")
    for image in given:
        if isinstance(image, Tensor) and (image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape):
            raise ConfigError(f"an image has shape {tuple(image.shape)}: give inputs (3, H, W), or files.")
    return [
        image.detach().cpu().float() if isinstance(image, Tensor) else preprocessing.to_tensor(load_image(image))
        for image in given
    ]


def _check_same(read: Backbone, model: ExitSegmenter, normed: bool, images: Sequence[Tensor]) -> None:
    """Raise `ConfigError` where features of patches differ, at the size it was built for and at another one."""
    (rows, columns), patch = read.grid, read.config.patch_size
    grids = [(rows, columns)]
    if read.reader.takes_any_size(read.module):
        grids.append((rows // 2 + 1, columns // 2 + 2))
    for grid in grids:
        size = (grid[0] * patch, grid[1] * patch)
        found = _distance(read, model.backbone, normed, images, size, torch.float32)
        if found > TOLERANCE:  # rounding, perhaps
            found = _distance(read, model.backbone, normed, images, size, torch.float64)
        if not found <= TOLERANCE:
            raise ConfigError(
                f"features of the wrapped {read.name} are off by {found:.1e} of the largest one on images of "
                f"{size[0]}x{size[1]}, where {TOLERANCE:.0e} is allowed: it computes something that a plain ViT does "
                "not."
            )


@torch.no_grad()
def _distance(
    read: Backbone, ours: ViT, normed: bool, images: Sequence[Tensor], size: Size, dtype: torch.dtype
) -> float:
    """Return the largest difference of the features, over the larger of 1 and the largest of the original's."""
    batch = torch.stack([F.interpolate(x[None], size, mode="bilinear", antialias=True)[0] for x in images]).to(dtype)
    theirs, ours = _on_cpu(read.module, dtype), _on_cpu(ours, dtype)
    with _evaluated(theirs), torch.autocast("cpu", enabled=False):
        try:
            found = _features(read, theirs, normed, batch)
        except ConfigError:
            raise
        except Exception as error:  # foreign code may raise anything
            raise ConfigError(
                f"{read.name} could not be run on images of {size[0]}x{size[1]} ({in_short(error)}): see that it runs "
                "by itself."
            ) from None
        tokens = ours.run(ours.embed(list(batch)), 0, read.config.depth).patches()
        expected = ours.norm(tokens.x) if normed else tokens.x
    found = found[:, read.config.num_prefix_tokens :].flatten(0, 1)
    if found.shape != expected.shape:
        raise ConfigError(
            f"{read.name} gives features {tuple(found.shape)} for images of {size[0]}x{size[1]}, where a plain ViT "
            f"gives {tuple(expected.shape)}."
        )
    return float((found - expected).abs().max() / found.abs().max().clamp(min=1.0))


def _features(read: Backbone, module: nn.Module, normed: bool, batch: Tensor) -> Tensor:
    """Return all tokens of the original after its last norm, or what went into that."""
    entered: list[Tensor] = []
    hook = read.reader.norm(module).register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    try:
        features = read.reader.features(module, batch)
    finally:
        hook.remove()
    return features if normed else entered[-1]


def _on_cpu(module: Any, dtype: torch.dtype) -> Any:
    """Return the module itself where it is on the CPU and of this type, else a copy that is."""
    tensors = list(module.parameters())
    if all(t.device.type == "cpu" and t.dtype == dtype for t in tensors):
        return module
    return copy.deepcopy(module).to(device="cpu", dtype=dtype)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode, and put every part back as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _kind(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else f"a {type(value).__name__}"
