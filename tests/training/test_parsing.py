"""Command line and YAML to a run, and errors in plain words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenexit.errors import ConfigError
from tokenexit.training.config import TrainConfig
from tokenexit.training.parsing import config_keys, parse_train, shipped_recipes


def parse(*arguments: str) -> TrainConfig:
    return parse_train(arguments, lambda parser: None)[0]


def yaml_file(path: Path, text: str) -> str:
    (path / "run.yaml").write_text(text)
    return str(path / "run.yaml")


def test_without_options_all_values_are_the_defaults() -> None:
    assert parse() == TrainConfig()


def test_yaml_lists_become_tuples_and_options_beside_the_file_win(tmp_path: Path) -> None:
    text = """
        steps: 70
        batch_size: 3
        data: {crop: [64, 96], ratio: [0.5, 1.5], mean: [0.1, 0.2, 0.3]}
        optim: {lr: 5e-5, betas: [0.8, 0.9]}
        model: {exits: [2, 4], exit_head: {kind: atm, layers: 1}, options: {drop_path: 0.1}}
        methods: [dense, {name: dtop, threshold: [0.9, 0.8]}]
    """
    config = parse("--config", yaml_file(tmp_path, text), "--steps", "9", "--optim.momentum=0.5")
    assert (config.steps, config.batch_size) == (9, 3)
    assert config.data.crop == (64, 96)
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.optim.lr == 5e-5
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.momentum == 0.5
    assert config.model.exits == [2, 4]
    assert config.model.exit_head == {"kind": "atm", "layers": 1}
    assert config.methods == ["dense", {"name": "dtop", "threshold": [0.9, 0.8]}]


def test_a_size_may_be_one_number_two_or_none() -> None:
    assert parse("--data.resize", "512").data.resize == 512
    assert parse("--data.resize", "[512, 640]").data.resize == (512, 640)
    assert parse("--data.resize", "512", "--data.resize", "null").data.resize is None


def test_options_may_be_written_with_hyphens() -> None:
    assert parse("--batch-size", "3", "--optim.weight-decay=0.5").batch_size == 3


def test_options_of_nested_keys_may_be_written_as_in_other_commands() -> None:
    config = parse(
        "--data-root", "folder", "--data.val-split", "holdout", "--optim-weight-decay=0.5", "--val-limit", "7"
    )
    assert (config.data.root, config.data.val_split, config.optim.weight_decay) == ("folder", "holdout", 0.5)
    assert config.val_limit == 7


def test_no_two_keys_are_the_same_option_when_written_with_dashes() -> None:
    from tokenexit.cli.method_options import method_options

    written = [
        key.replace(".", "-").replace("_", "-") for key in (*config_keys(), *method_options(), "method", "dry_run")
    ]
    assert len(set(written)) == len(written)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "abc"), "steps: abc does not fit, give a whole number."),
        (("--steps", "1.5"), "steps: 1.5 does not fit, give a whole number."),
        (("--optim.lr", "fast"), "optim.lr: fast does not fit, give a number."),
        (("--optim.clip_grad_norm", "x"), "optim.clip_grad_norm: x does not fit, give a number or null."),
        (("--optim.name", "adam"), "optim.name: adam does not fit, give one of adamw, sgd."),
        (("--resume", "maybe"), "resume: maybe does not fit, give true or false."),
        (("--data.crop", "[64]"), "data.crop: [64] does not fit, give a list of 2 numbers such as [352, 352]."),
        (("--data.window", "5"), "data.window: 5 does not fit, give a list of 2 numbers or null."),
        (("--data.resize", "x"), "data.resize: x does not fit, give a whole number or a list of 2 numbers or null."),
        (("--methods", "dtop"), "methods: dtop does not fit, give a list such as [dense]."),
        (("--model.options", "3"), "model.options: 3 does not fit, give a mapping such as {drop_path: 0.1}."),
        (("--optim", "3"), "optim: one value does not fit, give a mapping, or the keys below it as --optim.KEY VALUE."),
        (("--stepz", "3"), "stepz is no key of a run: did you mean steps?"),
        (("--lr", "3"), "lr is no key of a run: did you mean optim.lr?"),
        (("--optim.lrr", "3"), "optim.lrr is no key of a run: did you mean optim.lr?"),
        (("--qqq", "3"), "qqq is no key of a run: see tokenexit train --help."),
        (("camvid",), "camvid stands alone: write options as --KEY VALUE, see tokenexit train --help."),
        (("--steps", "0"), "steps must be at least 1, got 0: raise it."),
        (("--validate-every", "-1"), "validate_every must be at least 0, got -1: raise it."),
        (("--validate-every", "often"), "validate_every: often does not fit, give auto or a whole number."),
        (("--keep", "first"), "keep: first does not fit, give one of best, last."),
    ],
)
def test_wrong_options_end_in_one_sentence_with_name_value_and_cure(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [1\n  foo: {", r"is no YAML \(.* in line 2\): correct it\."),
        ("- a\n- b\n", "holds no keys"),
        ("[" * 50_000, r"is no YAML \(it nests too deeply\): correct it\."),
        ("#" * (2 * 2**20 + 1), r"is no YAML \(it has more than 2 MB\): correct it\."),
        ("started: 2026-13-45\n", r"is no YAML \(month must be in .*\): correct it\."),
        ("", "holds no keys"),
        ("stepz: 3\n", r"^stepz is no key of a run: did you mean steps\?$"),
        ("optim: {lrr: 3}\n", r"^optim\.lrr is no key of a run: did you mean optim\.lr\?$"),
        ("steps: many\n", r"^steps: many does not fit, give a whole number\.$"),
        ("data: {crop: 64}\n", r"^data\.crop: 64 does not fit, give a list of 2 numbers"),
        ("optim: fast\n", "^optim: one value does not fit"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_wrong_files_end_in_one_sentence(joined: bool, text: str, words: str, tmp_path: Path) -> None:
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        parse(*([f"--config={path}"] if joined else ["--config", path]))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_end_in_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match=r"^--config .* cannot be read \(.*\): give a YAML file\.$"):
            parse("--config", str(path))
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ConfigError, match="is no"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_shipped_recipes_parse_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = shipped_recipes()
    assert {"camvid_vit_tiny", "dtop/ade20k_base", "dovit/setr_ade20k_large"} <= recipes.keys()
    for name, file in recipes.items():
        assert parse("--config", name) == parse("--config", str(file))
    assert parse("--config=dtop/ade20k_base.yaml", "--steps", "7").steps == 7


def test_an_existing_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtop").mkdir()
    (tmp_path / "dtop" / "ade20k_base.yaml").write_text("steps: 70\n")
    (tmp_path / "camvid_atm").mkdir()  # a folder is no recipe
    assert parse("--config", "dtop/ade20k_base.yaml").steps == 70
    assert parse("--config", "dtop/ade20k_base").steps == 40_000
    assert parse("--config", "camvid_atm").steps != TrainConfig().steps


@pytest.mark.parametrize("given", ["dtop/ade20k_bas", "dtop/ade20k_bas.yaml"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_wrong_name_lists_the_nearest_recipes(joined: bool, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*([f"--config={given}"] if joined else ["--config", given]))
    assert str(caught.value) == (
        f"--config {given} is neither a file nor a shipped recipe: did you mean dtop/ade20k_base, "
        "dtop/setr_ade20k_base or dtop/ade20k_large?"
    )


def test_help_explains_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert words.startswith("usage: tokenexit train [--config FILE] [--KEY VALUE ...]")
    for key in config_keys():
        _, found, explanation = words.partition(f" --{key} ")
        assert found, key
        explanation = explanation.partition("(type: ")[0]
        assert len(explanation.split()) >= 3, key  # metavar and a text
        assert explanation.rstrip().endswith("."), key
    assert "default: 0.0001" in words


def test_a_help_for_options_needs_no_torch() -> None:
    code = """
import sys
from tokenexit.training.parsing import parse_train
parse_train([], lambda parser: None)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_further_options_are_returned_beside_the_run() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--method", type=str, default=None)

    _, options = parse_train(["--method", "dtop"], add)
    assert options.method == "dtop"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], "stepz is no key of a run: did you mean steps?"),
        (["--steps", "0"], "steps must be at least 1, got 0: raise it."),
        (["--threshold", "0.9"], "options of a method need --method"),
        (["--config", "nope.yaml"], "--config nope.yaml cannot be read"),
        (["--batch-size", "3", "--accumulate", "2"], "batch_size must be a multiple of 1 processes x accumulate=2"),
        (["--model.weights", "a", "--model.init_from", "b"], "model.weights and model.init_from exclude each other"),
        (["--model.new_exits", "true"], "model.new_exits puts exits on a saved model"),
        (["--freeze", "backbone"], "freeze=backbone would keep random weights"),
        (["--data.name", "camvod"], "dataset 'camvod' is unknown: choose one of ade20k, camvid"),
    ],
)
def test_wrong_options_are_refused_before_torch_is_loaded(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = f"""
import sys
from tokenexit.cli import main
status = main(["train", *{arguments!r}])
assert "torch" not in sys.modules
sys.exit(status)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode in (1, 2)
    assert capfd.readouterr().err.startswith(f"tokenexit train: {words}")
