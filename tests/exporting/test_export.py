"""Exported graphs say what the model says, at any size and threshold, and are written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_cli import fine, wrong
from tests.heads.test_eomt import eomt
from tests.heads.test_module import own_segmenter
from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting import export as exporting
from tokenexit.exporting.export import export_model, trace
from tokenexit.exporting.graph import threshold_table
from tokenexit.exporting.pictures import compared_images
from tokenexit.inputs.images import load_image
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, Gated, GatedBySize, Method, Resized, Truncated
from tokenexit.methods.reference import PrescribedExits
from tokenexit.segmenter import ExitSegmenter

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(21, 30), (40, 25), (4, 4), (3, 50), (12, 16)]
BY_CLASS = ((0.24, 0.25, 0.26, 0.27, 0.28),) * 2


def needs_onnx() -> Any:
    pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
    return pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")


CASES: list[tuple[str, Method[Any]]] = [
    ("fcn", DToP(0.26, 1)),
    ("fcn", DToP(BY_CLASS, 2, score="margin", temperature=1.5)),
    ("atm", DToP(0.3, 2)),
    ("mask_transformer", DToP(0.26, 1)),
    ("fcn", DoViT(0.26, min_improvement=0.0)),
    ("setr_pup", DoViT(0.26)),
    ("fcn", DoViT(0.26, rejoin=1)),
    ("linear", PAUMER(0.1)),
    ("fcn", Truncated(1)),
    ("fcn", DToP(0.26, 1, context_weight=0.5)),
    ("fcn", DToP(0.26, 1, stop=2)),
    ("fcn", DToP(0.26, 0, keep_in_window=3)),
    ("atm", DToP(0.3, 1, keep_in_window=2)),
    ("fcn", DToP(0.26, 1, frozen_context=2)),
    ("atm", DToP(0.3, 2, stop=2)),
]


@pytest.mark.parametrize("pad_rows", [None, 8], ids=["as they are", "padded"])
@pytest.mark.parametrize(("head", "method"), CASES, ids=[f"{head} {type(m).__name__}" for head, m in CASES])
def test_trace__is_the_model_at_any_size_and_threshold(head: str, method: Method[Any], pad_rows: int | None) -> None:
    model = tiny_segmenter(head)
    graph = trace(model, method, pad_rows).module(check_guards=False)
    own = threshold_table(model, method)
    left: set[int] = set()
    sizes = [size for size in SIZES if head != "setr_pup" or min(size) > 4]  # its traced convolutions want two rows
    for seed, size in enumerate(sizes):
        image = random_image(*size, seed=seed)
        for thresholds in (own, torch.ones_like(own), torch.zeros_like(own)):
            with torch.no_grad():
                labels, logits, stages = graph(image[None], thresholds)
                expected = model([image], exporting._with_table(method, thresholds.numpy()))
            assert torch.equal(stages[0], expected.exit_index[0])
            assert_close(logits[0], expected.grid_logits[0])
            assert torch.equal(labels[0], expected.labels[0])
            left |= set(stages.unique().tolist())
    assert len(left) > hasattr(method, "threshold"), "some leave and some stay"


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("atm", DToP(0.3, 2)),
        ("fcn", DoViT(0.26)),
        ("atm", DToP(0.3, 2, stop=2)),
        ("fcn", DToP(0.3, 2, stop=1)),
        ("fcn", DToP(0.3, 0, keep_in_window=4)),
        ("fcn", DToP(0.3, 1, frozen_context=2)),
    ],
    ids=["dtop", "dovit", "dtop that stops", "dtop that stops at once", "dtop in windows", "dtop with frozen keys"],
)
def test_export_model__writes_onnx_that_runs_in_another_runtime(head: str, method: Any, tmp_path: Path) -> None:
    onnxruntime = needs_onnx()
    model = tiny_segmenter(head)
    made = export_model(model, method, [random_image(21, 30), random_image(8, 13)], tmp_path)
    assert made.runs == 6
    assert made.error < 1e-4
    session = onnxruntime.InferenceSession(made.path)
    for seed, size in enumerate(SIZES):
        image = random_image(*size, seed=10 + seed)
        for threshold in (0.3, 1.0, 0.0):
            given = {"image": image[None].numpy(), "thresholds": np.full(2, threshold, np.float32)}
            labels, logits, stages = session.run(["labels", "grid_logits", "exit_stage"], given)
            with torch.no_grad():
                expected = model([image], replace(method, threshold=threshold))
            assert np.array_equal(stages[0], expected.exit_index[0].numpy())
            assert_close(torch.from_numpy(logits[0]), expected.grid_logits[0], 1e-4)
            assert labels.shape == (1, *size)
    about = json.loads(session.get_modelmeta().custom_metadata_map["tokenexit"])
    assert about["method"]["name"] == method.name
    assert about["thresholds"] == pytest.approx([method.threshold] * 2)
    assert len(about["classes"]) == len(about["palette"]) == 5
    assert about["score"] == "probability"


@pytest.mark.parametrize("rope", [None, "half"])
@pytest.mark.parametrize("frozen_context", [0, 2])
def test_export_model__pads_the_rows_of_every_product_behind_an_exit(
    rope: Any, frozen_context: int, tmp_path: Path
) -> None:
    onnxruntime, onnx = needs_onnx(), pytest.importorskip("onnx")
    model = tiny_segmenter("fcn", rope=rope)
    method = DToP(0.26, 1, frozen_context=frozen_context)
    made = export_model(model, method, [random_image(21, 30), random_image(8, 13)], tmp_path, pad_rows=8)
    assert made.runs == 6
    graph = onnx.load(made.path)
    (about,) = [json.loads(one.value) for one in graph.metadata_props if one.key == "tokenexit"]
    assert about["rows_padded_to_multiples_of"] == 8
    inputs = [node.input[0] for node in graph.graph.node if node.op_type in ("MatMul", "Gemm")]
    graph.graph.ClearField("output")
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    image = random_image(31, 43)
    table = threshold_table(model, DToP(0.26)).numpy()
    found = session.run(None, {"image": image[None].numpy(), "thresholds": table})
    rows = {array.shape[0] for array in found if array.ndim == 2}  # of products between weights and features
    everybody = 8 * 11 + 1
    assert rows - {everybody, everybody - 1}, "some have left"
    assert all(number % 8 == 0 for number in rows - {everybody, everybody - 1})


def test_export_model__refuses_to_pad_to_multiples_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pad_rows must be at least 1, got 0"):
        export_model(tiny_segmenter("fcn"), DToP(0.26), [random_image(8, 8)], tmp_path, pad_rows=0)


def test_export_model__writes_torch_programs_with_the_same_facts(tmp_path: Path) -> None:
    made = export_model(tiny_segmenter(), Dense(), [random_image(21, 30)], tmp_path, "torch")
    facts = {"tokenexit.json": ""}
    graph = torch.export.load(made.path, extra_files=facts).module(check_guards=False)
    assert json.loads(facts["tokenexit.json"])["method"] == {"name": "dense"}
    assert (made.runs, made.error == made.own_error) == (1, True)
    assert graph(random_image(9, 9)[None], torch.ones(2))[0].shape == (1, 9, 9)


@pytest.mark.parametrize("context", [{}, {"frozen_context": 2}, {"context_weight": 0.5}], ids=repr)
def test_export_model__of_a_confident_model_allows_for_equal_scores(
    context: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_segmenter()
    swapped: list[bool] = []

    def swaps(path: Path) -> Any:
        def two_tokens_change_places(image: Any, thresholds: Any) -> Any:
            prescribed = (
                model(torch.from_numpy(image), DToP(thresholds.squeeze().tolist(), **context)).exit_index[0].clone()
            )
            flat = prescribed.flatten()
            early, late = (flat == flat.min()).nonzero()[0], (flat == flat.max()).nonzero()[0]
            flat[early], flat[late] = flat[late].clone(), flat[early].clone()
            swapped.append(bool(flat.min() < flat.max()))
            output = model(torch.from_numpy(image), PrescribedExits(exit_index=flat, **context))
            return output.labels.numpy(), output.grid_logits[0][None].numpy(), flat.view_as(prescribed)[None].numpy()

        return two_tokens_change_places

    monkeypatch.setitem(exporting.WRITERS, "torch", (exporting._write_torch, swaps))
    with torch.no_grad():
        export_model(model, DToP(0.6, **context), [random_image(80, 80)], tmp_path / "a", "torch")
    assert any(swapped)
    monkeypatch.setattr(exporting, "SWAPPED", 0.001)
    with torch.no_grad(), pytest.raises(CheckpointError, match="lets other tokens leave"):
        export_model(model, DToP(0.6, **context), [random_image(80, 80)], tmp_path / "b", "torch")


def test_export_model__leaves_nothing_behind_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = exporting._open_torch

    def worse(path: Path) -> Any:
        run = opened(path)

        def off(image: Any, thresholds: Any) -> Any:
            labels, logits, stages = run(image, thresholds)
            return labels, logits + 1e-3, stages

        return off

    monkeypatch.setitem(exporting.WRITERS, "torch", (exporting._write_torch, worse))
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_model(tiny_segmenter(), Dense(), [random_image(21, 30)], tmp_path, "torch")
    assert list(tmp_path.iterdir()) == []

    def elsewhere(path: Path) -> Any:
        run = opened(path)
        return lambda image, thresholds: (*run(image, thresholds)[:2], np.zeros((1, 6, 8), int))

    monkeypatch.setitem(exporting.WRITERS, "torch", (exporting._write_torch, elsewhere))
    with pytest.raises(CheckpointError, match="lets other tokens leave"):
        export_model(tiny_segmenter(), Dense(), [random_image(21, 30)], tmp_path, "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (DToP(keep_per_class=0), "export with 1 or more"),
        (DToP(cap=(0.5, 0.5)), "without --cap"),
        (DToP(boundary_guard=True), "boundary_guard"),
        (DoViT(batch_mode="mean"), "batch_mode"),
        (Gated(DToP(cap=(0.5, 0.5)), (0,)), "export the method inside"),
        (GatedBySize(DToP(), ((1, (0,)),)), "export the method inside"),
        (Resized(DToP(), 0.7), "export the method inside, and give it images resized by 0.7"),
    ],
)
def test_export_model__refuses_what_a_graph_cannot_hold(method: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        export_model(tiny_segmenter(), method, [random_image(8, 8)], tmp_path)
    assert list(tmp_path.iterdir()) == []


EXAMPLE = ROOT / "examples" / "onnx_consumer.py"


def consumer() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("onnx_consumer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photos(folder: Path) -> dict[str, Path]:
    """One image, as files of every kind that is read in a way of its own."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (22, 31, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (22, 31), dtype=np.uint8)))
    few = rgb.quantize(20)
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "turned.jpg": (rgb, {"exif": exif, "quality": 95}),
        "sixteen.png": (Image.fromarray(rng.integers(0, 65536, (22, 31)).astype(np.uint16)), {}),
        "float.tif": (Image.fromarray(rng.random((22, 31), dtype=np.float32)), {}),
        "grey.png": (rgb.convert("L"), {}),
        "bilevel.png": (rgb.convert("1"), {}),
        "clear.png": (clear, {}),
        "palette.png": (few, {}),
        "clear-palette.png": (few, {"transparency": 3}),
        "clear-grey.png": (rgb.convert("LA"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in made}


PREPROCESSINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "shortest side": {"resize": 17},
    "larger": {"resize": 40, "std": (0.2, 0.3, 0.25)},
    "fixed size": {"resize": (20, 18)},
    "windows": {"window": (8, 12), "stride": (5, 9)},
    "windows that touch": {"window": 9},
    "windows evenly spread": {"window": (8, 9), "stride": "even"},
    "windows larger than the image": {"window": (64, 12), "stride": (64, 7)},
    "resized, in windows": {"resize": (26, 20), "window": 16, "stride": 10},
}


@torch.no_grad()
def balance(model: ExitSegmenter) -> None:
    """Make all classes of convolutional heads as likely, so that maps are not of one class."""
    records = model([random_image(24, 32)], with_records=True).exit_records
    for head, record in zip((*model.exit_heads, model.decode_head), records):
        assert record.logits is not None
        head.classifier.bias.sub_(record.logits.mean(0)).mul_(30.0)
        head.classifier.weight.mul_(30.0)


@pytest.mark.parametrize(
    ("head", "method"), [("atm", DToP(0.3, 2)), ("setr_pup", DoViT(0.222))], ids=["scores", "upscaled logits"]
)
def test_consumer_example__gives_the_masks_of_predict_for_every_preprocessing(
    head: str, method: Any, tmp_path: Path
) -> None:
    """Pixel for pixel: all steps leave no room but rounding, which decides between classes with one logit alone."""
    onnxruntime = needs_onnx()
    example, files = consumer(), photos(tmp_path)
    model = tiny_segmenter(head)
    if head == "setr_pup":
        balance(model)
    made = export_model(model, method, [random_image(21, 30), random_image(16, 12)], tmp_path)
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    seen: set[bytes] = set()
    left: set[int] = set()
    for options in PREPROCESSINGS.values():
        model.preprocessing = replace(Preprocessing(), **options)
        about = json.loads(json.dumps(exporting.metadata(model, method)))
        for name, path in files.items():
            image = example.read(path)
            assert image.tobytes() == load_image(path).tobytes(), name
            thresholds = np.array(about["thresholds"], np.float32)
            labels, exits = example.segment(session, about, image, thresholds)
            expected = model.predict(path, method)
            assert labels.shape == expected.labels[0].shape
            for y, x in np.argwhere(labels != expected.labels[0].numpy()):
                own, other = expected.logits[0][[int(expected.labels[0][y, x]), int(labels[y, x])], y, x].tolist()
                assert own == pytest.approx(other, abs=1e-6), (options, name)
            single = getattr(expected, "windows", expected)
            assert np.array_equal(exits, torch.cat([stages.flatten() for stages in single.exit_index]).numpy())
            seen.add(labels.tobytes())
            left |= set(exits.tolist())
    assert len(left) > 1, "some leave and some stay"
    assert len(seen) > 2 * len(files), "preprocessing decides what is seen"


MASKS: dict[str, tuple[Any, Any]] = {
    "DToP, frozen": (DToP(0.5, keep_per_class=1), {"exits": (1, 4)}),
    "DToP, masks": (DToP(0.5, keep_per_class=1, finish="masks"), {"exits": (1, 4), "rope": "half"}),
    "DoViT": (DoViT(0.5), {"exits": (1, 3)}),
}


@pytest.mark.parametrize(
    ("case", "format"),
    [("DToP, frozen", "onnx"), ("DoViT", "onnx"), ("DToP, frozen", "torch"), ("DToP, masks", "torch")],
)
def test_export_model__of_masks_answers_scores_of_pixels(case: str, format: Any, tmp_path: Path) -> None:
    """Sizes with and without padding; nobody, some and everybody leaving: exits and scores of all are compared."""
    if format == "onnx":
        needs_onnx()
    method, options = MASKS[case]
    made = export_model(eomt(**options), method, [random_image(24, 32), random_image(21, 30)], tmp_path, format)
    assert made.runs == 6
    assert made.error < 1e-5
    assert made.same_pixels == 1.0


def test_consumer_example__gives_the_labels_of_masks(tmp_path: Path) -> None:
    onnxruntime = needs_onnx()
    example, model, method = consumer(), eomt(exits=(1, 4)), DToP(0.5, keep_per_class=1)
    made = export_model(model, method, [random_image(24, 32)], tmp_path)
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    pixels = (torch.rand(30, 43, 3, generator=torch.Generator().manual_seed(2)) * 255).byte().numpy()
    photo, left = Image.fromarray(pixels), set()
    windows: list[dict[str, Any]] = [{}, {"resize": 26, "window": 24, "stride": "even"}]
    for options in windows:
        model.preprocessing = replace(Preprocessing(), **options)
        about = json.loads(json.dumps(exporting.metadata(model, method)))
        assert "may exceed 1" in about["grid_logits"]
        labels, exits = example.segment(session, about, photo, np.array(about["thresholds"], np.float32))
        expected = model.predict(photo, method)
        assert np.array_equal(labels, expected.labels[0].numpy())
        assert np.array_equal(exits, torch.cat([one.flatten() for one in expected.windows.exit_index]).numpy())
        left |= set(exits.tolist())
    assert len(left) > 1, "some leave and some stay"


def test_compared_images__are_as_large_as_a_window_at_most() -> None:
    model = tiny_segmenter()
    assert [tuple(image.shape[1:]) for image in compared_images(model)] == [(128, 192), (160, 120), (96, 96)]
    model.preprocessing = Preprocessing(window=(100, 150))
    assert [tuple(image.shape[1:]) for image in compared_images(model)] == [(100, 150), (100, 120), (96, 96)]


def test_export_model__takes_models_with_windows_and_says_so(tmp_path: Path) -> None:
    model = tiny_segmenter()
    model.preprocessing = replace(Preprocessing(), window=(8, 12), stride=(8, 8), resize=20)
    export_model(model, Dense(), [random_image(8, 12)], tmp_path, "torch")
    facts = {"tokenexit.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=facts)
    about = json.loads(facts["tokenexit.json"])
    assert about["preprocessing"] == model.preprocessing.to_dict()
    assert about["patch_size"] == 4
    assert about["upscale"] == 1
    assert about["input"].keys() >= {"colour", "orientation", "transparency", "resize", "normalisation", "windows"}
    assert about["output"].keys() == {"labels", "maps", "exit_stage"}


@pytest.mark.parametrize("windows", [{}, {"window": (8, 12), "stride": (5, 9)}], ids=["whole", "windows"])
def test_consumer_example__segments_as_the_model_does(
    windows: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_onnx()
    tiny = tiny_segmenter()
    tiny.preprocessing = replace(Preprocessing(resize=26), **windows)
    tiny.save_pretrained(tmp_path / "model")
    photo = photos(tmp_path)["turned.jpg"]
    options = ("--method", "dtop", "--threshold", 0.26, "--images", photo, "--out", tmp_path / "onnx")
    assert "exits were the same" in fine(capsys, "export", tmp_path / "model", *options)
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "onnx" / "model.onnx"), str(photo)]
    said = subprocess.run([*command, str(tmp_path / "mask.png")], capture_output=True, text=True, check=True).stdout
    fine(capsys, "predict", tmp_path / "model", photo, "--out", tmp_path / "out", *options[:4], "--no-gate")
    mask, expected = (Image.open(path) for path in (tmp_path / "mask.png", tmp_path / "out" / "turned.png"))
    assert mask.size == expected.size == (22, 31)
    assert mask.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    output = ExitSegmenter.from_pretrained(tmp_path / "model").predict(photo, DToP(0.26))
    exits = torch.cat([stages.flatten() for stages in getattr(output, "windows", output).exit_index])
    shares = [float(share) / 100 for share in re.findall(r"(\d+)% of the tokens", said)]
    assert shares == pytest.approx([(exits == n).float().mean().item() for n in range(3)], abs=0.006)
    moved = [*command, str(tmp_path / "moved.png"), "1/1"]
    assert (
        "100% of the tokens left after block the last"
        in subprocess.run(moved, capture_output=True, text=True, check=True).stdout
    )


def test_consumer_example__needs_three_packages_and_is_short() -> None:
    text = EXAMPLE.read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported == {"json", "sys", "typing", "numpy", "onnxruntime", "PIL"}
    assert len(text.splitlines()) <= 130


def test_export__refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_segmenter().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert "is a file" in wrong(capsys, "export", tmp_path / "model", "--out", tmp_path / "file")
    nobody = ("--method", "dtop", "--keep-per-class", 0)
    assert "export with 1 or more" in wrong(capsys, "export", tmp_path / "model", "--out", tmp_path / "o", *nobody)
    padded = ("--out", tmp_path / "o", "--pad-rows")
    assert "--pad-rows must be at least 0, got -1" in wrong(capsys, "export", tmp_path / "model", *padded, -1)
    staged = ("--format", "stages", *padded, 8)
    assert "stages have buckets: leave it out" in wrong(capsys, "export", tmp_path / "model", *staged)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_export_model__takes_a_decode_head_of_the_users_own(format: Any, tmp_path: Path) -> None:
    if format == "onnx":
        needs_onnx()
    images = [random_image(21, 30), random_image(8, 13)]
    made = export_model(own_segmenter("Up"), DoViT(0.26), images, tmp_path, format)
    assert made.runs == 6
    assert made.error < 1e-4


def test_export_model__a_head_that_cannot_be_traced_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"decode head Remembering cannot be exported .*: write it without branches"
    ) as e:
        export_model(own_segmenter("Remembering"), Dense(), [random_image(21, 30)], tmp_path, "torch")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
