"""Measure stages of fixed shapes on real images: agreement with the model, padding, and time in onnxruntime.

    python -m benchmarks.stages MODEL IMAGES --calibration-images OTHERS --method dtop --threshold 0.98/0.8/0.65

The example's host loop, the ONNX file with exits and the dense one take each image in turn, in one process, on as many
threads as torch has; medians over images with 95 % intervals, and ratios image by image. Buckets are chosen for other
images than those that are measured. Labels and exits are compared with the model's in torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conversion import median_interval, processor, ratio
from tokenexit.exporting.buckets import COUNT, choose_buckets
from tokenexit.exporting.export import export_model
from tokenexit.exporting.graph import OUTPUTS
from tokenexit.exporting.pictures import images_for_ranges
from tokenexit.exporting.staged import FOLDER, MANIFEST, export_stages
from tokenexit.exporting.stages import staged_method
from tokenexit.inputs.images import load_image
from tokenexit.inputs.sources import list_images
from tokenexit.methods import Dense, build_method
from tokenexit.segmenter import ExitSegmenter

EXAMPLE = Path(__file__).parents[1] / "examples" / "stages_host.py"


def example() -> Any:
    """The host loop of the examples, as a module."""
    spec = importlib.util.spec_from_file_location("stages_host", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--calibration-images", type=Path, required=True)
    parser.add_argument("--method", default="dtop", choices=("dtop", "dovit"))
    parser.add_argument("--threshold", default="0.98/0.8/0.65")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--bucket-count", type=int, default=COUNT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = ExitSegmenter.from_pretrained(options.model)
    tau = tuple(float(part) for part in options.threshold.split("/"))
    method = build_method({"name": options.method, "threshold": tau})
    paths = list(list_images([options.images]))
    step = max(1, len(paths) // options.limit)
    images = [model.preprocessing.to_tensor(load_image(path)) for path in paths[::step][: options.limit]]
    with tempfile.TemporaryDirectory() as folder:
        row = measured(
            model, method, images, images_for_ranges(model, [options.calibration_images]), Path(folder), options
        )
    print(json.dumps(row, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(row, indent=1) + "\n")


def measured(
    model: ExitSegmenter, method: Any, images: list[torch.Tensor], others: list[torch.Tensor], out: Path, options: Any
) -> dict[str, Any]:
    """Export three ways, run each image in each, and compare."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    made = export_stages(model, method, images[:3], out, counted=others, bucket_count=options.bucket_count)
    files = {
        "onnx with exits": export_model(model, method, images[:1], out / "exits").path,
        "onnx dense": export_model(model, Dense(), images[:1], out / "dense").path,
    }
    module, about = example(), json.loads((out / FOLDER / MANIFEST).read_text())
    named = [file["file"] for stage in about["stages"] for file in stage["files"]]
    stages = module.Stages(about, {one: onnxruntime.InferenceSession(out / FOLDER / one, settings) for one in named})
    whole = {name: onnxruntime.InferenceSession(path, settings) for name, path in files.items()}
    table = np.array(about["thresholds"], np.float32)
    times: dict[str, list[float]] = {"stages": [], **{name: [] for name in files}}
    differing = {name: np.zeros(2, int) for name in ("stages", "onnx with exits")}
    for n, image in enumerate((images[0], *images)):  # the first time warms up
        given = image[None].numpy()
        calls: dict[str, Callable[[], Any]] = {"stages": partial(module.segment, stages, given)}
        for name, session in whole.items():
            given_thresholds = table if name == "onnx with exits" else np.ones(len(table), np.float32)
            calls[name] = partial(session.run, list(OUTPUTS), {"image": given, "thresholds": given_thresholds})
        found = {}
        for name, call in calls.items():
            start = time.perf_counter()
            found[name] = call()
            if n:
                times[name].append(1e3 * (time.perf_counter() - start))
        if n:
            with torch.no_grad():
                ours = model([image], method)
            whole_answer = found["onnx with exits"]
            for name, (labels, left) in (("stages", found["stages"]), ("onnx with exits", whole_answer[::2])):
                differing[name] += [
                    (labels.reshape(image.shape[1:]) != torch.as_tensor(ours.labels[0]).numpy()).sum(),
                    (left.reshape(about["grid"]) != ours.exit_index[0].numpy()).sum(),
                ]
    on_these = choose_buckets(
        model, staged_method(model, method), tuple(about["grid"]), images, asked=made.buckets.tokens
    )
    with torch.no_grad():
        macs = float(np.mean([model([image], method).ledger.share_of_dense[0] for image in images]))
    return {
        "method": about["method"],
        "images": len(images),
        "size": about["image_size"],
        "tokens": int(np.prod(about["grid"])),
        "buckets": about["buckets"],
        "files": made.files,
        "megabytes": {
            "stages": round(made.megabytes, 1),
            **{name: round(path.stat().st_size / 1e6, 1) for name, path in files.items()},
        },
        "padding": {"of the images of the choice": made.buckets.waste, "of these images": on_these.waste},
        "labels and exits unlike the model's": {
            **{name: counted.tolist() for name, counted in differing.items()},
            "of": [images[0][0].numel() * len(images), int(np.prod(about["grid"])) * len(images)],
        },
        "share_of_dense": round(macs, 4),
        "ms": {name: [round(value, 2) for value in median_interval(each)] for name, each in times.items()},
        "stages over": {name: ratio(times["stages"], times[name]) for name in files},
        "machine": {"processor": processor(torch.device("cpu")), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }


if __name__ == "__main__":
    main()
