"""A folder of stages is written, with a manifest for the host loop, and compared with the model by such a loop.

Stages have fixed shapes; the loop chooses the smallest bucket that holds the live tokens, fills it up, and does what
depends on values. `examples/stages_host.py` is the same loop without this library.

Legend: L rows of all tokens, P live patches, K classes, E exits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.engine.tokens import Packing
from tokenexit.errors import ConfigError
from tokenexit.exporting.buckets import COUNT, Buckets, choose_buckets, smallest
from tokenexit.exporting.export import (
    Answers,
    Exported,
    Runner,
    compare,
    explained,
    metadata,
    quiet,
    summarised,
    write_onnx,
)
from tokenexit.exporting.stages import Stage, StagedMethod, staged_method, stages
from tokenexit.methods import DoViT, DToP, MethodLike, as_method, build_method
from tokenexit.methods.thresholded import Graded
from tokenexit.outputs.ledger import Size
from tokenexit.runtime.atomic import atomic_folder
from tokenexit.segmenter import ExitSegmenter

FOLDER, MANIFEST = "stages", "manifest.json"
VERSION = 2
"""Of the manifest; one that an older host loop would misread gets another."""
DTYPES = {torch.float32: "float32", torch.int32: "int32"}
INPUTS = {
    "image": "(1, 3, H, W), resized to image_size and normalised: (pixels / 255 - mean) / std",
    "tokens": "rows: prefix_tokens first, live patches in raster order, then padding, which may hold anything",
    "live": "number of rows that are no padding",
    "place": "row of each token among all tokens, prefix tokens first; behind the live ones anything",
    "canvas": "a row for each patch: what the last exit or decode head that saw it answered in 'rows'",
    "presence": "of the decode head, or of the exit where the network stops",
}
"""What the manifest says of inputs, in words."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Staged:
    """A folder of stages.

    Attributes:
        compared: the folder, and how it compares with the model.
        files: number of ONNX files.
        megabytes: of all files together.
        buckets: numbers of patch tokens behind each exit, and what their padding costs.
    """

    compared: Exported
    files: int
    megabytes: float
    buckets: Buckets


def export_stages(
    model: ExitSegmenter,
    method: MethodLike,
    images: Sequence[Tensor],
    out: Path,
    *,
    counted: Sequence[Tensor] = (),
    buckets: Sequence[Sequence[int]] | None = None,
    bucket_count: int = COUNT,
) -> Staged:
    """Write the folder `stages` in `out`, once its stages, run by a host loop, say on `images` what the model says.

    They are compared as `export_model` compares a file: at the method's thresholds, with nobody and with everybody
    leaving.

    Args:
        model: the segmenter.
        method: DToP or DoViT, its name or its specification.
        images: `(3, H, W)` fp32 each, as `Preprocessing` makes them, of one size, which becomes that of the stages.
        out: the folder.
        counted: images of that size whose live tokens buckets are chosen for.
        buckets: numbers of patch tokens, for all exits alike or for each; else they are chosen.
        bucket_count: number of buckets of each stage where they are chosen.

    Returns:
        The folder, and how it compares with the model.

    Raises:
        ConfigError: for a method or model that stages cannot hold, for images of several sizes or none, for buckets
            that cannot be, for a folder with other files, and for missing packages.
        CheckpointError: if the stages' results differ from the model's; nothing is written.
    """
    sizes = sorted({(image.shape[1], image.shape[2]) for image in (*images, *counted)})
    if not sizes:
        raise ConfigError("there is no image to compare the stages with the model on: give one.")
    if len(sizes) > 1:
        named = " and ".join(f"{height}x{width}" for height, width in sizes[:2])
        raise ConfigError(f"stages are for images of one size, got {named}: give --image-size, or images of one size.")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    (size,) = sizes
    method = staged_method(model, as_method(method))
    grid = model.backbone.patch_embed.grid(*size)
    chosen = choose_buckets(model, method, grid, counted, buckets, bucket_count)
    out.mkdir(parents=True, exist_ok=True)
    with explained(model), atomic_folder(out / FOLDER, MANIFEST) as folder:
        _write(folder, model, method, size, chosen)
        runs = compare(model, method, images, open_stages(folder))
        files = list(folder.iterdir())
        megabytes = sum(file.stat().st_size for file in files) / 1e6
    number = sum(file.suffix == ".onnx" for file in files)
    return Staged(summarised(out / FOLDER, runs), number, megabytes, chosen)


def _write(folder: Path, model: ExitSegmenter, method: StagedMethod, size: Size, buckets: Buckets) -> None:
    """Write all stages and the manifest to an empty folder."""
    from tokenexit.exporting.shared_weights import share_weights

    made = list(stages(model, method, size, buckets.tokens))
    for stage in made:
        with torch.no_grad(), quiet():
            program = torch.export.export(stage.module, tuple(stage.inputs.values()), strict=False)
        about = {"stage": stage.name, "tokens": stage.tokens}
        write_onnx(program, about, folder / file_name(stage), stage.outputs)
    share_weights([folder / file_name(stage) for stage in made])
    content = manifest(model, method, size, buckets, made)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def file_name(stage: Stage) -> str:
    """Return the name of a stage's file."""
    return f"{stage.name}.onnx" if stage.tokens is None else f"{stage.name}-{stage.tokens}.onnx"


def manifest(
    model: ExitSegmenter, method: StagedMethod, size: Size, buckets: Buckets, made: Sequence[Stage]
) -> dict[str, Any]:
    """Return all that a host loop must know of stages: `manifest.json`."""
    entries = []
    for name, group in groupby(made, key=lambda stage: stage.name):
        same = list(group)
        entries.append({"name": name, **same[0].facts, "files": [_file(stage) for stage in same]})
    return {**_facts(model, method, size, buckets), "stages": entries}


@torch.no_grad()
def _file(stage: Stage) -> dict[str, Any]:
    """Return what the manifest says of a stage's file."""
    found = stage.module(*stage.inputs.values())
    outputs = dict(zip(stage.outputs, (found,) if isinstance(found, Tensor) else found))
    named = {"tokens": stage.tokens, "file": file_name(stage)}
    return {**named, "inputs": _shapes(stage.inputs), "outputs": _shapes(outputs)}


def _shapes(tensors: Any) -> dict[str, Any]:
    return {name: {"shape": list(one.shape), "dtype": DTYPES[one.dtype]} for name, one in tensors.items()}


def _facts(model: ExitSegmenter, method: StagedMethod, size: Size, buckets: Buckets) -> dict[str, Any]:
    """Return what the manifest says beside the stages."""
    about = metadata(model, method)
    del about["output"]  # `labels` are of the image's size, and there are no windows
    config = model.config.backbone
    fixed = replace(model.preprocessing, resize=size)
    return {
        "format": "tokenexit stages",
        "version": VERSION,
        **about,
        "input": INPUTS,
        "preprocessing": fixed.to_dict(),
        "image_size": list(size),
        "grid": list(model.backbone.patch_embed.grid(*size)),
        "prefix_tokens": config.num_prefix_tokens,
        "width": config.embed_dim,
        "rule": _rule(method),
        "buckets": [list(one) for one in buckets.tokens],
        "buckets_chosen_for": buckets.source,
        "padding_waste": round(buckets.waste, 5),
    }


def _rule(method: StagedMethod) -> dict[str, Any]:
    """Return the numbers of the rule that the host loop applies, whether defaults or not."""
    if isinstance(method, DToP):
        keep = {"keep_per_class": method.keep_per_class, "keep_in_window": method.keep_in_window}
        return {**keep, "stop": method.stop}
    return {
        "scores": "all" if method.scores_grid else "live",
        "min_improvement": method.min_improvement,
        "blend_trigger": method.blend_trigger,
        "blend_weight": method.blend_weight,
    }


# ------------------------------------------------------------------------------------------------- the host's side


class Host:
    """The stages of a folder, each run in the smallest file that holds the tokens.

    Args:
        about: the manifest.
        sessions: for the name of each file, a session of onnxruntime.
    """

    def __init__(self, about: dict[str, Any], sessions: Mapping[str, Any]) -> None:
        self.about, self.sessions = about, sessions
        self.files = {stage["name"]: {file["tokens"]: file for file in stage["files"]} for stage in about["stages"]}

    def run(self, name: str, **given: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Run a stage; rows of `tokens` and `place` are filled up to those of a bucket."""
        held = self.files[name]
        if None in held:
            file = held[None]
        else:
            file = held[smallest(list(held), len(given["tokens"]) - self.about["prefix_tokens"])]
            given["live"] = np.array([len(given["tokens"])], np.int32)
        feeds = {key: _filled(given[key], **expected) for key, expected in file["inputs"].items()}
        return dict(zip(file["outputs"], self.sessions[file["file"]].run(list(file["outputs"]), feeds)))


def _filled(rows: npt.NDArray[Any], shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """Return rows with zeros behind them, as many as `shape` has."""
    if rows.shape == tuple(shape):
        return rows.astype(dtype, copy=False)
    padded = np.zeros(shape, dtype)
    padded[: len(rows)] = rows
    return padded


def open_stages(folder: Path) -> Runner:
    """Return a function that runs a folder of stages in onnxruntime, with the method's own rule between them.

    Raises `ConfigError` where onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError(f"stages need the package {error.name}: pip install 'tokenexit[export]'.") from None
    about: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    names = [file["file"] for stage in about["stages"] for file in stage["files"]]
    providers = ["CPUExecutionProvider"]
    sessions = {name: onnxruntime.InferenceSession(folder / name, providers=providers) for name in names}
    return runner_of(Host(about, sessions))


def runner_of(host: Host) -> Runner:
    """Return stages as a function of an image `(1, 3, H, W)` and thresholds, as that of any exported file."""
    method = build_method(host.about["method"])

    def run(image: Floats, thresholds: Floats) -> Answers:
        rows = thresholds.tolist()
        now = method.with_thresholds(tuple(tuple(row) if isinstance(row, list) else row for row in rows))
        if isinstance(now, DToP):
            return _dtop(host, now, image)
        assert isinstance(now, DoViT), "stages are written of these two methods alone"
        return _dovit(host, now, image)

    return run


def _graded(
    host: Host,
    found: dict[str, npt.NDArray[Any]],
    count: int,
    earlier: Floats | None = None,
    position: npt.NDArray[np.int64] | None = None,
) -> Graded:
    """Return what an exit says of its first `count` patches, at `position` of the grid, or of all in order."""
    score = torch.from_numpy(found["score"][:count])
    label = torch.from_numpy(found["label"][:count]).long() if "label" in found else torch.zeros(count).long()
    grids = (tuple(host.about["grid"]),)
    packing, classes = Packing.of([count], score.device), len(host.about["classes"])
    before, where = (None if one is None else torch.from_numpy(one) for one in (earlier, position))
    return Graded(score, label, packing, grids, classes, position=where, earlier=before)


def _dtop(host: Host, method: DToP, image: Floats) -> Answers:
    about = host.about
    prefix, exits, cells = about["prefix_tokens"], len(about["exits_after_blocks"]), int(np.prod(about["grid"]))
    x, place = host.run("embed", image=image)["tokens"], np.arange(prefix + cells)
    canvas, left = np.zeros((cells, len(about["classes"])), np.float32), np.full(cells, exits)
    found: dict[str, npt.NDArray[Any]] = {}
    for n in range(exits + 1):
        x = host.run(f"span{n + 1}", tokens=x, place=place)["next_tokens"][: len(place)]
        found = host.run("decode" if n == exits else f"exit{n + 1}", tokens=x)
        position = place[prefix:] - prefix
        canvas[position], left[position] = found["rows"][: len(position)], n
        if n in (exits, method.last_exit):
            break
        graded = _graded(host, found, len(position), position=position)
        leaves = method.decide(n, graded, torch.ones(len(position), dtype=torch.bool))
        stay = np.append(np.ones(prefix, bool), ~leaves.numpy())
        x, place = x[stay], place[stay]
    presence = {"presence": found["presence"]} if "presence" in found else {}
    end = host.run("finish", canvas=canvas, **presence)
    return end["labels"], end["grid_logits"], left.reshape(1, *about["grid"])


def _dovit(host: Host, method: DoViT, image: Floats) -> Answers:
    about = host.about
    prefix, exits, cells = about["prefix_tokens"], len(about["exits_after_blocks"]), int(np.prod(about["grid"]))
    full, place = host.run("embed", image=image)["tokens"].copy(), np.arange(prefix + cells)
    keep, left, earlier = np.ones(cells, bool), np.full(cells, exits), None
    for n in range(exits + 1):
        if len(place):
            full[place] = host.run(f"span{n + 1}", tokens=full[place], place=place)["next_tokens"][: len(place)]
        position = place[prefix:] - prefix
        left[position] = n
        if n == exits:
            break
        if method.scores_grid:
            graded = _graded(host, host.run(f"exit{n + 1}", tokens=full), cells, earlier)
        else:
            graded = _on_grid(
                _graded(host, host.run(f"exit{n + 1}", tokens=full[place]), len(position)), position, cells
            )
            graded = replace(graded, earlier=None if earlier is None else torch.from_numpy(earlier))
        keep &= ~method.decide(n, graded, torch.from_numpy(keep)).numpy()
        earlier = graded.score.numpy()
        if not keep.all() and method.blend_weight > 0 and (~keep).sum() / len(full) > method.blend_trigger:
            mean = full[prefix:][~keep].mean(0)
            full[0] = (1 - method.blend_weight) * full[0] + method.blend_weight * mean
        place = np.append(np.arange(prefix), prefix + np.flatnonzero(keep))
    end = host.run("finish", tokens=full)
    return end["labels"], end["grid_logits"], left.reshape(1, *about["grid"])


def _on_grid(graded: Graded, position: npt.NDArray[np.int64], cells: int) -> Graded:
    """Return scores and classes of all cells, zeros where none were computed."""
    at = torch.from_numpy(position)
    score = torch.zeros(cells).index_copy(0, at, graded.score)
    label = torch.zeros(cells, dtype=torch.int64).index_copy(0, at, graded.label)
    return replace(graded, score=score, label=label, packing=Packing.of([cells], score.device))
