"""DoViT's two batch modes on batches of eight images: each for itself, or the release's one count per batch.

python docs/evidence/results/batch_mode.py MODEL CAMVID_ROOT docs/evidence/results/ablations/dovit_batch_mode.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.metrics import confusion_matrix, scores
from tokenexit.methods import DoViT
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

BATCH = 8
THRESHOLD = (0.98, 0.8, 0.65)


def main() -> None:
    model = ExitSegmenter.from_pretrained(sys.argv[1])
    data = open_dataset("camvid", sys.argv[2], "test")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    counts = {mode: torch.zeros(11, 11, dtype=torch.int64) for mode in ("exact", "mean")}
    macs, dense = dict.fromkeys(counts, 0), 0
    with inference(model.device):
        for start in range(0, len(order), BATCH):
            samples = [data[i] for i in order[start : start + BATCH]]
            images = [model.preprocessing.to_tensor(sample.image) for sample in samples]
            for mode in ("exact", "mean"):
                output = model(images, DoViT(threshold=THRESHOLD, batch_mode=mode))
                macs[mode] += sum(output.ledger.macs)
                for labels, sample in zip(output.labels, samples):
                    truth = torch.from_numpy(sample.mask.astype("int64"))
                    counts[mode] += confusion_matrix(labels, truth, 11, data.labels.ignore_index)
            dense += sum(output.ledger.dense_macs)
            print(f"{start + len(samples)} of {len(order)}", end="\r", file=sys.stderr, flush=True)
    results = {mode: {"mIoU": scores(counts[mode]).miou, "share_of_dense": macs[mode] / dense} for mode in counts}
    about = {"model": sys.argv[1], "batch": BATCH, "threshold": THRESHOLD, "order": "random, seed 0"}
    text = json.dumps({"about": about, "results": results}, indent=2) + "\n"
    Path(sys.argv[3]).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
