"""Check whether budgets are met on other images, and compare with one threshold set by hand.

    python -m benchmarks.budgets MODEL --data camvid --data-root ../shared/data/camvid --json budgets.json

Thresholds are calibrated on a random half of `--fit-split`, without its labels, and checked on the other half and on
`--check-split`. A budget counts as met if the mean multiply-adds are within 2 % of it or within two standard errors.
Beside its mIoU stands that of one threshold for all exits at equal compute, interpolated between `--hand`
thresholds on the same images. Interrupted, it goes on with the run that is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study import bar, open_notebook
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet, true_run, truth_reference
from tokenexit.calibration.targets import Budget
from tokenexit.data.registry import open_dataset
from tokenexit.errors import ConfigError
from tokenexit.evaluation.metrics import scores
from tokenexit.methods import Dense, DoViT, DToP, Method, build_method
from tokenexit.report.tables import Column, Table
from tokenexit.segmenter import ExitSegmenter

HAND = (0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4)


def figures(calibration_set: CalibrationSet, method: Method[Any], title: str) -> dict[str, float]:
    run = true_run(calibration_set, method, truth_reference(calibration_set), title)
    miou = scores(run.confusion.sum(0)).miou
    return {"share": run.mac_ratio, "error": run.mac_ratio_error, "miou": miou, "images": len(calibration_set)}


def by_hand(curve: Sequence[dict[str, float]], share: float) -> float | None:
    """mIoU of hand-set thresholds at this compute, linear between neighbours; None where they do not reach."""
    points = sorted((point["share"], point["miou"]) for point in curve)
    shares, mious = zip(*points)
    return float(np.interp(share, shares, mious)) if shares[0] <= share <= shares[-1] else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--fit-split", default="val")
    parser.add_argument("--check-split", default="test")
    parser.add_argument("--limit", type=int, help="number of images of each split, drawn at random")
    parser.add_argument("--length", type=int, help="number of images of each split of drawn scenes")
    parser.add_argument("--method", nargs="+", choices=("dtop", "dovit"), default=["dtop", "dovit"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4])
    parser.add_argument("--hand", type=float, nargs="*", default=list(HAND), help="thresholds set by hand")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the halves")
    parser.add_argument("--json", type=Path, help="JSON file of the figures, written after every run")
    options = parser.parse_args(arguments)

    model = ExitSegmenter.from_pretrained(options.model)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
    notes = open_notebook(options.json, {**settings, "weights": model.fingerprint()}, "--json")
    places = {}
    for split in (options.fit_split, options.check_split):
        drawn = {} if options.length is None else {"length": options.length}
        data = open_dataset(options.data, options.data_root, split, **drawn)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed)).tolist()
        places[split] = CalibrationSet(model, data, tuple(order[: options.limit]), progress=bar)
    half = len(places[options.fit_split]) // 2
    fit = places[options.fit_split].part(range(half))
    checks = {
        f"fit ({options.fit_split})": fit,
        f"other half ({options.fit_split})": places[options.fit_split].part(range(half, 2 * half)),
        options.check_split: places[options.check_split],
    }
    checks = {
        name: replace(calibration_set, indices=tuple(sorted(calibration_set.indices)))
        for name, calibration_set in checks.items()
    }
    rows = []
    for where, calibration_set in checks.items():
        dense = notes.once(f"dense on {where}", partial(figures, calibration_set, Dense(), f"dense, {where}"))
        rows.append([where, "dense", None, 1.0, 0.0, None, dense["miou"], None])
    for kind in (DToP, DoViT):
        if kind.name not in options.method:
            continue
        for budget in options.budgets:

            def chosen(kind: Any = kind, budget: float = budget) -> dict[str, Any] | str:
                try:
                    return calibrate(fit, kind(), Budget("budget", budget)).to_dict()
                except ConfigError as refused:
                    return str(refused)

            spec = notes.once(f"{kind.name} to {budget}", chosen)
            if isinstance(spec, str):
                print(f"{kind.name}: {spec}")
                continue
            method = build_method(spec["method"])
            for where, calibration_set in checks.items():
                got = notes.once(
                    f"{kind.name} to {budget} on {where}",
                    partial(figures, calibration_set, method, f"{kind.name} {budget:g}, {where}"),
                )
                curve = [
                    notes.once(
                        f"{kind.name} by hand {value} on {where}",
                        partial(figures, calibration_set, kind(threshold=value), f"{kind.name} {value}, {where}"),
                    )
                    for value in options.hand
                ]
                error = got["error"] or 0.0  # one image has none
                met = abs(got["share"] - budget) <= max(0.02 * budget, 2 * error)
                hand = by_hand(curve, got["share"]) if curve else None
                row = [where, kind.name, budget, got["share"], got["error"], "yes" if met else "no", got["miou"], hand]
                rows.append(row)
    columns = [
        Column("images"),
        Column("method"),
        Column("budget", "{:.0%}", "right"),
        Column("reached", "{:.2%}", "right", "Multiply-adds over dense ones."),
        Column("± s.e.", "{:.2%}", "right"),
        Column("met", "{}", "right", "Within 2 % of the budget, or within two standard errors."),
        Column("mIoU", "{:.2f}", "right"),
        Column("by hand", "{:.2f}", "right", "mIoU of one threshold for all exits at equal compute, interpolated."),
    ]
    print(Table(columns, rows).to_markdown())


if __name__ == "__main__":
    main()
