"""A decode head that is the user's own module: cost, grids, saving, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.calibration.test_dense_pass import Noise
from tests.heads import own_heads
from tests.heads.own_heads import CLASSES, DIM
from tests.heads.test_heads import complete
from tests.helpers import assert_close, enliven, random_image, tiny_config, tiny_segmenter
from tests.methods.test_behaviours import counted_macs
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.store import write_calibration
from tokenexit.calibration.targets import Budget
from tokenexit.engine.tokens import unpack_grids
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import ModuleHead, build_head, normalize_head
from tokenexit.heads.module import probed
from tokenexit.methods import Dense, DoViT, DToP, Method, Truncated
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

SCALES = {"Plain": 1, "Up": 4, "Attending": 1, "Remembering": 1, "Tied": 1}
GRIDS = ((3, 4), (5, 2))


def own_head(name: str) -> ModuleHead:
    module = getattr(own_heads, name)().eval()
    enliven(module)
    classes, scale = probed(module, DIM, GRIDS)
    return ModuleHead(module, DIM, classes, scale)


def own_segmenter(name: str = "Up", exit_head: Any = "fcn", exits: tuple[int, ...] = (1, 3)) -> ExitSegmenter:
    """The tiny model with a decode head of the user's own."""
    base = tiny_segmenter(exit_head, "linear", exits=exits)
    heads = base.config.exit_heads
    model = ExitSegmenter(tiny_config(), CLASSES, exits, list(heads), own_head(name))
    model.backbone, model.exit_heads = base.backbone, base.exit_heads
    return model.eval()


@pytest.mark.parametrize("name", SCALES)
def test_module_head__is_the_module_on_every_grid_of_a_mixed_batch(name: str) -> None:
    head, grids = own_head(name), [(2, 3), (4, 1), (2, 3)]
    tokens = complete(grids)
    assert head.scale == SCALES[name]
    assert head.needs_grid
    with torch.no_grad():
        out = head(tokens)
        expected = [head.module(x.mT.unflatten(1, grid)[None])[0] for x, grid in zip(tokens.x.split([6, 4, 6]), grids)]
    assert out.packing.lengths == tuple(h * w * head.scale**2 for h, w in grids)
    for members, maps in unpack_grids(out.logits, grids, head.scale):
        for i, one in zip(members, maps):
            assert_close(one, expected[i])


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("method", [Dense(), DoViT(0.26)], ids=["dense", "dovit"])
def test_module_head__the_ledger_equals_what_an_operator_counter_measures(name: str, method: Method[Any]) -> None:
    model, image = own_segmenter(name), random_image(15, 22)
    with torch.no_grad():
        ledger = model([image], method).ledger  # with the operators that torch has for whole layers
    torch.backends.mha.set_fastpath_enabled(False)  # which no counter of operators knows
    try:
        counted, again = counted_macs(model, image, method)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert ledger.macs == again.macs == (counted,)
    assert ledger.parts[0].decode_head > 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["Up", "Attending", "Remembering"])
def test_module_head__counts_the_same_in_any_mode_and_does_no_harm(name: str, mode: Any) -> None:
    head = own_head(name)
    expected = own_head(name).ops(6, (2, 3))
    before = copy.deepcopy(head.state_dict())
    head.train()
    with mode():
        assert head.ops(6, (2, 3)) == expected
        assert head.ops(2, (1, 1)).macs * 2 < expected.macs
    assert head.training
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize(("exit_head", "threshold"), [("fcn", 0.6), ("setr_pup", 0.344)])
def test_module_head__dovit_and_dense_run_and_dtop_refuses_it(exit_head: str, threshold: float) -> None:
    model, images = own_segmenter("Up", exit_head), [random_image(16, 20), random_image(9, 33)]
    with torch.no_grad():
        dense = model(images, Dense())
        never, some = model(images, DoViT(1.0)), model(images, DoViT(threshold))
    assert all(torch.equal(a, b) for a, b in zip(dense.grid_logits, never.grid_logits))
    assert len({int(n) for stage in some.exit_index for n in stage.unique()}) > 1
    assert [tuple(maps.shape) for maps in dense.grid_logits] == [(5, 16, 20), (5, 12, 36)]
    assert [tuple(labels.shape) for labels in dense.labels] == [(16, 20), (9, 33)]
    with pytest.raises(ConfigError, match="grid"):
        model(images, DToP(0.5))


def test_module_head__truncated_ends_at_an_exit_of_the_same_resolution() -> None:
    images = [random_image(16, 20)]
    with torch.no_grad():
        assert own_segmenter("Plain", "fcn")(images, Truncated(1)).ledger.share_of_dense[0] < 1
    with pytest.raises(ConfigError, match="heads of one resolution"):
        own_segmenter("Up", "fcn")(images, Truncated(1))


def test_module_head__in_bf16_is_near_and_counts_the_same() -> None:
    model, images = own_segmenter("Up"), [random_image(16, 20), random_image(9, 33)]
    with torch.no_grad():
        expected = model(images)
        with inference(torch.device("cpu"), "bf16"):
            out = copy.deepcopy(model)(images)
    assert out.ledger == expected.ledger
    for a, b in zip(out.grid_logits, expected.grid_logits):
        assert_close(a.float(), b, 5e-2)


def test_module_head__thresholds_are_calibrated_and_saved(tmp_path: Path) -> None:
    images = CalibrationSet(own_segmenter("Up"), Noise(6), tuple(range(6)))
    result = calibrate(images, DoViT(), Budget("budget", 0.8))
    assert result.mac_ratio is not None
    assert result.mac_ratio <= 0.82
    images.model.save_pretrained(tmp_path)
    write_calibration(result, tmp_path, tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path, head=own_heads.Up)
    assert isinstance(again.calibrated_method(), DoViT)


# ------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("name", SCALES)
def test_saved__comes_back_bit_for_bit_with_the_class_that_the_user_names(name: str, tmp_path: Path) -> None:
    model, images = own_segmenter(name), [random_image(16, 20)]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["decode_head"] == {
        "kind": "module",
        "import": f"tests.heads.own_heads:{name}",
        "options": {},
        "scale": SCALES[name],
    }
    given = getattr(own_heads, name)
    for head in (given, lambda: given(), given().train()):
        again = ExitSegmenter.from_pretrained(tmp_path, head=head)
        assert again.fingerprint() == model.fingerprint()
        assert not any(part.training for part in again.modules())
        with torch.no_grad():
            assert torch.equal(again(images).grid_logits[0], model(images).grid_logits[0])


def test_saved__a_module_that_is_given_is_copied_and_left_alone(tmp_path: Path) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    mine = own_heads.Plain()
    before = copy.deepcopy(mine.state_dict())
    ExitSegmenter.from_pretrained(tmp_path, head=mine)
    assert mine.training
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())


def test_saved__options_build_the_class_again(tmp_path: Path) -> None:
    module = own_heads.Plain(channels=7)
    head = ModuleHead(module, DIM, CLASSES, 1, {"channels": 7})
    ExitSegmenter(tiny_config(), CLASSES, (), "fcn", head).save_pretrained(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path, head=own_heads.Plain)
    assert again.decode_head.module.conv.out_channels == 7


def test_saved__loading_runs_nothing_that_was_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('this code was not asked for')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    own_segmenter("Plain").save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("tests.heads.own_heads:Plain", "trap:Plain"))
    with pytest.raises(ConfigError, match=r"'trap:Plain', and nothing is imported unasked: give its class as head"):
        ExitSegmenter.from_pretrained(folder)
    again = ExitSegmenter.from_pretrained(folder, head=own_heads.Plain)
    assert again.config.decode_head["import"] == "tests.heads.own_heads:Plain"
    assert "trap" not in sys.modules


def broken() -> nn.Module:
    raise RuntimeError("no such\nfile")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (own_heads.Up, "other weights than head tests.heads.own_heads:Up has"),
        (broken, "head broken could not be built with the saved options {} .RuntimeError: no such.: give the class"),
        (lambda: 3, "returns 3, no torch.nn.Module"),
        (3, "head 3 is no module and no class of one"),
        (nn.Conv2d, "head Conv2d could not be built"),
    ],
)
def test_saved__what_is_not_its_head_is_refused_in_one_sentence(head: Any, message: str, tmp_path: Path) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        ExitSegmenter.from_pretrained(tmp_path, head=head)
    assert "\n" not in str(caught.value)


def test_saved__a_head_for_a_model_that_wants_none_is_refused(tmp_path: Path) -> None:
    tiny_segmenter("fcn").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the decode head of .* is fcn: leave it out"):
        ExitSegmenter.from_pretrained(tmp_path, head=own_heads.Plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0}, "scale of head 'module' must be"),
        ({"import": 3}, "import of head 'module' must be"),
        ({"options": [1]}, "options of head 'module' must be"),
        ({"channels": 3}, "unknown key 'channels'"),
    ],
)
def test_saved__damaged_configurations_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"]["decode_head"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        ExitSegmenter.from_pretrained(tmp_path, head=own_heads.Plain)


def test_deepcopy__is_another_model_with_the_same_answers_and_cost() -> None:
    model, images = own_segmenter("Up"), [random_image(16, 20)]
    other = copy.deepcopy(model)
    with torch.no_grad():
        a, b = model(images), other(images)
        assert torch.equal(a.grid_logits[0], b.grid_logits[0])
        assert a.ledger == b.ledger
        other.decode_head.module.conv.weight.zero_()
    assert other.fingerprint() != model.fingerprint()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FixedSize", "decode head FixedSize maps 3x4 to 8x8 and 5x2 to 8x8: height and width must grow by one whole"),
        ("Stretched", "decode head Stretched maps 3x4 to 6x4 and 5x2 to 10x2"),
        ("Several", r"decode head Several does not take one feature map \(2, 32, 3, 4\) .*the last feature map alone"),
        ("MultipleSelect", "reads several feature maps .input_transform='multiple_select'.: give a head of the last"),
        ("Answer", "decode head Answer gives a dict for features"),
    ],
)
def test_probed__what_is_no_head_of_the_last_map_is_refused_in_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        probed(getattr(own_heads, name)().eval(), DIM, GRIDS)
    assert "\n" not in str(caught.value)


def test_probed__another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not take one feature map"):
        probed(own_heads.Plain().eval(), 48, GRIDS)


def test_module_head__a_scale_that_differs_at_another_grid_is_refused_when_it_is_met() -> None:
    head = ModuleHead(own_heads.FixedSize().eval(), DIM, CLASSES, 2)
    head(complete([(4, 4)]))
    with pytest.raises(ConfigError, match="its scale must be the same for every grid"):
        head(complete([(4, 4), (2, 2)]))


def test_module_head__layers_without_shapes_and_options_beyond_json_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers without shapes"):
        ModuleHead(nn.LazyConv2d(5, 1), DIM, CLASSES, 1)
    with pytest.raises(ConfigError, match="as in JSON"):
        ModuleHead(own_heads.Plain(), DIM, CLASSES, 1, {"channels": nn.ReLU})


def test_module_head__attention_alone_is_counted_as_its_parts() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2).mT
            return self.attention(rows, rows, rows, need_weights=False)[0].mT.unflatten(2, x.shape[2:])

    n = 6
    assert ModuleHead(Alone().eval(), DIM, DIM, 1).ops(n, (2, 3)).macs == n * 4 * DIM**2 + 2 * n * n * DIM


class Stateful(own_heads.Plain):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_module_head__state_that_no_file_holds_and_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="keeps '_extra_state', which is no tensor and cannot be saved"):
        ModuleHead(Stateful(), DIM, CLASSES, 1)
    for dim, classes in ((DIM, 4), (16, CLASSES)):
        with pytest.raises(ConfigError, match=f"takes 32 channels and has 5 classes, and the model has {dim} and"):
            ExitSegmenter(tiny_config(embed_dim=dim), classes, (), (), own_head("Plain"))


def test_build_head__a_name_alone_builds_no_module() -> None:
    spec = own_head("Up").spec
    assert normalize_head(spec) == spec
    with pytest.raises(ConfigError, match="nothing is imported unasked"):
        build_head(spec, DIM, CLASSES)


def test_ops__of_a_module_head_import_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from tokenexit.heads import ModuleHead\n"
        "head = ModuleHead(torch.nn.Conv2d(8, 3, 3, padding=1).eval(), 8, 3, 1)\n"
        "assert head.ops(6, (2, 3)).macs == 6 * 9 * 8 * 3\n"
        "assert not {'sympy', 'torch._dynamo'} & set(sys.modules), 'seconds of imports'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
