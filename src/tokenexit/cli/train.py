"""The command `train`: trains or fine-tunes a model as a YAML says."""

from __future__ import annotations

import os
from typing import Any

from tokenexit.cli.chosen_methods import given_method_options, method_specs
from tokenexit.cli.completion import complete_values
from tokenexit.cli.cost import BACKBONES, HEADS
from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import add_threads_option, asked_by_shell, check_numbers, start_threads
from tokenexit.errors import ConfigError


def train(arguments: list[str]) -> int:
    from tokenexit.data.registry import check_name
    from tokenexit.training.config import check_run
    from tokenexit.training.parsing import parse_train

    def add_options(parser: Any) -> None:
        parser.add_argument(
            "--method", choices=method_names(), default=None, help="method to train with alone, in place of methods"
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="plan of the run, checked and printed; nothing is done"
        )
        add_threads_option(parser)
        add_method_options(parser)
        if asked_by_shell():
            complete_values(parser, _known_words())

    config, options = parse_train(arguments, add_options)
    check_numbers("threads", options.threads)
    check_run(config, int(os.environ.get("WORLD_SIZE", "1")))  # what shows before torch is loaded
    check_name(config.data.name)
    if options.method is None and given_method_options(options):
        raise ConfigError("options of a method need --method: name it, or write them to methods in the YAML.")
    if options.method is not None:
        config.methods = method_specs([options.method], options)
    if options.dry_run:
        from tokenexit.training.plan import plan

        print(plan(config))
        return 0
    from tokenexit.training.loop import train as run

    start_threads(options)
    run(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"model: {config.out}")
    return 0


def _known_words() -> dict[str, tuple[str, ...]]:
    """What keys take that no type says, for a shell."""
    from tokenexit.data.registry import DATASETS
    from tokenexit.training.parsing import shipped_recipes

    heads = dict.fromkeys(("model.exit_head", "model.decode_head"), HEADS)
    return {"config": tuple(shipped_recipes()), "data.name": tuple(DATASETS), "model.backbone": BACKBONES, **heads}
