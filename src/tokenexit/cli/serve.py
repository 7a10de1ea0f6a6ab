"""The command serve."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tokenexit.cli.options import add_machine_options, add_window_options, command_parser, machine_of, set_windows
from tokenexit.errors import ConfigError


def serve(arguments: list[str]) -> int:
    parser = command_parser(
        "serve", "A page to try a model on, and an HTTP API: /predict, /healthz, /metrics, /openapi.json."
    )
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free")
    parser.add_argument("--token", help="that clients must send; better in the environment, as TOKENEXIT_TOKEN")
    limits = parser.add_argument_group("limits; what goes beyond is refused in one sentence")
    limits.add_argument("--max-upload-mb", type=int, default=20, help="of a request")
    limits.add_argument("--max-pixels", type=int, default=2048 * 1024, help="of an image; the page scales down to it")
    limits.add_argument("--max-pictures", type=int, default=16, help="of a request")
    limits.add_argument("--queue", type=int, default=64, help="images under way at once")
    limits.add_argument("--timeout", type=float, default=30.0, help="seconds for an upload, and for its answer")
    limits.add_argument(
        "--max-seconds", type=float, help="of the model for a request, as this machine is measured; half of --timeout"
    )
    limits.add_argument("--drain", type=float, default=10.0, help="seconds for what is under way when the server ends")
    limits.add_argument("--connections", type=int, default=512, help="open at once; some more for health checks")
    limits.add_argument("--connections-per-address", type=int, default=128, help="open at once of one client")
    limits.add_argument("--silence", type=float, default=10.0, help="seconds in which a connection sends nothing")
    limits.add_argument("--wait-ms", type=float, default=4.0, help="how long an image waits to share a batch")
    add_window_options(parser)
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    _check(options)
    try:
        from tokenexit.serving.app import Limits
        from tokenexit.serving.app import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs the package {error.name}: pip install 'tokenexit[serve]'.") from None
    from tokenexit.segmenter import ExitSegmenter

    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
    set_windows(model, options)
    run(
        model,
        "/".join(Path(os.path.abspath(options.model)).parts[-2:]),
        host=options.host,
        port=options.port,
        limits=Limits(
            upload_bytes=options.max_upload_mb * 1_000_000,
            pixels=options.max_pixels,
            images=options.max_pictures,
            slots=options.queue,
            seconds=options.timeout,
            work=options.timeout / 2 if options.max_seconds is None else options.max_seconds,
            drain=options.drain,
            connections=options.connections,
            per_address=options.connections_per_address,
            silence=options.silence,
            wait=options.wait_ms / 1e3,
        ),
        precision=options.precision,
        token=options.token if options.token is not None else os.environ.get("TOKENEXIT_TOKEN"),
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port} is no port: give one from 0 to 65535.")
    bounds = ("max_upload_mb", "max_pixels", "max_pictures", "queue", "timeout", "max_seconds")
    for name in (*bounds, "drain", "connections", "connections_per_address", "silence"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be above 0.")
    if not 0 <= options.wait_ms < float("inf"):
        raise ConfigError(f"--wait-ms {options.wait_ms:g} must be at least 0.")
