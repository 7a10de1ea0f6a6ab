"""Distillation: a student learns from a dense model, beside the labels or instead of them.

Beside them it is that of DoViT's release (`mmseg/distillation`). Methods know nothing of it: it reads what every pass
in training mode records, the tokens that the decode head was run on and the full map of every exit on the patch grid.
If asked, it applies the bilinear step of a SETR head before it compares, as the release does, whose heads upsample
before they classify.

Legend: P live patch tokens of the batch, cells = all patches of all images, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing, Tokens, pack_grids, unpack_grids
from tokenexit.errors import ConfigError
from tokenexit.heads import Head
from tokenexit.methods import ExitRecord
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import DistillConfig

SURE = -1e-6
"""Largest log-score of an ATM head in a divergence, so that the log of its complement is finite."""


def load_teacher(config: DistillConfig, student: ExitSegmenter) -> ExitSegmenter | None:
    """Load the model that `config` names, frozen, in evaluation mode and on the student's device; None without one.

    It comes without its exits, as its dense prediction alone is asked for. Raises `ConfigError` for a model that
    cannot teach this student, `CheckpointError` for a folder that holds none.
    """
    if config.teacher is None:
        return None
    teacher = ExitSegmenter.from_pretrained(config.teacher, student.device).requires_grad_(False)
    _check(teacher, student, config)
    return teacher.with_exits(())


def distillation_loss(output: SegmentationOutput, target: SegmentationOutput, config: DistillConfig) -> Tensor:
    """Return the weighted sum of the losses on features, on the decode head's logits and on those of every exit.

    Both outputs hold exit records of the same images; `target` is the teacher's and carries no gradient.
    """
    *exits, final = output.exit_records
    teacher = target.exit_records[-1]
    loss = torch.zeros((), device=target.exit_index[0].device)
    if config.features:
        loss = loss + config.features * feature_loss(_features(final), _features(teacher))
    for weight, record in ((config.logits, final), *((config.exits, record) for record in exits)):
        if weight:
            ours, theirs, image = _compared(record, teacher, target, config.upsampled)
            loss = loss + weight * divergence(ours, theirs, image, config.temperature, config.class_balance)
    return loss


def feature_loss(student: Tokens, teacher: Tokens) -> Tensor:
    """Return the mean squared difference of the features that the decode heads read.

    student: `(P, C)`, teacher: `(cells, C)`. With DoViT and Dense P is all cells. With DToP the mean is over the
    tokens that are live at the end, as those that left have no final features; it is zero if none is.
    """
    difference = student.x.float() - teacher.x.float().index_select(0, student.position)
    return difference.square().sum() / max(difference.numel(), 1)


def _features(record: ExitRecord) -> Tokens:
    assert record.seen is not None, "distillation needs exit records"
    return record.seen


def divergence(
    student: ExitRecord, teacher: ExitRecord, image: Tensor, temperature: float, class_balance: float = 0.0
) -> Tensor:
    """Return the Kullback-Leibler divergence of the student's map from the teacher's, a mean over cells.

    It is multiplied by temperature^2.

    Softmax heads: between the distributions over classes. ATM heads say of every class by itself whether it is there,
    with presence times sigmoid: the sum over classes of the divergences of these answers.
    image: `(cells,)` image of each row of the maps. class_balance: the power of `cell_weights`.
    """
    said, wanted = (_log_probability(record, image, temperature) for record in (student, teacher))
    if not class_balance:
        return F.kl_div(said, wanted, reduction="sum", log_target=True) / said.shape[0] * temperature**2
    assert teacher.logits is not None
    classes = teacher.logits.shape[1]
    label = _log_probability(teacher, image, 1.0)[:, :classes].argmax(dim=1)  # a temperature moves that of ATM heads
    weights = cell_weights(label, classes, class_balance)
    cells = F.kl_div(said, wanted, reduction="none", log_target=True).sum(dim=1)
    return (cells * weights).mean() * temperature**2


def cell_weights(label: Tensor, num_classes: int, class_balance: float) -> Tensor:
    """Return the weight of each cell: the share of its class among all cells to the minus `class_balance`, mean 1.

    label: `(cells,)` int64 classes of the teacher. With 0 all cells weigh alike, with 1 all classes that occur do. It
    is a function of the batch alone, so that a run that goes on needs no memory of it.
    """
    share = torch.bincount(label, minlength=num_classes).float() / len(label)
    weights = share.index_select(0, label) ** -class_balance
    return weights / weights.mean()


def _log_probability(record: ExitRecord, image: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities `(cells, K)` of the classes; of ATM heads `(cells, 2 K)`, yes and no to every class."""
    assert record.logits is not None, "distillation needs exit records"
    logits = record.logits.float() / temperature
    if record.kind == "softmax":
        return logits.log_softmax(dim=1)
    assert record.presence is not None
    present = (record.presence.float() / temperature).log_softmax(dim=2)[..., 0]
    yes = (present.index_select(0, image) + F.logsigmoid(logits)).clamp(max=SURE)
    return torch.cat([yes, torch.log(-torch.expm1(yes))], dim=1)


def _compared(
    student: ExitRecord, teacher: ExitRecord, output: SegmentationOutput, upsampled: bool
) -> tuple[ExitRecord, ExitRecord, Tensor]:
    """Return the two stages with maps of one resolution, usually the finer's, and the image of each of their rows.

    upsampled: as each head gives it after its bilinear step; before it otherwise.
    """
    scale = math.lcm(*(stage.scale * (stage.upscale if upsampled else 1) for stage in (student, teacher)))
    grids = [output.grid(i) for i in range(len(output))]
    cells = [h * w * scale**2 for h, w in grids]
    image = Packing.of(cells, output.exit_index[0].device).image_index()
    ours, theirs = (_upsampled(stage, grids, scale // stage.scale) for stage in (student, teacher))
    return ours, theirs, image


def _upsampled(record: ExitRecord, grids: Sequence[Grid], factor: int) -> ExitRecord:
    """Interpolate the map `(cells, K)` of a stage, bilinear, to `factor` times its rows and columns."""
    if factor == 1:
        return record
    assert record.logits is not None, "distillation needs exit records"
    batches = unpack_grids(record.logits.float(), grids, record.scale)
    finer = [(i, F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)) for i, maps in batches]
    return replace(record, logits=pack_grids(finer), scale=record.scale * factor, upscale=1)


def _check(teacher: ExitSegmenter, student: ExitSegmenter, config: DistillConfig) -> None:
    """Reject, in one sentence, a teacher whose answers mean something else than the student's."""
    theirs, ours = teacher.preprocessing, student.preprocessing
    same = {
        "class names": (getattr(theirs.labels, "names", None), getattr(ours.labels, "names", None)),
        "patch_size": (teacher.config.backbone.patch_size, student.config.backbone.patch_size),
        "mean of pixels": (theirs.mean, ours.mean),
        "std of pixels": (theirs.std, ours.std),
    }
    for name, (a, b) in same.items():
        if a != b:
            raise ConfigError(
                f"distill.teacher={config.teacher} has other {name} ({_short(a)}, not {_short(b)}): choose a teacher "
                "that sees and names things as this model does."
            )
    width, wanted = teacher.config.backbone.embed_dim, student.config.backbone.embed_dim
    if config.features and width != wanted:
        raise ConfigError(
            f"distill.teacher={config.teacher} has features of {width} channels, not {wanted}: set distill.features=0, "
            "or choose a teacher of this width."
        )
    if "masks" in (teacher.decode_head.kind, student.decode_head.kind) and (config.features or config.logits):
        raise ConfigError(
            "distill.features and distill.logits compare class maps, and a decode head of masks gives none: set both "
            "to 0, or train on labels."
        )
    for key, heads, shape in (("logits", [student.decode_head], _map), ("exits", list(student.exit_heads), _kind)):
        wrong = [head for head in heads if isinstance(head, Head) and shape(head) != shape(teacher.decode_head)]
        if getattr(config, key) and wrong:
            raise ConfigError(
                f"distill.{key} compares heads alike, and the decode head of {config.teacher} is "
                f"{_described(teacher.decode_head)}, not {_described(wrong[0])}: set distill.{key}=0."
            )


def _map(head: Head) -> tuple[str, int]:
    return head.kind, head.scale


def _kind(head: Head) -> tuple[str, int]:
    """Return what exits share with the decode head; their maps may be coarser, and are then upsampled."""
    return head.kind, 1


def _short(value: object) -> str:
    """Name a few of many, which is enough for a sentence."""
    if isinstance(value, tuple) and len(value) > 4:
        return f"{', '.join(map(str, value[:3]))} and {len(value) - 3} more"
    return str(value)


def _described(head: Head) -> str:
    return f"{'an ATM' if head.kind == 'atm' else 'a softmax'} head with {head.scale} cells per patch side"
