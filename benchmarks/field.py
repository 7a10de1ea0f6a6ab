"""Every method and combination on one trained model and the same images: compute, time, agreement, mIoU.

    python -m benchmarks.field runs/camvid-dense --data camvid --data-root data/camvid --json FILE

Rows are exits, merging, both, and what needs neither: smaller images and a stop. mIoU, multiply-adds and the time of
one image at a time are of `tokenexit.evaluate`, whose methods run in turn; so do batches of `--batch` images.
conversion = (speed-up - 1) / (MAC ratio - 1), from medians over images; batches have the interval over rounds.
Agreement is the share of pixels with the dense model's class. Merging and thresholds are used as they are, on a model
that was trained with neither. A model with exit heads "cropr" has rows of Cropr in place of exits. `--rivals` adds the
dense model compiled, on the batch; peak memory is that of the batch. `labels_oracle` is what supertokens would cost and
reach if the truth chose them. `--scale 2` runs every row at twice the side. Untrained models and imposed counts:
benchmarks.untrained.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conversion import interleaved_ms, median_interval, processor
from benchmarks.rivals import plain
from benchmarks.study import model_and_data_parser
from benchmarks.untrained import peak_mib
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Spread
from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.evaluation.metrics import confusion_matrix, scores
from tokenexit.evaluation.results import Scaled
from tokenexit.heads import CroprHead
from tokenexit.methods import Cropr, Dense, DoViT, DToP, FixedRatio, Method, Reduced, Resized, Truncated
from tokenexit.reducers import ALGM, G2TM, MPM, Reducer, Supertokens, ToMe, ZeroTPrune
from tokenexit.reducers.supertokens import LabelledSupertokens
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

MERGING: tuple[Reducer, ...] = (
    *(ALGM(threshold) for threshold in (0.95, 0.9, 0.85, 0.8)),
    MPM(),
    *(ToMe(ratio) for ratio in (0.02, 0.04, 0.06)),
    *(G2TM(threshold) for threshold in (0.95, 0.9, 0.85)),
    *(ZeroTPrune((keep,)) for keep in (0.9, 0.8, 0.7)),
    ZeroTPrune((0.8,), share_similar=0.0),
    *(Supertokens(threshold) for threshold in (0.95, 0.9, 0.8)),
    *(Supertokens(threshold, policy="entropy") for threshold in (0.7, 0.6, 0.5)),
)
BESIDE_EXITS: tuple[Reducer, ...] = (ALGM(0.95), ALGM(0.9), MPM(), ToMe(0.02), G2TM(0.95), Supertokens(0.95))
RATIOS: tuple[float, ...] = (0.7, 0.5)
THRESHOLDS: tuple[tuple[float, ...], ...] = ((0.98, 0.9, 0.8), (0.98, 0.8, 0.65), (0.9, 0.7, 0.5))


def contenders(model: ExitSegmenter) -> list[Method[Any]]:
    if any(isinstance(head, CroprHead) for head in model.exit_heads):
        return [
            Dense(),
            *(Cropr(rate) for rate in (0.02, 0.04, 0.08)),
            *(Reduced(Cropr(0.04), by) for by in BESIDE_EXITS),
            *(Resized(Dense(), scale) for scale in (0.9, 0.8, 0.7)),
        ]
    exits = [DToP(thresholds) for thresholds in THRESHOLDS]
    return [
        Dense(),
        *exits,
        *(DoViT(thresholds, rejoin=rejoin) for thresholds in THRESHOLDS[:1] for rejoin in (None, 1)),
        *(FixedRatio(ratio, rejoin=rejoin) for ratio in RATIOS for rejoin in (None, 1)),
        *(Reduced(Dense(), by) for by in MERGING),
        *(Reduced(method, by) for method in exits[:2] for by in BESIDE_EXITS),
        *(Resized(Dense(), scale) for scale in (0.9, 0.8, 0.7, 0.6)),
        *(Truncated(n + 1) for n in range(len(model.config.exits))),
    ]


def agreements(model: ExitSegmenter, images: Sequence[Tensor], methods: Sequence[Method[Any]]) -> list[float]:
    """Share of pixels, of all images, that each method names as the first does."""
    same = torch.zeros(len(methods))
    for image in images:
        labels = [torch.as_tensor(model([image], method).labels) for method in methods]
        same += torch.stack([(each == labels[0]).float().mean() for each in labels])
    return (same / len(images)).tolist()


def batch_figures(
    model: ExitSegmenter,
    images: Sequence[Tensor],
    methods: Sequence[Method[Any]],
    rounds: int,
    precision: Any,
    rivals: bool,
) -> list[dict[str, Any]]:
    """Milliseconds of one batch of all images, the methods in turn, conversion, peak memory, and the compiled rival."""
    calls: dict[str, Any] = {str(n): partial(model, images, method) for n, method in enumerate(methods)}
    if rivals:
        calls["compiled"] = plain(model, images, precision, compiled=True)
    times = interleaved_ms(calls, rounds, model.device, precision, ("compiled",) if rivals else ())
    rows: list[dict[str, Any]] = []
    for n, method in enumerate(methods):
        ledger = model(images, method).ledger
        gain = [dense / own for dense, own in zip(times["0"], times[str(n)])]
        speedup, low, high = median_interval(gain)
        peak = peak_mib(calls[str(n)], model.device)
        rows.append({"ms": median(times[str(n)]), "speedup": [speedup, low, high], "peak_mib": peak})
        if rivals:
            over = [compiled / own for compiled, own in zip(times["compiled"], times[str(n)])]
            rows[-1]["over_compiled"] = list(median_interval(over))
        ratio = sum(ledger.dense_macs) / sum(ledger.macs)
        if ratio > 1.05:
            rows[-1]["conversion"] = [(each - 1) / (ratio - 1) for each in (speedup, low, high)]
    return rows


def labels_oracle(model: ExitSegmenter, data: SegmentationDataset) -> dict[str, float]:
    """Supertokens of one true class: cost over dense, and mIoU, over all images; with windows of a few in places."""
    ignored, classes = data.labels.ignore_index, model.config.num_classes
    confusion, macs, dense = torch.zeros(classes, classes, dtype=torch.int64), 0, 0
    for sample in (data[n] for n in range(len(data))):
        image = model.preprocessing.to_tensor(sample.image).to(model.device)
        truth = torch.from_numpy(sample.mask.astype("int64"))
        seen = F.interpolate(truth[None, None].float(), image.shape[1:], mode="nearest-exact")[0, 0].long()
        by = LabelledSupertokens(labels=(seen,), ignored=-1 if ignored is None else ignored)
        output = model([image], Reduced(Dense(), by), targets=[(truth.shape[0], truth.shape[1])])
        (labels,) = output.labels
        confusion += confusion_matrix(labels.cpu(), truth, classes, ignored)
        macs, dense = macs + sum(output.ledger.macs), dense + sum(output.ledger.dense_macs)
    return {"share_of_dense": macs / dense, "mIoU": float(scores(confusion).miou)}


def main() -> None:
    keep_buffers()
    parser = model_and_data_parser(__doc__)
    parser.add_argument("--limit", type=int, help="number of images, evenly spread over the split; all if not given")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="of a batch; 0 for none")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the sides of the images, of every row")
    parser.add_argument("--agree", type=int, default=24, help="images that agreement with dense is read from")
    parser.add_argument("--only", default="", help="regular expression of the labels of rows; dense is always there")
    parser.add_argument("--rivals", action="store_true", help="the dense model compiled, on the batch")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = ExitSegmenter.from_pretrained(options.model, device)
    data: SegmentationDataset = open_dataset(options.data, options.data_root, options.split)
    if options.limit:
        data = Spread(data, options.limit)
    methods = [m for m in contenders(model) if m == Dense() or re.search(options.only, m.label)]
    if options.scale != 1.0:
        methods = [m for m in methods if not isinstance(m, Resized)]
    start = time.time()
    spread = [data[n * len(data) // options.agree].image for n in range(options.agree)]
    images = [model.preprocessing.to_tensor(image, options.scale).to(device) for image in spread]
    with inference(device, options.precision):
        agreed = agreements(model, images, methods)
        some = images[:: max(1, options.agree // options.batch)][: options.batch]
        batches = (
            batch_figures(model, some, methods, options.rounds, options.precision, options.rivals)
            if options.rounds
            else []
        )
        oracle = None if model.preprocessing.window or options.scale != 1.0 else labels_oracle(model, data)
    print(f"agreement and batches: {time.time() - start:.0f} s", flush=True)
    rows = []
    scaled = [Scaled(method, options.scale) for method in methods]
    for n, found in enumerate(evaluate(model, data, scaled, precision=options.precision)):
        row = found.to_dict(data.labels.names) | {"agreement": agreed[n]}
        if batches:
            row["batch"] = batches[n]
        rows.append(row)
    dense = rows[0]["latency_ms_median"]
    for row in rows:
        ratio = rows[0]["gmacs_mean"] / row["gmacs_mean"]
        if ratio > 1.05:
            row["conversion"] = (dense / row["latency_ms_median"] - 1) / (ratio - 1)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("json", "model", "data_root")}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "machine": machine, "labels_oracle": oracle, "results": rows}
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))
    print(f"supertokens chosen by labels: {oracle}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, in the order of multiply-adds."""
    lines = ["| row | of dense | GMACs | mIoU | boundary IoU | agreement | ms, one | conversion | conversion, batch "]
    lines[0] += "| over compiled dense | peak, MiB |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda row: -float(row["share_of_dense"])):
        batch = row.get("batch", {}).get("conversion")
        over, peak = (row.get("batch", {}).get(name) for name in ("over_compiled", "peak_mib"))
        lines.append(
            f"| {row['label']} | {row['share_of_dense']:.1%} | {row['gmacs_mean']:.2f} | {row['mIoU']:.2f} "
            f"| {row['boundary_IoU']:.2f} | {row['agreement']:.2%} | {row['latency_ms_median']:.0f} "
            f"| {format(row['conversion'], '.2f') if 'conversion' in row else ''} "
            f"| {f'{batch[0]:.2f} [{batch[1]:.2f}, {batch[2]:.2f}]' if batch else ''} "
            f"| {'' if over is None else format(over[0], '.2f')} | {'' if peak is None else format(peak, '.0f')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
