"""The command `policy`: the network that chooses windows of patches for supertokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenexit.cli.options import (
    add_dataset_options,
    add_machine_options,
    add_model_argument,
    check_counts,
    command_parser,
    completes,
    dataset_of,
    open_model,
)
from tokenexit.cli.progress import progress_bars


def policy(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    check_counts(options, "sizes", "steps", "batch")
    from tokenexit.data.loader import Cached
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.training.window_policy import fit_window_policy, judge_window_policy

    model, bars = open_model(options), progress_bars()
    _, data = dataset_of(options)
    _, judged = dataset_of(argparse.Namespace(**{**vars(options), "split": options.judge_split}))
    check_classes(model, data)
    found = fit_window_policy(
        model,
        Cached(data),
        sides=options.sizes,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
        progress=bars("fitting"),
    )
    for figures in judge_window_policy(found, judged, bars("judging")):
        print(figures)
    found.save_pretrained(options.out)
    print(f"model: {options.out}; it runs with --merge supertokens:0.95,policy=net")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("policy", "A small network that says which windows of patches may share one token.")
    add_model_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model with the network")
    group = add_dataset_options(parser, "train", "data", "; that of the training if not given")
    judged = group.add_argument("--judge-split", default="val", help="part of the dataset that the figures are of")
    completes(judged, ("train", "val", "test"))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2, 4], metavar="SIDE", help="sides of the windows in patches"
    )
    parser.add_argument("--steps", type=int, default=2000, help="number of optimiser steps")
    parser.add_argument("--batch", type=int, default=8, help="number of images of a step")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    add_machine_options(parser)
    return parser
