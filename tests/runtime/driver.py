"""What one of several processes sees: `torchrun -m tests.runtime.driver DATA DAMAGED MODEL OUT`.

It leaves `OUT/RANK.pt`, and the figures and the run that it makes with the others beside it.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import tokenexit.cli as cli
from tests.evaluation.test_evaluate import METHODS, Images
from tests.helpers import tiny_segmenter
from tests.training.tiny import silent, tiny_run
from tokenexit.data.base import Sample
from tokenexit.errors import ConfigError, DataError, TokenExitError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.evaluation.results import Evaluation
from tokenexit.methods import Dense
from tokenexit.runtime.distributed import all_or_none, gather, process_group, rank_and_size
from tokenexit.training.loop import train


class Damaged(Images):
    """The second and the fourth image cannot be read: those of the second of two processes."""

    def __getitem__(self, index: int) -> Sample:
        if index % 2:
            raise DataError(f"image {index} is damaged.")
        return super().__getitem__(index)


def figures(results: list[Evaluation]) -> list[dict[str, Any]]:
    """All but the times."""
    names = ("label", "gmacs", "dense_gmacs", "live", "boundary_iou", "input_scale")
    shown = [{name: getattr(result, name) for name in names} for result in results]
    confusions = [result.confusion.tolist() for result in results]
    return [row | {"confusion": confusion} for row, confusion in zip(shown, confusions)]


def failure(block: Any) -> str:
    try:
        with all_or_none():
            block()
    except TokenExitError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def config_error_of(rank: int) -> None:
    if rank_and_size()[0] == rank:
        raise ConfigError(f"process {rank} refuses.")


def typed(*arguments: object) -> tuple[int, str, str]:
    """A command as a user types it: how it ends and what it prints."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        status = cli.main(list(map(str, arguments)))
    return status, out.getvalue(), error.getvalue()


OPTIONS = (
    *("--method", "dense", "dtop", "--threshold", "0.36", "--references", "--input-scale", "1", "0.8"),
    *("--window", "16", "--stride", "12", "--device", "cpu"),
)


def main(data: Path, damaged: Path, saved: Path, out: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_segmenter("fcn", num_classes=5)
    with process_group():
        rank, count = rank_and_size()
        seen: dict[str, Any] = {"place": (rank, count), "gathered": gather({"rank": rank})}
        asked: list[int] = []
        results = evaluate(
            *(model, Images(5), METHODS),
            references=True,
            progress=lambda items: (asked.append(item) or item for item in items),  # type: ignore[func-returns-value]
        )
        seen |= {"five": figures(results), "times": len(results[0].latency_ms), "asked": asked}
        seen["one"] = figures(evaluate(model, Images(1), METHODS, references=True))
        seen["limit"] = figures(evaluate(model, Images(5), [Dense()], limit=3))
        seen["fine"] = failure(lambda: None)
        seen["second fails"] = failure(lambda: config_error_of(1))
        seen["damaged"] = failure(lambda: evaluate(model, Damaged(5), [Dense()]))
        evaluate_damaged = ("evaluate", saved, "--data", "folder", "--data-root", damaged, "--device", "cpu")
        seen["commands"] = {
            "evaluate": typed("evaluate", saved, *OPTIONS, "--json", out / "figures.json"),
            "damaged": typed(*evaluate_damaged, "--json", out / "damaged.json"),
            "no model": typed("evaluate", data),
            "wrong": typed("evaluate", saved, "--limit", "0"),
        }
        seen["after"] = gather(rank)  # nobody is out of step
        train(tiny_run(data, out / "run", validate_every=3), say=silent, progress=False)
    torch.save(seen, out / f"{rank}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
