"""The command line: each command parses its options and calls one Python function.

The help of the program itself is static and a command's libraries are imported when it runs, so that help stays fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from tokenexit.cli import (
    adapt,
    calibrate,
    completion,
    convert,
    cost,
    data,
    doctor,
    evaluate,
    export,
    gate,
    policy,
    predict,
    quickstart,
    report,
    serve,
    sweep,
    train,
)
from tokenexit.cli.completion import answer_shell
from tokenexit.cli.options import exit_status
from tokenexit.errors import TokenExitError
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.threads import shorten_waits
from tokenexit.version import __version__

HELP = f"""tokenexit {__version__}: early exits for the tokens of plain Vision Transformers

usage: tokenexit COMMAND [options]       tokenexit COMMAND --help for a command's options

  adapt        a cheaper model from a trained dense one and a folder of photos, without labels
  quickstart   a small training on drawn street scenes, Dense, DToP and DoViT compared; a few minutes on a CPU
  train        training or fine-tuning of a model as a YAML says
  evaluate     accuracy and compute of a model on a dataset, several methods in one table
  calibrate    thresholds for a budget or a bounded loss, saved with the model
  sweep        curves of mIoU against compute, several methods in one chart
  report       one HTML file: curve, classes, compute by image, cheapest and dearest images
  predict      masks, overlays and exit maps of images and videos
  serve        a page to try a model on, and an HTTP API
  cost         multiply-adds of a model, without weights
  export       ONNX or a torch.export program, exits included, compared with the model first
  gate         which exits pay on this machine at an image's size, and why
  policy       a small network, learned from labels, that says which windows of patches may share one token
  convert      a model from weights of timm, Hugging Face, mmsegmentation, Segmenter, DINOv2, DToP or DoViT
  data         check of a dataset before anyone trains on it: counts, sizes, class shares, what is damaged
  doctor       what this machine and installation can do
  completion   a script by which bash, zsh or fish completes all of this
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 fine, 1 something failed, 2 wrong use, 130 interrupted.

    What a user can cause is said in one sentence on stderr.
    """
    answer_shell(COMMANDS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"tokenexit: command '{name}' is unknown: choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    keep_buffers()
    shorten_waits()
    try:
        status = _status(COMMANDS[name], rest)
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
        return status
    except TokenExitError as error:
        print(f"tokenexit {name}: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        print(f"\ntokenexit {name}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone: nothing more to say, not even when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _status(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What the command returns, or how its parser ended after `--help`."""
    try:
        return command(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "adapt": adapt.adapt,
    "quickstart": quickstart.quickstart,
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "calibrate": calibrate.calibrate,
    "sweep": sweep.sweep,
    "predict": predict.predict,
    "report": report.report,
    "serve": serve.serve,
    "export": export.export,
    "cost": cost.cost,
    "gate": gate.gate,
    "policy": policy.policy,
    "convert": convert.convert,
    "data": data.data,
    "doctor": doctor.doctor,
    "completion": completion.completion,
}
