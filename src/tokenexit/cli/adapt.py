"""The command `adapt`: a cheaper model from a trained dense one and a folder of photos."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenexit.cli.convert import KINDS
from tokenexit.cli.options import (
    add_dataset_options,
    add_keep_option,
    add_machine_options,
    check_counts,
    command_parser,
    dataset_of,
    head_module,
    machine_of,
    share,
)
from tokenexit.cli.progress import progress_bars
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from tokenexit.adaptation.adapt import Adaptation
    from tokenexit.adaptation.options import Options
    from tokenexit.data.base import SegmentationDataset
    from tokenexit.segmenter import ExitSegmenter

TARGETS = ("budget", "latency_ms", "max_disagreement", "confidence")
LARGEST_SIZE = 4.0
"""As in `methods/resized.py`, which loads torch."""
DOES_NOT_PAY = 3
"""Exit status where the model was made and does not save what was wished."""


def adapt(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    from tokenexit.adaptation.adapt import adapt_model, check_out
    from tokenexit.adaptation.page import write_page
    from tokenexit.calibration.targets import target_of

    target = target_of({name: getattr(options, name) for name in TARGETS})
    check_out(options.out, options.source)
    model = _open(options)
    found = adapt_model(
        model,
        options.images,
        target,
        options.out,
        _options(options),
        labelled=_labelled(options),
        about={"photos": ", ".join(map(str, options.images))},
        say=lambda line: print(line, flush=True),
        progress=progress_bars(),
    )
    report = write_page(found, options.out / "report.html", command=f"tokenexit adapt {' '.join(arguments)}")
    print(f"model: {options.out}\nreport: {report}")
    return _tell(found)


def _tell(found: Adaptation) -> int:
    """Print the last lines, and return the exit status."""
    if found.shortfall:
        print(f"tokenexit adapt: this is the best that can be had: {found.shortfall}.", file=sys.stderr)
    print(found.measured.sentence())
    return DOES_NOT_PAY if found.shortfall else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("adapt", "Make a trained dense segmenter cheaper, from photos without labels.")
    parser.add_argument("source", help="model folder, weight file that convert reads, or hf-hub:OWNER/NAME")
    parser.add_argument("--images", nargs="+", type=Path, required=True, metavar="IMAGE|DIR", help="photos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cheaper model and its report")
    target = parser.add_argument_group("target, one of these").add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", type=share, help="largest mean multiply-adds, as a share of dense: 0.5, or 50%%")
    target.add_argument("--latency-ms", type=float, help="largest mean milliseconds of an image, on this machine")
    target.add_argument("--max-disagreement", type=share, help="largest share of pixels unlike the dense model")
    parser.add_argument("--confidence", type=float, default=0.9, help="confidence of the bound --max-disagreement")
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--exits",
        nargs="+",
        default=["auto"],
        metavar="BLOCKS",
        help="numbers of blocks before the exits, auto or none",
    )
    plan.add_argument("--size", type=float, help="factor on the image's sides; chosen if not given")
    plan.add_argument("--depth", type=int, help="number of blocks after which everybody stops; chosen if not given")
    plan.add_argument(
        "--exit-head", choices=("fcn", "linear", "dinov2_linear"), default="fcn", help="kind of exit heads"
    )
    add_keep_option(parser)
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="steps of the whole model, exits on")
    parser.add_argument("--limit", type=int, default=400, help="largest number of photos, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    _add_source_options(parser)
    add_dataset_options(parser, "val", "labelled images to choose the plan by, if there are any")
    add_machine_options(parser)
    return parser


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source, if it is of another library")
    group.add_argument("--kind", choices=KINDS, default="auto", help="source of the weights; auto: told by their names")
    group.add_argument("--backbone", help="file of backbone weights, as for tokenexit convert")
    group.add_argument(
        "--head-module", metavar="PACKAGE.MODULE:NAME", help="class of the decode head, for a head of your own"
    )


def _check(options: argparse.Namespace) -> None:
    """Refuse, before torch is loaded, what does not go together."""
    check_counts(options, "limit", "depth")
    if options.finetune and options.max_disagreement is not None:
        raise ConfigError("--finetune goes with --budget: a bound is tested before it; leave one out.")
    if options.finetune < 0:
        raise ConfigError(f"--finetune must be at least 0, got {options.finetune}: it is a number of steps.")
    if options.size is not None and not 0.0 < options.size <= LARGEST_SIZE:
        raise ConfigError(
            f"--size must be above 0 and at most {LARGEST_SIZE:g}, got {options.size:g}: it is a factor on the sides."
        )
    if options.data is None and options.data_root is not None:
        raise ConfigError("--data-root needs --data: name the dataset, such as folder.")
    for target in ("budget", "max_disagreement"):
        value = getattr(options, target)
        if value is not None and not 0.0 < value <= 1.0:
            name = target.replace("_", "-")
            raise ConfigError(f"--{name} must be a share between 0 and 1, got {value:g}: write 0.5, or 50%.")
    if options.latency_ms is not None and not 0.0 < options.latency_ms < math.inf:
        raise ConfigError(f"--latency-ms must be above 0, got {options.latency_ms:g}: milliseconds of an image.")
    if not 0.0 < options.confidence < 1.0:
        raise ConfigError(f"--confidence must be between 0 and 1, got {options.confidence:g}: 0.9 is usual.")
    if options.max_disagreement is None and options.confidence != 0.9:
        raise ConfigError("--confidence belongs to --max-disagreement, and a budget has none: leave it out.")
    _exits(options.exits)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file: name a folder.")
    for path in options.images:
        if not path.exists() and not str(path).startswith("@"):  # @ is a list
            raise ConfigError(f"--images {path} does not exist: name photos, or folders of them.")


def _exits(words: list[str]) -> tuple[int, ...] | None:
    """`["auto"]` is None, `["none"]` no exits, else numbers of blocks."""
    if words in (["auto"], ["none"]):
        return None if words == ["auto"] else ()
    try:
        return tuple(sorted({int(word) for word in words}))
    except ValueError:
        raise ConfigError(f"--exits must be auto, none, or numbers of blocks, got {' '.join(words)}.") from None


def _open(options: argparse.Namespace) -> ExitSegmenter:
    from tokenexit.conversion.opening import open_source

    model = open_source(
        options.source, kind=options.kind, backbone=options.backbone, head=head_module(options.head_module)
    )
    return model.to(machine_of(options))


def _options(options: argparse.Namespace) -> Options:
    from tokenexit.adaptation.options import Options
    from tokenexit.calibration.plans import Held

    return Options(
        held=Held(options.size, options.depth, _exits(options.exits)),
        exit_head=options.exit_head,
        average=options.keep,
        limit=options.limit,
        seed=options.seed,
        precision=options.precision,
        finetune=options.finetune,
    )


def _labelled(options: argparse.Namespace) -> SegmentationDataset | None:
    return None if options.data is None else dataset_of(options)[1]
