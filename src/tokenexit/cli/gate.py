"""The command `gate`: which exits pay on this machine, and why."""

from __future__ import annotations

from tokenexit.cli.chosen_methods import asked_methods, chosen_methods
from tokenexit.cli.method_options import add_method_choice
from tokenexit.cli.options import (
    add_image_size,
    add_machine_options,
    add_model_argument,
    command_parser,
    image_size,
    open_model,
)


def gate(arguments: list[str]) -> int:
    parser = command_parser("gate", "Which exits of a model pay on this machine at a size, and why; measured once.")
    add_model_argument(parser)
    add_image_size(parser)
    add_method_choice(parser, "calibrated one")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    size = image_size(options)
    asked = asked_methods(options.method, options)
    from tokenexit.calibration.gating import gate as run

    model = open_model(options)
    (method,) = chosen_methods(model, asked, "dense has no exits to close")
    model.check(method)
    found = run(model, method, model.backbone.patch_embed.grid(*size), options.precision)
    for reason in found.reasons:
        print(reason)
    print(
        f"expected for the blocks and open exits: {found.expected_ms:.1f} ms; with all exits open {found.open_ms:.1f}, "
        f"with none {found.dense_ms:.1f}"
    )
    return 0
