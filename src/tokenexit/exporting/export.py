"""A model and a method are written as one file for another runtime, and compared with the model first."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.errors import CheckpointError, ConfigError, TokenExitError
from tokenexit.exporting.graph import OUTPUTS, ExitGraph, check_exportable, threshold_table
from tokenexit.heads import ModuleHead
from tokenexit.heads.module import in_short, named
from tokenexit.methods import DToP, Method, MethodLike, as_method, spec_of
from tokenexit.methods.reference import prescribed_like
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.runtime.atomic import atomic_write
from tokenexit.segmenter import ExitSegmenter
from tokenexit.version import __version__

Format = Literal["onnx", "torch", "compiled"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2", "compiled": "model.compiled.pt2"}
OPSET = 20
TOLERANCE, ROUNDING = 1e-5, 8.0
"""Logits may be so far from those in fp64, times the larger of 1 and the largest logit, or so many times as far as the
model's own in fp32: after twelve blocks rounding alone is 1e-5, and runtimes have kernels of their own."""
NUDGES = (0.0, 3e-4, -3e-4, 7e-4)
"""Where a score lies within rounding of a threshold, runtimes may decide differently: then another is tried."""
SWAPPED = 0.02
"""Share of tokens of an image that may leave at another exit than in the model, where scores are equal to rounding."""
INPUT_STEPS = {
    "image": "(1, 3, H, W) float32 of one window, or of the whole image where preprocessing.window is null",
    "colour": "RGB of 8 bits; 16-bit grey is (value + 128) // 257, float grey in [0, 1] is int(255 value + 0.5)",
    "orientation": "upright: the EXIF orientation is applied",
    "transparency": "composited on black",
    "resize": "Pillow's BILINEAR, which antialiases where it shrinks; preprocessing.resize is none, [height, width], "
    "or the shortest side, with the other int(side * factor + 0.5)",
    "normalisation": "(pixels / 255 - mean) / std",
    "windows": "of the resized image, from multiples of the stride; one that would cross the border is moved back "
    "inside, and an image smaller than the window is taken whole along that axis; with the stride even, count = "
    "ceil(side / window) of them along each axis, from floor(n (side - window) / (count - 1))",
}
"""How `Preprocessing` and `windows` make the graph's input, in words; the numbers are in the metadata's
`preprocessing`."""
OUTPUT_STEPS = {
    "labels": "class of every pixel of the graph's input: of the image itself only where nothing is resized or cut",
    "maps": "of grid_logits: upscale times as large, then to patch_size pixels a token (the grid of exit_stage), both "
    "bilinear without aligned corners, cut to the window's size; windows are added up and divided by how many see a "
    "pixel; then bilinear to the image's own size, and the largest class",
    "exit_stage": "the exit at which each token left; the number of exits for those that stayed",
}
"""The steps from the graph's outputs to a map of the image's size; `patch_size` and `upscale` are beside it."""

Answers = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
Runner = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], Answers]


@dataclass(frozen=True)
class Exported:
    """An exported file, and how it compares with the model.

    Attributes:
        path: the file.
        runs: number of comparisons.
        error: largest difference of its logits from those in fp64, over the larger of 1 and the largest logit.
        own_error: the same of the model's logits in fp32, in that run.
        same_pixels: least share of pixels with the model's class.
        elsewhere: largest share of an image's tokens that leave at another exit than in the model.
    """

    path: Path
    runs: int
    error: float
    own_error: float
    same_pixels: float
    elsewhere: float = 0.0


def export_model(
    model: ExitSegmenter,
    method: MethodLike,
    images: Sequence[Tensor],
    out: Path,
    format: Format = "onnx",
    pad_rows: int | None = None,
) -> Exported:
    """Trace `model` with `method`, compare the file with it on `images`, and write it to the folder `out`.

    The file is compared at the method's thresholds, at 1 (no token leaves) and at 0 (every token leaves that may).

    Args:
        model: the segmenter.
        method: a method, its name or its specification.
        images: `(3, H, W)` fp32 each, as `Preprocessing` makes them; sizes should differ, as the graph takes any.
        out: the folder.
        format: "onnx"; "torch", a program of torch.export; or "compiled", that program as machine code for this kind of
            processor (AOTInductor), which takes a C++ compiler to make and torch alone, from Python or C++, to run.
        pad_rows: pad live tokens to a multiple of so many behind each exit, for a runtime that generates code for each
            number of rows (OpenVINO): without it a new image may take longer with exits than without any.

    Returns:
        The file, and how it compares with the model.

    Raises:
        ConfigError: for a method or a decode head of your own that cannot be exported, for missing packages, and
            without images.
        CheckpointError: if the file's results differ from the model's; nothing is written.
    """
    if not images:
        raise ConfigError("there is no image to compare the file with the model on: give one.")
    if pad_rows is not None and pad_rows < 1:
        raise ConfigError(f"pad_rows must be at least 1, got {pad_rows}: 32 is a good number for OpenVINO.")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    method = as_method(method)
    check_exportable(model, method)
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILES[format]
    with explained(model):
        program = trace(model, method, pad_rows)
    about = metadata(model, method) | ({} if pad_rows is None else {"rows_padded_to_multiples_of": pad_rows})
    with explained(model), atomic_write(path) as unfinished:
        write, open_file = WRITERS[format]
        write(program, about, unfinished)
        runs = compare(model, method, images, open_file(unfinished))
    return summarised(path, runs)


def trace(model: ExitSegmenter, method: Method[Any], pad_rows: int | None = None) -> torch.export.ExportedProgram:
    """Trace the graph, with height, width and token counts left open."""
    patch = model.config.backbone.patch_size
    image = torch.zeros(1, 3, 5 * patch + 1, 7 * patch + 2)  # no multiple of the patch, no square, not the table's grid
    dynamic = {"image": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}, "thresholds": None}
    # Sizes of 0 and 1 are not special: the graph must not depend on the example's sizes.
    with torch.no_grad(), quiet(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        example = (image, threshold_table(model, method))
        return torch.export.export(ExitGraph(model, method, pad_rows), example, dynamic_shapes=dynamic, strict=False)


def metadata(model: ExitSegmenter, method: Method[Any]) -> dict[str, Any]:
    """Return what a program that runs the file must know to reproduce `ExitSegmenter.predict`."""
    labels = model.classes
    kinds = sorted({head.kind for head in (*model.view().exit_heads, model.decode_head)})
    return {
        "tokenexit": __version__,
        "method": spec_of(method),
        "thresholds": np.round(threshold_table(model, method).double().numpy(), 7).tolist(),
        "score": spec_of(method, whole=True).get("score", "probability"),
        "heads": kinds,
        "grid_logits": _kind_of_maps(kinds),
        "classes": list(labels.names),
        "palette": [list(colour) for colour in labels.palette],
        "preprocessing": model.preprocessing.to_dict(),
        "input": INPUT_STEPS,
        "output": OUTPUT_STEPS,
        "patch_size": model.config.backbone.patch_size,
        "upscale": model.decode_head.upscale,
        "exits_after_blocks": list(model.config.exits),
        "calibrated": model.calibration is not None,
    }


def _kind_of_maps(kinds: Sequence[str]) -> str:
    """Say what the maps of a graph are, whose heads are of these kinds."""
    if "masks" in kinds:
        return "scores at patch_size pixels a token, of each class the sum over masks, which may exceed 1"
    return "class logits before a softmax" if list(kinds) == ["softmax"] else "scores in [0, 1]"


def write_onnx(
    program: torch.export.ExportedProgram, about: dict[str, Any], path: Path, outputs: Sequence[str] = OUTPUTS
) -> None:
    """Write a program with these names of outputs as an ONNX file. Raises `ConfigError` for missing packages."""
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"export to ONNX needs the package {error.name}: pip install 'tokenexit[export]'.") from None
    from tokenexit.exporting.annotations import annotate
    from tokenexit.exporting.translations import TRANSLATIONS

    with quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            output_names=list(outputs),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        assert made is not None
        made.model.metadata_props["tokenexit"] = json.dumps(about)
        made.save(path)
        annotate(path)


def _write_torch(program: torch.export.ExportedProgram, about: dict[str, Any], path: Path) -> None:
    with quiet():
        torch.export.save(program, path, extra_files={"tokenexit.json": json.dumps(about)})


def open_onnx(path: Path) -> Runner:
    """Return a function that runs an ONNX file in onnxruntime. Raises `ConfigError` where that is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError(f"export to ONNX needs the package {error.name}: pip install 'tokenexit[export]'.") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]) -> Answers:
        labels, logits, exit_index = session.run(list(OUTPUTS), {"image": image, "thresholds": thresholds})
        return labels, logits, exit_index

    return run


def _open_torch(path: Path) -> Runner:
    with quiet():
        return _runner(torch.export.load(path).module(check_guards=False))


def _write_compiled(program: torch.export.ExportedProgram, about: dict[str, Any], path: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    settings = {"aot_inductor.metadata": {"tokenexit": json.dumps(about)}}
    try:
        with quiet():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except InvalidCxxCompiler:
        raise ConfigError("--format compiled needs a C++ compiler: install g++, or name yours in CXX.") from None


def open_compiled(path: Path) -> Runner:
    """Return a function that runs a compiled package."""
    from torch._inductor import aoti_load_package

    with quiet():
        return _runner(aoti_load_package(str(path)))


def _runner(graph: Callable[..., Any]) -> Runner:
    """Return a program of torch as a function of arrays."""

    @torch.no_grad()
    def run(image: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]) -> Answers:
        labels, logits, exit_index = graph(torch.from_numpy(image), torch.from_numpy(thresholds))
        return labels.numpy(), logits.numpy(), exit_index.numpy()

    return run


Writer = Callable[[torch.export.ExportedProgram, dict[str, Any], Path], None]
WRITERS: dict[Format, tuple[Writer, Callable[[Path], Runner]]] = {
    "onnx": (write_onnx, open_onnx),
    "torch": (_write_torch, _open_torch),
    "compiled": (_write_compiled, open_compiled),
}


@dataclass(frozen=True)
class _Run:
    error: float
    own_error: float
    same_pixels: float
    elsewhere: float = 0.0


def summarised(path: Path, runs: Sequence[_Run]) -> Exported:
    """Return how a file compares with the model in the worst of all runs."""
    worst = max(runs, key=lambda run: run.error)
    return Exported(
        path=path,
        runs=len(runs),
        error=worst.error,
        own_error=worst.own_error,
        same_pixels=min(run.same_pixels for run in runs),
        elsewhere=max(run.elsewhere for run in runs),
    )


def compare(model: ExitSegmenter, method: Method[Any], images: Sequence[Tensor], run: Runner) -> list[_Run]:
    """Compare a file with the model on every image, at the method's thresholds, at 1 and at 0.

    Raises `CheckpointError` where it differs from the model.
    """
    table = threshold_table(model, method).numpy()
    settings = [table] if method.thresholds is None else [table, np.ones_like(table), np.zeros_like(table)]
    exact = copy.deepcopy(model).double()
    found = [_run(model, exact, method, image, setting, run) for image in images for setting in settings]
    worst = max(found, key=lambda one: one.error)
    if any(one.error > max(TOLERANCE, ROUNDING * one.own_error) for one in found):
        raise CheckpointError(
            f"the exported graph is off by {worst.error:.1e} where the model is by {worst.own_error:.1e}: nothing was "
            "written; please report this with the versions of torch and onnxruntime."
        )
    return found


def _run(
    model: ExitSegmenter,
    exact: ExitSegmenter,
    method: Method[Any],
    image: Tensor,
    thresholds: npt.NDArray[np.float32],
    run: Runner,
) -> _Run:
    """Compare once, at thresholds where the file, the model and the model in fp64 let the same tokens leave.

    Of a confident model DToP keeps the best of many scores that round to 1, and rounding says which. Where few tokens
    are others than in the model, logits are compared with those tokens leaving in the model, too.
    """
    answers: list[tuple[Answers, SegmentationOutput]] = []
    for nudge in NUDGES:
        tried = np.clip(thresholds + np.float32(nudge), 0.0, 1.0).astype(np.float32)
        adjusted = _with_table(method, tried)
        file = run(image[None].numpy(), tried)
        with torch.no_grad():
            ours, truth = model([image], adjusted), exact([image.double()], adjusted)
        if all(np.array_equal(file[2][0], other.exit_index[0].numpy()) for other in (ours, truth)):
            return _compared(file, ours, truth)
        answers.append((file, ours))
    shares = [_swapped(*each) for each in answers]
    elsewhere, inner = min(shares), method.inner
    file, _ = answers[shares.index(elsewhere)]
    if isinstance(inner, DToP) and elsewhere <= SWAPPED:
        exits = torch.from_numpy(np.ascontiguousarray(file[2][0])).long().flatten()
        same = replace(prescribed_like(inner), context_weight=inner.context_weight, exit_index=exits)
        with torch.no_grad():
            compared = _compared(file, model([image], same), exact([image.double()], same))
        return replace(compared, elsewhere=elsewhere)
    raise CheckpointError(
        f"the exported graph lets other tokens leave than the model at thresholds near {thresholds.tolist()}: nothing "
        "was written; please report this with the versions of torch and onnxruntime."
    )


def _swapped(file: Answers, ours: SegmentationOutput) -> float:
    """Return the share of tokens that leave elsewhere; 1 where another number leaves at an exit by more than that."""
    left, wanted = file[2][0].ravel(), ours.exit_index[0].numpy().ravel()
    counts = [np.bincount(each, minlength=ours.num_exits + 1) for each in (left, wanted)]
    share = float((left != wanted).mean())
    return share if np.abs(counts[0] - counts[1]).max() <= SWAPPED * left.size else 1.0


def _compared(file: Answers, ours: SegmentationOutput, truth: SegmentationOutput) -> _Run:
    """Compare the file with the model and the model in fp64, with the same tokens leaving in all three."""
    labels, logits, _ = file
    reference, own = _class_maps(truth), _class_maps(ours)
    scale = max(1.0, float(np.abs(reference).max()))
    seen = logits[0, :, : reference.shape[1], : reference.shape[2]]  # of masks, without what padding adds
    error, own_error = (float(np.abs(values - reference).max()) / scale for values in (seen, own))
    return _Run(error, own_error, float((labels[0] == torch.as_tensor(ours.labels[0]).numpy()).mean()))


def _class_maps(output: SegmentationOutput) -> npt.NDArray[np.float64]:
    """Return what a graph answers for an image `(K, ., .)`: logits on the grid, or of masks the scores of pixels."""
    maps = torch.as_tensor(output.logits[0]) if output.value == "masks" else output.grid_logits[0]
    return maps.double().numpy()


def _with_table(method: Method[Any], thresholds: npt.NDArray[np.float32]) -> Method[Any]:
    """Return the method with these thresholds, the very fp32 numbers that the graph gets."""
    if method.thresholds is None:
        return method
    values = (
        tuple(tuple(map(float, row)) for row in thresholds) if thresholds.ndim == 2 else tuple(map(float, thresholds))
    )
    return method.with_thresholds(values)


@contextmanager
def explained(model: ExitSegmenter) -> Iterator[None]:
    """Turn what the exporters raise about a decode head of the user's own into one sentence."""
    try:
        yield
    except TokenExitError:
        raise
    except Exception as error:  # of several libraries, each with its own types
        if not isinstance(model.decode_head, ModuleHead):
            raise
        raise ConfigError(
            f"{named(model.decode_head.module)} cannot be exported ({in_short(error)}): write it without branches on "
            "values and sizes, with its tensors as buffers."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' notes to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
