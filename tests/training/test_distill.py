"""Distillation against slow loops, and what a student sees of its teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.helpers import random_image, tiny_segmenter
from tests.training.test_loop import run, run_until
from tests.training.tiny import same_weights, silent, tiny_run, weights, write_dataset
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.inputs.labels import default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, DoViT, DToP, ExitRecord, build_method
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import DistillConfig, TrainConfig
from tokenexit.training.distill import cell_weights, distillation_loss, divergence, feature_loss, load_teacher
from tokenexit.training.loop import train


def softmax(values: Sequence[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The loss of DoViT's release, a cell and a class at a time."""
    total = 0.0
    for said, wanted in zip(student.tolist(), teacher.tolist()):
        p, q = (softmax([value / temperature for value in values]) for values in (wanted, said))
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    return total / len(student) * temperature**2


def atm_divergence(student: ExitRecord, teacher: ExitRecord, image: Sequence[int], temperature: float) -> float:
    """Each class is a question with the answers yes, of probability presence times sigmoid, and no."""

    def yes(stage: ExitRecord, cell: int, k: int) -> float:
        assert stage.logits is not None
        assert stage.presence is not None
        present = softmax([value / temperature for value in stage.presence[image[cell], k].tolist()])[0]
        return present / (1 + math.exp(-stage.logits[cell, k].item() / temperature))

    cells, classes = student.logits.shape  # type: ignore[union-attr]
    total = 0.0
    for cell in range(cells):
        for k in range(classes):
            p, q = yes(teacher, cell, k), yes(student, cell, k)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / cells * temperature**2


def atm_stage(cells: int, images: int, classes: int = 3) -> ExitRecord:
    logits = torch.randn(cells, classes, dtype=torch.float64)
    return ExitRecord(logits=logits, presence=torch.randn(images, classes, 2, dtype=torch.float64), kind="atm")


# --------------------------------------------------------------------------------------------------- single losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_softmax_heads_is_that_of_the_slow_loop(temperature: float) -> None:
    student, teacher = (ExitRecord(logits=2 * torch.randn(7, 4)) for _ in range(2))
    loss = divergence(student, teacher, torch.zeros(7, dtype=torch.int64), temperature)
    assert student.logits is not None
    assert teacher.logits is not None
    expected = softmax_divergence(student.logits, teacher.logits, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_atm_heads_is_that_of_the_slow_loop(temperature: float) -> None:
    image = [0, 0, 0, 1, 1]
    student, teacher = atm_stage(5, 2), atm_stage(5, 2)
    loss = divergence(student, teacher, torch.tensor(image), temperature)
    assert loss.item() == pytest.approx(atm_divergence(student, teacher, image, temperature), rel=1e-5)


def test_divergence_of_atm_heads_that_are_sure_is_finite_with_a_finite_gradient() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    presence = torch.tensor([[[100.0, -100.0], [-100.0, 100.0]]], requires_grad=True)
    student = ExitRecord(logits=logits, presence=presence, kind="atm")
    teacher = ExitRecord(logits=-logits.detach(), presence=-presence.detach(), kind="atm")
    loss = divergence(student, teacher, torch.zeros(1, dtype=torch.int64), 1.0)
    loss.backward()
    assert logits.grad is not None
    assert presence.grad is not None
    assert all(bool(value.isfinite().all()) for value in (loss, logits.grad, presence.grad))


@pytest.mark.parametrize("kind", ["softmax", "atm"])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_class_balance_lifts_the_cells_of_rare_classes_of_the_teacher(kind: str, balance: float) -> None:
    image = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    if kind == "softmax":
        student, teacher = (ExitRecord(logits=2 * torch.randn(7, 4, dtype=torch.float64)) for _ in range(2))
        label = cast(Tensor, teacher.logits).argmax(1)
    else:
        student, teacher = atm_stage(7, 2, 4), atm_stage(7, 2, 4)
        assert teacher.presence is not None
        label = (teacher.presence.softmax(2)[..., 0][image] * cast(Tensor, teacher.logits).sigmoid()).argmax(1)
    shares = [label.tolist().count(k) / 7 for k in label.tolist()]
    raw = [share**-balance for share in shares]
    expected = 0.0
    for i, weight in enumerate(raw):
        cell = torch.tensor([i])
        ours, theirs = (replace(s, logits=cast(Tensor, s.logits)[cell]) for s in (student, teacher))
        expected += weight / (sum(raw) / 7) * divergence(ours, theirs, image[cell], 1.5).item() / 7
    assert len(set(shares)) > 1
    assert divergence(student, teacher, image, 1.5, balance).item() == pytest.approx(expected, rel=1e-4)


def test_cell_weights_have_a_mean_of_one_and_with_power_one_make_classes_equal() -> None:
    label = torch.tensor([0, 0, 0, 0, 0, 2, 2, 3])
    weights = cell_weights(label, 5, 1.0)
    assert weights.mean().item() == pytest.approx(1.0)
    totals = [weights[label == k].sum().item() for k in (0, 2, 3)]
    assert totals == pytest.approx([8 / 3] * 3)
    assert torch.equal(cell_weights(torch.zeros(3, dtype=torch.int64), 5, 0.5), torch.ones(3))


def tokens(x: Tensor, position: Sequence[int], cells: int) -> Tokens:
    return Tokens(x, torch.tensor(position, dtype=torch.int64), Packing.of([len(position)], x.device), ((1, cells),), 0)


def test_features_are_compared_where_tokens_are_live() -> None:
    teacher, student = torch.randn(5, 3), torch.randn(2, 3)
    loss = feature_loss(tokens(student, [1, 4], 5), tokens(teacher, range(5), 5))
    expected = sum((float(student[i, c]) - float(teacher[p, c])) ** 2 for i, p in ((0, 1), (1, 4)) for c in range(3))
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)


def test_features_of_nobody_cost_nothing_and_are_part_of_the_graph() -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    loss = feature_loss(tokens(student, [], 5), tokens(torch.randn(5, 3), range(5), 5))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


# ----------------------------------------------------------------------------------------------------- whole outputs


def two_passes(method: Any, head: str = "fcn") -> tuple[SegmentationOutput, SegmentationOutput]:
    images = torch.stack([random_image(12, 16, seed) for seed in range(2)])
    student, teacher = tiny_segmenter(head, seed=1).train(), tiny_segmenter(head, seed=2, exits=())
    with torch.no_grad():
        return student(images, method), teacher(images, with_records=True)


@pytest.mark.parametrize("head", ["fcn", "atm", "setr_naive"])
@pytest.mark.parametrize("weights", [(0.5, 1.0, 0.0), (0.0, 1.0, 0.3), (2.0, 0.0, 0.0), (0.0, 0.0, 0.7)])
def test_the_loss_is_the_weighted_sum_of_features_decode_head_and_exits(
    head: str, weights: tuple[float, float, float]
) -> None:
    output, target = two_passes(Dense(), head)
    teacher, image = target.exit_records[-1], torch.arange(2).repeat_interleave(12)
    features, logits, exits = weights
    first, second, last = (divergence(stage, teacher, image, 1.5) for stage in output.exit_records)
    seen = output.exit_records[-1].seen, teacher.seen
    assert seen[0] is not None
    assert seen[1] is not None
    expected = features * (seen[0].x - seen[1].x).square().mean() + logits * last + exits * (first + second)
    loss = distillation_loss(output, target, DistillConfig("folder", *weights, temperature=1.5))
    torch.testing.assert_close(loss, expected)
    assert loss > 0


def upsampled_by_loops(maps: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """`(h w, K)` of one image, bilinear between cell centres, to `(h w factor^2, K)` in raster order."""
    (h, w), rows = grid, []
    for y in range(h * factor):
        for x in range(w * factor):
            v, u = (y + 0.5) / factor - 0.5, (x + 0.5) / factor - 0.5
            v, u = min(max(v, 0.0), h - 1.0), min(max(u, 0.0), w - 1.0)
            (i, a), (j, b) = ((int(c), c - int(c)) for c in (v, u))
            below, right = min(i + 1, h - 1), min(j + 1, w - 1)
            rows.append(
                (1 - a) * ((1 - b) * maps[i * w + j] + b * maps[i * w + right])
                + a * ((1 - b) * maps[below * w + j] + b * maps[below * w + right])
            )
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "factor"), [(("setr_naive", "setr_naive"), 4), (("linear", "setr_naive"), 4)])
def test_logits_may_be_compared_after_the_upsampling_of_the_heads_as_released(
    heads: tuple[str, str], factor: int
) -> None:
    """DoViT's release takes the divergence of what its SETR heads give, 4 cells a side for every patch."""
    images = torch.stack([random_image(12, 16, seed) for seed in range(2)])
    student, teacher = (tiny_segmenter(head, seed=seed, exits=()) for seed, head in enumerate(heads))
    with torch.no_grad():
        output, target = (model(images, with_records=True) for model in (student, teacher))
    maps = [
        torch.cat([upsampled_by_loops(grid.flatten(1).T, (3, 4), factor) for grid in out.grid_logits])
        for out in (output, target)
    ]
    config = DistillConfig("folder", features=0.0, upsampled=True)
    loss = distillation_loss(output, target, config)
    assert loss.item() == pytest.approx(softmax_divergence(maps[0], maps[1], 1.0), rel=1e-4)
    assert loss < 0.9 * distillation_loss(output, target, replace(config, upsampled=False))


def test_coarse_exits_are_compared_at_the_cells_of_a_finer_decode_head() -> None:
    """A light exit head has one cell for each patch, this decode head 2 x 2."""
    images = torch.stack([random_image(12, 16, seed) for seed in range(2)])
    model = tiny_segmenter("fcn", "setr_pup").train()
    with torch.no_grad():
        output = model(images, DoViT(threshold=0.5))
        target = tiny_segmenter("linear", "setr_pup", seed=2, exits=())(images, with_records=True)
    teacher, image = target.exit_records[-1], torch.arange(2).repeat_interleave(48)
    expected = 0.0
    for record in output.exit_records[:-1]:
        assert record.logits is not None
        finer = torch.cat([upsampled_by_loops(part, (3, 4), 2) for part in record.logits.chunk(2)])
        # rows of the teacher's map are in the raster order of its own cells
        expected += divergence(replace(record, logits=finer), teacher, image, 1.0).item()
    config = DistillConfig("folder", features=0.0, logits=0.0, exits=1.0)
    assert distillation_loss(output, target, config).item() == pytest.approx(expected, rel=1e-4)


def test_exits_are_compared_after_upsampling_too_and_heads_without_one_as_before() -> None:
    config = DistillConfig("folder", exits=0.5)
    for head, same in (("setr_naive", False), ("fcn", True), ("atm", True)):
        output, target = two_passes(Dense(), head)
        losses = [distillation_loss(output, target, replace(config, upsampled=after)) for after in (False, True)]
        assert torch.equal(*losses) is same


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    model, images = tiny_segmenter("fcn"), random_image(12, 16)[None]
    output = model(images, with_records=True)
    loss = distillation_loss(output, output, DistillConfig("folder"))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_dtop_is_compared_on_the_canvas_and_in_the_features_of_those_who_stayed() -> None:
    output, target = two_passes(DToP(threshold=0.5, keep_per_class=1))
    left = torch.cat([stage.flatten() for stage in output.exit_index]) < 2
    seen = output.exit_records[-1].seen
    assert seen is not None
    stayed = torch.zeros_like(left).index_fill(0, seen.position, True)
    assert 0 < int(stayed.sum()) < 24
    assert torch.equal(stayed, ~left)
    canvas = torch.cat([maps.flatten(1).T for maps in output.grid_logits])  # what the result is made of
    wanted = torch.cat([maps.flatten(1).T for maps in target.grid_logits])
    loss = distillation_loss(output, target, DistillConfig("folder", features=0.0))
    assert loss.item() == pytest.approx(softmax_divergence(canvas, wanted, 1.0), rel=1e-4)
    teacher = target.exit_records[-1].seen
    assert teacher is not None
    features = distillation_loss(output, target, DistillConfig("folder", features=1.0, logits=0.0))
    torch.testing.assert_close(features, (seen.x - teacher.x[stayed]).square().mean())


@pytest.mark.parametrize("method", [Dense(), DoViT(threshold=0.5)])
def test_others_are_compared_in_the_features_of_all_cells(method: Any) -> None:
    output, _ = two_passes(method)
    seen = output.exit_records[-1].seen
    assert seen is not None
    assert seen.position.tolist() == list(range(24))


def test_outputs_without_records_hold_no_features() -> None:
    for method in (Dense(), DToP(), DoViT()):
        output = tiny_segmenter("fcn")(random_image(12, 16)[None], method)
        assert all(stage.seen is None for stage in output.exit_records)


@pytest.mark.parametrize("name", ["dense", "dtop", "dovit"])
def test_what_is_learnt_from_the_teacher_reaches_backbone_and_heads(name: str) -> None:
    student, teacher = tiny_segmenter("fcn", seed=1).train(), tiny_segmenter("fcn", seed=2, exits=())
    images = random_image(12, 16)[None]
    method = build_method(name if name == "dense" else {"name": name, "threshold": 0.5})
    with torch.no_grad():
        target = teacher(images, with_records=True)
    distillation_loss(student(images, method), target, DistillConfig("folder", exits=0.5)).backward()
    assert [n for n, parameter in student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ------------------------------------------------------------------------------------------------------------- teachers


def test_a_teacher_comes_frozen_and_without_its_exits(tmp_path: Path) -> None:
    original = tiny_segmenter("fcn")
    original.save_pretrained(tmp_path)
    teacher = load_teacher(DistillConfig(str(tmp_path)), tiny_segmenter("fcn"))
    assert teacher is not None
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(random_image(12, 16)[None], with_records=True)
    assert len(output.exit_records) == 1
    assert torch.equal(output.logits, original(random_image(12, 16)[None]).logits)
    assert load_teacher(DistillConfig(), tiny_segmenter("fcn")) is None


def named(model: ExitSegmenter, **changes: Any) -> ExitSegmenter:
    model.preprocessing = replace(model.preprocessing, **changes)
    return model


@pytest.mark.parametrize(
    ("teacher", "changes", "words"),
    [
        (lambda: tiny_segmenter("fcn", num_classes=4), {}, "has other class names"),
        (lambda: tiny_segmenter("fcn", patch_size=8), {}, r"has other patch_size \(8, not 4\)"),
        (lambda: named(tiny_segmenter("fcn"), mean=(0.1, 0.2, 0.3)), {}, r"has other mean of pixels \(\(0\.1, 0\.2"),
        (
            lambda: tiny_segmenter("fcn", embed_dim=16),
            {},
            "has features of 16 channels, not 32: set distill.features=0",
        ),
        (lambda: tiny_segmenter("atm"), {}, r"distill\.logits compares heads alike, .* is an ATM head"),
        (
            lambda: tiny_segmenter("setr_pup"),
            {},
            "a softmax head with 2 cells per patch side, not a softmax head with 1",
        ),
        (lambda: tiny_segmenter("atm"), {"logits": 0.0, "exits": 1.0}, r"distill\.exits compares heads alike"),
    ],
)
def test_a_teacher_of_other_things_is_refused_in_one_sentence(
    teacher: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    teacher().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        load_teacher(DistillConfig(str(tmp_path), **changes), tiny_segmenter("fcn"))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("teacher", "changes"),
    [
        (lambda: tiny_segmenter("fcn", embed_dim=16), {"features": 0.0}),
        (lambda: tiny_segmenter("atm"), {"logits": 0.0}),
        (lambda: tiny_segmenter("linear", "setr_naive", depth=6), {"exits": 1.0}),
        (lambda: tiny_segmenter("linear", "setr_pup"), {"logits": 0.0, "exits": 1.0}),
    ],
)
def test_a_teacher_may_differ_in_what_is_not_compared(teacher: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    teacher().save_pretrained(tmp_path)
    assert load_teacher(DistillConfig(str(tmp_path), **changes), tiny_segmenter("fcn")) is not None


def test_labels_of_other_names_are_other_classes(tmp_path: Path) -> None:
    model = tiny_segmenter("fcn")
    labels = default_labels(5)
    renamed = replace(labels, names=(*labels.names[1:], "other"))
    ExitSegmenter(model.config.backbone, 5, (1, 3), "fcn", "fcn", Preprocessing(labels=renamed)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="has other class names"):
        load_teacher(DistillConfig(str(tmp_path)), model)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    run(tiny_run(data, out, methods=["dense"], steps=3, seed=9))
    return out


def taught(data: Path, out: Path, teacher: Path, **changes: Any) -> TrainConfig:
    return tiny_run(data, out, distill=DistillConfig(str(teacher), exits=0.5), **changes)


def test_a_run_with_a_teacher_resumes_exactly_and_leaves_the_teacher_alone(
    data: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (teacher / "model.safetensors").read_bytes()
    lines: list[str] = []
    never = run(taught(data, tmp_path / "never", teacher), say=lines.append)
    assert f", taught by {teacher}" in lines[0]
    config = taught(data, tmp_path / "killed", teacher)
    run_until(4, config, monkeypatch)
    assert same_weights(run(config), never)
    assert not same_weights(run(tiny_run(data, tmp_path / "alone")), never)
    assert (teacher / "model.safetensors").read_bytes() == before


def test_a_student_comes_nearer_to_its_teacher_than_one_that_reads_labels_alone(
    data: Path, tmp_path: Path, teacher: Path
) -> None:
    images = torch.stack([random_image(24, 32, seed) for seed in range(4)])
    target = load_teacher(DistillConfig(str(teacher)), ExitSegmenter.from_pretrained(teacher))
    assert target is not None
    far = []
    for name, config in (
        ("taught", taught(data, tmp_path / "taught", teacher, methods=["dense"], steps=20, checkpoint_every=0)),
        ("alone", tiny_run(data, tmp_path / "alone", methods=["dense"], steps=20, checkpoint_every=0)),
    ):
        student = train(config, say=silent, progress=False)
        output = student(images, with_records=True)
        far.append(distillation_loss(output, target(images, with_records=True), DistillConfig(name)).item())
    assert far[0] < 0.8 * far[1]


def test_bf16_runs_may_have_a_teacher(data: Path, tmp_path: Path, teacher: Path) -> None:
    config = taught(data, tmp_path, teacher, steps=2, precision="bf16")
    assert all(bool(value.isfinite().all()) for value in weights(train(config, say=silent, progress=False)).values())


def test_a_folder_without_a_teacher_ends_in_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        run(taught(data, tmp_path / "out", tmp_path))
