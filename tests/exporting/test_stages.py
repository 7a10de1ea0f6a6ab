"""Stages of fixed shapes say what the model says, whatever lies in their padding, in the library's loop and in the
example's."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.stages import example
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.cli.test_cli import fine, wrong
from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting import staged
from tokenexit.exporting.buckets import Buckets
from tokenexit.exporting.staged import Host, export_stages, file_name, manifest, runner_of
from tokenexit.exporting.stages import Stage, staged_method, stages
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, Gated, Method, Reduced, Resized
from tokenexit.reducers import ToMe
from tokenexit.segmenter import ExitSegmenter

SIZES = [(21, 30), (16, 40)]
BY_CLASS = ((0.5, 0.6, 0.7, 0.8, 0.9), 0.7)
ROPE: dict[str, Any] = {"rope": "half", "pos_embed": False, "num_registers": 2}
CASES: dict[str, tuple[str, Method[Any], dict[str, Any]]] = {
    "dtop": ("fcn", DToP(0.6, 2), {}),
    "dtop by class": ("linear", DToP(BY_CLASS, 1, score="margin", temperature=1.5), {"class_token": False}),
    "dtop atm": ("atm", DToP(0.3, 2), {}),
    "dtop atm frozen": ("atm", DToP(0.3, 1, finish="frozen"), {}),
    "dtop atm that stops": ("atm", DToP(0.3, 2, stop=2), {}),
    "dtop that stops at once": ("fcn", DToP(0.5, 2, stop=1), {}),
    "dtop mask transformer": ("mask_transformer", DToP(0.4, 1), ROPE),
    "dtop in windows": ("fcn", DToP(0.5, 0, keep_in_window=3), {}),
    "dtop in windows and of classes": ("fcn", DToP(0.4, 1, keep_in_window=2), {"class_token": False}),
    "dtop setr naive": ("setr_naive", DToP(0.6, 3), {"exits": (2, 3)}),
    "dovit": ("fcn", DoViT(0.6), {}),
    "dovit by class": ("fcn", DoViT(BY_CLASS, score="entropy"), {}),
    "dovit growth": ("linear", DoViT(0.7, min_improvement=0.0), ROPE),
    "dovit live": ("fcn", DoViT(0.6, scoring="live", min_improvement=-0.2), {}),
    "dovit without prefix": ("fcn", DoViT(0.6, blend_weight=0.0), {"class_token": False}),
    "dovit setr pup": ("setr_pup", DoViT(0.25), {}),
}


class Traced:
    """A stage in torch, as a session: it takes the manifest's shapes alone, and finds garbage in its padding."""

    def __init__(self, stage: Stage, garbage: float) -> None:
        self.stage, self.garbage = stage, garbage

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        assert names == list(self.stage.outputs)
        assert {name: each.shape for name, each in feeds.items()} == {
            name: tuple(each.shape) for name, each in self.stage.inputs.items()
        }
        if "live" in feeds:
            (live,) = feeds["live"]
            feeds["tokens"][live:] = self.garbage
            if "place" in feeds:
                feeds["place"][live:] = 10**6
        with torch.no_grad():
            found = self.stage.module(*(torch.from_numpy(feeds[name]) for name in self.stage.inputs))
        return [each.numpy() for each in ((found,) if isinstance(found, torch.Tensor) else found)]


def host_of(
    model: ExitSegmenter, method: Any, size: tuple[int, int], buckets: Sequence[Sequence[int]], garbage: float = np.nan
) -> Host:
    method = staged_method(model, method)
    made = list(stages(model, method, size, buckets))
    about = json.loads(
        json.dumps(manifest(model, method, size, Buckets(tuple(map(tuple, buckets)), 0.0, "test"), made))
    )
    return Host(about, {file_name(stage): Traced(stage, garbage) for stage in made})


def tables(method: Any, exits: int = 2) -> list[np.ndarray[Any, Any]]:
    """Thresholds: nobody leaves, everybody leaves at the first exit, random ones, and one number for all."""
    rng = np.random.default_rng(1)
    shape = (exits, 5) if isinstance(method.threshold, tuple) else (exits,)
    random = [rng.uniform(*span, shape).astype(np.float32) for span in ((0.5, 0.9), (0.3, 0.5))]
    own = 0.6 if isinstance(method.threshold, tuple) else method.threshold
    return [np.ones(shape, np.float32), np.zeros(shape, np.float32), *random, np.full(shape, own, np.float32)]


def with_table(method: Any, table: np.ndarray[Any, Any]) -> Any:
    return method.with_thresholds(tuple(tuple(row) if isinstance(row, list) else row for row in table.tolist()))


def assert_as_model(model: ExitSegmenter, method: Any, host: Host, image: torch.Tensor, table: Any) -> list[int]:
    """Both loops answer as the model; returns live tokens behind each exit."""
    with torch.no_grad():
        ours = model([image], with_table(method, table))
    labels, logits, left = runner_of(host)(image[None].numpy(), table)
    assert np.array_equal(left[0], ours.exit_index[0].numpy())
    assert_close(torch.from_numpy(logits[0]), ours.grid_logits[0], 1e-4)
    assert np.array_equal(labels[0], torch.as_tensor(ours.labels[0]).numpy())
    module = example()
    theirs = module.segment(module.Stages(host.about, host.sessions), image[None].numpy(), table)
    assert np.array_equal(theirs[1], left[0])
    assert np.array_equal(theirs[0], labels[0])
    return list(ours.ledger.live_after(model.config.exits))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_stages__answer_as_the_model_at_any_threshold_and_bucket_edge(case: str, size: tuple[int, int]) -> None:
    head, method, options = CASES[case]
    model, image = tiny_segmenter(head, **options), random_image(*size, seed=3)
    cells = int(np.prod(model.backbone.patch_embed.grid(*size)))
    exits, seen = len(model.config.exits), set()
    goes_on = exits if method.last_exit is None else method.last_exit
    for table in tables(method):
        with torch.no_grad():
            live = model([image], with_table(method, table)).ledger.live_after(model.config.exits)[:goes_on]
        for more in (-1, 0, 1):  # one token too many for the smaller bucket, as many, one less
            edges = [sorted({min(cells, max(1, count + more)), cells}) for count in live]
            assert_as_model(model, method, host_of(model, method, size, edges), image, table)
        seen |= set(live)
    assert len(seen) > 2 or goes_on == 0, "some leave and some stay"


@pytest.mark.parametrize("case", ["dtop", "dtop atm", "dtop mask transformer", "dovit", "dovit growth", "dovit live"])
def test_stages__do_not_see_what_lies_in_padding(case: str) -> None:
    head, method, options = CASES[case]
    model, image = tiny_segmenter(head, **options), random_image(21, 30)[None].numpy()
    buckets = [(7, 29, 48), (11, 41, 48)]
    table = tables(method)[2]
    clean, *others = (
        runner_of(host_of(model, method, (21, 30), buckets, garbage))(image, table)
        for garbage in (0.0, np.nan, np.inf, -1e30)
    )
    for answers in others:
        for ours, theirs in zip(clean, answers):
            assert np.array_equal(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(
    tau=st.tuples(st.floats(0.25, 1.0, width=32), st.floats(0.25, 1.0, width=32)),
    small=st.lists(st.integers(1, 47), max_size=3),
    seed=st.integers(0, 99),
    which=st.sampled_from(["dtop", "dovit"]),
)
def test_stages__answer_as_the_model_in_any_buckets(
    tau: tuple[float, float], small: list[int], seed: int, which: str
) -> None:
    head, method, options = CASES[which]
    model, image = tiny_segmenter(head, **options), random_image(24, 32, seed)
    table = np.array(tau, np.float32)
    with torch.no_grad():  # scores this close to a threshold may fall either way
        near = [model([image], with_table(method, np.clip(table + by, 0, 1))) for by in (-1e-5, 1e-5)]
    if torch.equal(near[0].exit_index[0], near[1].exit_index[0]):
        held = tuple(sorted({*small, 48}))
        assert_as_model(model, method, host_of(model, method, (24, 32), (held, held)), image, table)


# ----------------------------------------------------------------------------------------------------------- ONNX files


def written(name: str, out: Path, bucket: int) -> tuple[ExitSegmenter, Any, Path, Any]:
    """Stages of a model with one exit, with this bucket behind it, the model and its method."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX needs the export extra")
    model = tiny_segmenter("atm" if name == "dtop" else "fcn", exits=(1,), depth=2, rope="half")
    methods: dict[str, Method[Any]] = {
        "dtop": DToP(0.3, 2),
        "dtop in windows": DToP(0.6, 0, keep_in_window=2),
        "dovit": DoViT(0.6),
    }
    method = methods[name]
    made = export_stages(model, method, [random_image(16, 20)], out, buckets=[[bucket]])
    return model, method, out / "stages", made


@pytest.fixture(scope="module", params=["dtop", "dovit"])
def exported(request: Any, tmp_path_factory: Any) -> tuple[ExitSegmenter, Any, Path, Any]:
    return written(request.param, tmp_path_factory.mktemp("stages"), 5)


def test_export_stages__writes_onnx_of_fixed_shapes_that_the_manifest_names(exported: Any) -> None:
    import onnx

    _, _, folder, made = exported
    about = json.loads((folder / "manifest.json").read_text())
    named = [file for stage in about["stages"] for file in stage["files"]]
    assert sorted(file["file"] for file in named) == sorted(path.name for path in folder.glob("*.onnx"))
    assert {path.name for path in folder.iterdir()} - {file["file"] for file in named} == {
        "manifest.json",
        "weights.bin",
    }
    assert (made.files, made.compared.runs, made.buckets.tokens) == (len(named), 3, ((5, 20),))
    for file in named:
        onnx.checker.check_model(folder / file["file"], full_check=True)
        graph = onnx.load(folder / file["file"]).graph
        for values, said in ((graph.input, file["inputs"]), (graph.output, file["outputs"])):
            found = {
                value.name: {
                    "shape": [side.dim_value for side in value.type.tensor_type.shape.dim],
                    "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                }
                for value in values
            }
            assert found == said
            assert all(side > 0 for each in found.values() for side in each["shape"])


def test_export_stages__keeps_weights_once_for_all_buckets(exported: Any) -> None:
    import onnx

    model, _, folder, _ = exported
    about = json.loads((folder / "manifest.json").read_text())
    (span2,) = (stage["files"] for stage in about["stages"] if stage["name"] == "span2")
    places = []
    for file in span2:
        graph = onnx.load(folder / file["file"], load_external_data=False).graph
        large = [tensor for tensor in graph.initializer if tensor.external_data]
        assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in large)
        places.append({(entry.value) for tensor in large for entry in tensor.external_data if entry.key == "offset"})
    assert places[0] == places[1] != set()
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    pages = 4096 * len(list(model.parameters()))
    assert (folder / "weights.bin").stat().st_size < size + pages


def test_export_stages__answers_as_the_model_in_onnxruntime_with_garbage_in_padding(exported: Any) -> None:
    import onnxruntime

    model, method, folder, made = exported
    assert made.compared.same_pixels == 1.0
    module = example()
    for seed, table in enumerate(tables(method, 1)):
        image = random_image(16, 20, seed)
        with torch.no_grad():
            ours = model([image], with_table(method, table))
        labels, left = module.segment(module.load(folder), image[None].numpy(), table)
        assert np.array_equal(left, ours.exit_index[0].numpy())
        assert np.array_equal(labels, torch.as_tensor(ours.labels[0]).numpy())
    session = onnxruntime.InferenceSession(folder / "span2-20.onnx")
    rows = np.random.default_rng(0).normal(size=(21, 32)).astype(np.float32)
    place, outputs = np.arange(21, dtype=np.int32), []
    for garbage in (0.0, np.nan, -np.inf):
        rows[9:], place[9:] = garbage, 10**6 if garbage else 0
        feeds = {"tokens": rows, "live": np.array([9], np.int32), "place": place}
        outputs.append(session.run(None, feeds)[0][:9])
    assert np.array_equal(outputs[0], outputs[1])
    assert np.array_equal(outputs[0], outputs[2])


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: Any) -> Path:
    """The loop in C++, compiled."""
    openvino = pytest.importorskip("openvino", reason="the loop in C++ needs the openvino extra")
    if shutil.which("g++") is None or not Path("/usr/include/nlohmann/json.hpp").exists():
        pytest.skip("the loop in C++ needs g++ and nlohmann-json3-dev")
    source = Path(__file__).parents[2] / "examples" / "stages_host.cpp"
    program, home = tmp_path_factory.mktemp("program") / "stages_host", Path(openvino.__file__).parent
    libraries = [str(path) for path in (home / "libs").glob("libopenvino.so.*")]
    flags = ["-std=c++20", "-O1", f"-I{home / 'include'}", *libraries, f"-Wl,-rpath,{home / 'libs'}"]
    subprocess.run(["g++", str(source), "-o", str(program), *flags], check=True)
    return program


@pytest.mark.parametrize("name", ["dtop", "dtop in windows", "dovit"])
def test_stages_in_cpp__answer_as_the_loop_in_python(name: str, in_cpp: Path, tmp_path: Path) -> None:
    model, method, folder, _ = written(name, tmp_path, 9)  # OpenVINO 2026.4 dies of buckets below 8
    module, seen = example(), set()
    image, labels = tmp_path / "image.raw", tmp_path / "labels.raw"
    for seed, table in enumerate(tables(method, 1)):
        pixels = random_image(16, 20, seed)[None].numpy()
        pixels.tofile(image)
        ours, left = module.segment(module.load(folder), pixels, table)
        asked = [] if table.tolist() == pytest.approx([method.threshold]) else [repr(float(table[0]))]
        command = [str(in_cpp), str(folder), str(image), str(labels), *asked]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert np.array_equal(np.fromfile(labels, np.int32).reshape(16, 20), ours)
        counts = [int((left == n).sum()) for n in range(2)]
        assert f"and those that stayed: {counts[0]} {counts[1]}\n" in said
        assert said.rstrip().endswith("classes: " + " ".join(model.classes.names[k] for k in np.unique(ours)))
        seen.add(counts[0])
    assert len(seen) > 2, "nobody, everybody and some leave"


def test_stages_in_cpp__say_in_a_line_what_is_wrong(in_cpp: Path, tmp_path: Path) -> None:
    short, folder = tmp_path / "image.raw", written("dovit", tmp_path, 9)[2]
    short.write_bytes(b"1234")
    cases = [
        ([], 2, "usage: stages_host STAGES IMAGE LABELS"),
        ([str(tmp_path), str(short), "out"], 1, "no manifest.json in"),
        ([str(folder), str(short), "out"], 1, "must hold 960 float32"),
        ([str(folder), str(short), "out", "0.5", "0.5"], 1, "there must be 1 thresholds"),
    ]
    for arguments, code, words in cases:
        found = subprocess.run([str(in_cpp), *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert (found.returncode, found.stderr.count("\n")) == (code, 1)
        assert words in found.stderr


def test_export_stages__manifest_says_what_a_loop_must_know(exported: Any) -> None:
    model, method, folder, _ = exported
    about = json.loads((folder / "manifest.json").read_text())
    assert (about["format"], about["version"]) == ("tokenexit stages", 2)
    assert about["method"]["name"] == method.name
    assert about["thresholds"] == pytest.approx([method.threshold])
    assert about["image_size"] == about["preprocessing"]["resize"] == [16, 20]
    assert (about["grid"], about["patch_size"], about["prefix_tokens"]) == ([4, 5], 4, 1)
    assert about["exits_after_blocks"] == [1]
    assert about["classes"] == list(model.classes.names)
    assert about["buckets"] == [[5, 20]]
    wanted: dict[str, Any] = {"keep_per_class": 2, "keep_in_window": 0, "stop": None}
    if method.name == "dovit":
        wanted = {"scores": "all", "min_improvement": None, "blend_trigger": 0.1, "blend_weight": 0.5}
    assert about["rule"] == wanted


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Dense(), "stages are for exits of dtop and dovit, got 'dense'"),
        (PAUMER(0.1), "got 'paumer'"),
        (DToP(keep_per_class=0), "export with 1 or more"),
        (DToP(cap=(0.5, 0.5)), "without --cap"),
        (DoViT(boundary_guard=True), "boundary_guard"),
        (DoViT(batch_mode="mean"), "batch_mode"),
        (DoViT(rejoin=1), "leave rejoin out"),
        (DToP(context_weight=0.5), "leave context_weight at 0"),
        (DToP(frozen_context=2), "leave frozen_context at 0"),
        (Gated(DToP(), (0,)), "export the method inside"),
        (Resized(DToP(), 0.7), "export the method inside"),
        (Reduced(DToP(), ToMe()), "export the method inside"),
    ],
)
def test_export_stages__refuses_methods_that_stages_cannot_hold(method: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        export_stages(tiny_segmenter(), method, [random_image(8, 8)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_stages__refuses_several_sizes_windows_and_masks(tmp_path: Path) -> None:
    images = [random_image(8, 8), random_image(8, 12)]
    with pytest.raises(ConfigError, match="of one size, got 8x8 and 8x12: give --image-size"):
        export_stages(tiny_segmenter(), DToP(), images, tmp_path)
    with pytest.raises(ConfigError, match="no image to compare"):
        export_stages(tiny_segmenter(), DToP(), [], tmp_path)
    model = tiny_segmenter()
    model.preprocessing = Preprocessing(window=(8, 8), stride=(8, 8))
    with pytest.raises(ConfigError, match="takes windows"):
        export_stages(model, DToP(), images[:1], tmp_path)
    with pytest.raises(ConfigError, match="queries pass through blocks"):
        export_stages(tiny_segmenter("fcn", "eomt"), DoViT(), images[:1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_stages__leaves_nothing_behind_that_differs_and_no_folder_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_segmenter("linear", exits=(1,), depth=2)

    def worse(folder: Path) -> Any:
        assert (folder / "manifest.json").exists()
        run = runner_of(host_of(model, DToP(0.6), (8, 8), [(4,)]))
        return lambda image, table: (run(image, table)[0], run(image, table)[1] + 1e-3, run(image, table)[2])

    def writes(folder: Path, *_: object) -> None:
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(staged, "_write", writes)
    monkeypatch.setattr(staged, "open_stages", worse)
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_stages(model, DToP(0.6), [random_image(8, 8)], tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is no folder with manifest\.json"):
        export_stages(model, DToP(0.6), [random_image(8, 8)], tmp_path)
    assert (tmp_path / "stages" / "thesis.txt").read_text() == "mine"


def test_example__refuses_a_manifest_of_another_version(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")
    (tmp_path / "manifest.json").write_text('{"format": "tokenexit stages", "version": 1}')
    with pytest.raises(SystemExit, match="reads tokenexit stages 2"):
        example().load(tmp_path)


# ---------------------------------------------------------------------------------------------------- the command


def test_command__writes_stages_that_the_example_runs_and_says_what_padding_costs(tmp_path: Path, capsys: Any) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX needs the export extra")
    model = tiny_segmenter("linear", exits=(1,), depth=2)
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (20, 31)), ("b.png", (17, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    asked = ["--format", "stages", "--method", "dtop", "--threshold", "0.6", "--images", tmp_path / "photos"]
    asked += ["--out", tmp_path / "x", "--bucket-count", 2]
    refused = wrong(capsys, "export", tmp_path / "model", *asked)
    assert (
        refused == "stages are for images of one size, got 17x20 and 20x31: give --image-size, or images of one size."
    )
    said = fine(capsys, "export", tmp_path / "model", *asked, "--image-size", 16, 24)
    folder = tmp_path / "x" / "stages"
    about = json.loads((folder / "manifest.json").read_text())
    assert f"{folder}: 8 files, " in said
    assert f"buckets behind exit 1: {about['buckets'][0][0]}, 24 patch tokens\n" in said
    assert f"padding adds {about['padding_waste']:.1%} to the multiply-adds (live tokens of 2 images)" in said
    assert "in 6 runs beside the model exits were the same, logits within " in said
    photo, mask = tmp_path / "photos" / "a.png", tmp_path / "mask.png"
    example().main(str(folder), str(photo), str(mask))
    ours = replace(model.preprocessing, resize=(16, 24)).to_tensor(Image.open(photo))
    with torch.no_grad():
        expected = model([ours], DToP(0.6))
    assert np.array_equal(np.asarray(Image.open(mask)), torch.as_tensor(expected.labels[0]).numpy())
    assert (
        f"{(expected.exit_index[0] == 0).float().mean():.0%} of the tokens left after block 1"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--buckets", "5"], "--buckets is for --format stages"),
        (["--image-size", "5"], "--image-size is for --format stages"),
        (["--format", "stages", "--buckets", "5,x"], "--buckets 5,x must be numbers of patch tokens"),
        (["--format", "stages", "--buckets", "5", "--bucket-count", "2"], "leave one out"),
        (["--format", "stages", "--bucket-count", "0"], "--bucket-count 0 must be at least 1"),
        (["--format", "stages", "--image-size", "1", "2", "3"], "--image-size has 3 numbers"),
        (["--format", "stages", "--quantize", "int8"], "--quantize is for --format onnx, got stages"),
    ],
)
def test_command__refuses_options_that_do_not_go_together(options: list[str], words: str, capsys: Any) -> None:
    assert words in wrong(capsys, "export", "no-model", "--out", "x", *options)
