"""The command `serve`: a page to try a model on, and an HTTP API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenexit.cli.chosen_methods import reducers_of
from tokenexit.cli.method_options import add_merge_option
from tokenexit.cli.options import add_model_argument, add_running_options, command_parser, open_model
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from tokenexit.serving.service import Limits


def serve(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    try:
        from tokenexit.serving.app import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs the package {error.name}: pip install 'tokenexit[serve]'.") from None

    (by,) = reducers_of(options.merge)
    run(
        open_model(options),
        "/".join(Path(os.path.abspath(options.model)).parts[-2:]),
        host=options.host,
        port=options.port,
        limits=_limits(options),
        precision=options.precision,
        token=options.token if options.token is not None else os.environ.get("TOKENEXIT_TOKEN"),
        by=by,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "A page to try a model on, and an HTTP API: /predict, /healthz, /metrics, /openapi.json. What runs if a "
        "request names no method is the calibrated one, else dense.",
    )
    add_model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one")
    parser.add_argument("--token", help="token that clients must send; better in the environment, as TOKENEXIT_TOKEN")
    add_merge_option(parser)
    _add_limits(parser)
    add_running_options(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits", "Requests beyond them are refused in one sentence.")
    limits.add_argument("--max-upload-mb", type=int, default=20, help="megabytes of a request")
    limits.add_argument("--max-pixels", type=int, default=2048 * 1024, help="pixels of an image; the page scales down")
    limits.add_argument("--max-pictures", type=int, default=16, help="images of a request")
    limits.add_argument("--queue", type=int, default=64, help="images under way at once")
    limits.add_argument("--timeout", type=float, default=30.0, help="seconds for an upload, and for its answer")
    limits.add_argument(
        "--max-seconds",
        type=float,
        help="seconds of the model for a request, as measured on this machine; half of --timeout if not given",
    )
    limits.add_argument("--drain", type=float, default=10.0, help="seconds for what is under way when the server ends")
    limits.add_argument("--connections", type=int, default=512, help="open connections; some more for health checks")
    limits.add_argument("--connections-per-address", type=int, default=128, help="open connections of one client")
    limits.add_argument("--silence", type=float, default=10.0, help="seconds in which a connection may send nothing")
    limits.add_argument("--wait-ms", type=float, default=4.0, help="milliseconds that an image waits to share a batch")


def _limits(options: argparse.Namespace) -> Limits:
    from tokenexit.serving.service import Limits

    return Limits(
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
    )


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
