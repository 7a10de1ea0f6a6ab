"""The command `gate`: which exits pay on this machine, and why."""

from __future__ import annotations

from pathlib import Path

from tokenexit.cli.cost import image_size
from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import add_machine_options, asked_methods, chosen_methods, command_parser, machine_of


def gate(arguments: list[str]) -> int:
    parser = command_parser("gate", "Which exits of a model pay on this machine at a size, and why; measured once.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="one side, or height and width")
    parser.add_argument("--method", choices=method_names(), help="the calibrated one if not given")
    add_method_options(parser)
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    size = image_size(options.image_size)
    from tokenexit.calibration.gating import gate as run
    from tokenexit.segmenter import ExitSegmenter

    asked = asked_methods(options.method and [options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
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
