"""`tokenexit serve`: the application around `Service`, its addresses and errors, and the server that runs it."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer

from tokenexit.errors import ConfigError, DataError
from tokenexit.reducers import Reducer
from tokenexit.report.html import report_html
from tokenexit.runtime.precision import Precision
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving import answers
from tokenexit.serving.batching import Expired, Overloaded
from tokenexit.serving.connections import Connections
from tokenexit.serving.ending import Server, server
from tokenexit.serving.guards import FULL, Ending, Guard, is_local, said
from tokenexit.serving.page import docs_html
from tokenexit.serving.service import Limits, Saturated, Service, TooExpensive
from tokenexit.serving.uploads import keep_in_memory
from tokenexit.version import __version__

__all__ = ["Limits", "create_app", "serve", "server_of"]


def create_app(
    model: ExitSegmenter,
    name: str = "model",
    *,
    limits: Limits | None = None,
    precision: Precision = "fp32",
    token: str | None = None,
    local_only: bool = True,
    by: Reducer | None = None,
) -> FastAPI:
    """Create the application for any ASGI server in one process; `server_of` limits connections, too, and drains.

    model: in evaluation mode. name: what the page calls it. token, local_only: see `Guard`. by: what merges tokens
    beside every method. Raises `ConfigError` for
    impossible limits and tokens, and `CheckpointError` for a calibration that does not belong to the model.
    """
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):  # an empty one must not mean "open to all"
        raise ConfigError(
            "the token must be one or more letters, digits or -._~+/=, got an empty one or other signs: choose another."
        )
    limits, ending = limits or Limits(), Ending()
    keep_in_memory(limits.upload_bytes)
    service = Service(model, name, limits, precision, ending, by)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # FastAPI's pages of documentation load scripts from elsewhere; ours is at /docs.
    app = FastAPI(title="tokenexit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.limits, app.state.ending = limits, ending
    _add_routes(app, service, token is not None)
    _add_errors(app)
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        token=token,
        local_only=local_only,
        body_bytes=limits.upload_bytes,
        body_seconds=limits.seconds,
        idle_seconds=min(limits.silence, limits.seconds),
        held_bytes=max(limits.held_bytes, limits.upload_bytes),
        full=service.full,
        ending=ending,
    )
    return app


def server_of(app: FastAPI, log_level: str = "warning") -> Server:
    """Make the server of an application of `create_app`, with its limits on connections and its time to end."""
    limits: Limits = app.state.limits
    connections = Connections(limits.connections, limits.per_address, limits.silence)
    return server(app, app.state.ending, connections, limits.drain, log_level)


def _add_routes(app: FastAPI, service: Service, with_token: bool) -> None:
    def add(path: str, endpoint: Callable[..., Any], method: str = "GET", **options: Any) -> None:
        app.add_api_route(path, endpoint, methods=[method], **options)

    asks: dict[str, Any] = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if with_token else {}
    images: dict[str, Any] = {"image/png": {}, "application/zip": {}}
    add("/", service.index, include_in_schema=False)
    add("/page.css", service.page_css, include_in_schema=False)
    add("/page.js", service.page_js, include_in_schema=False)
    add("/samples/{number}.png", service.sample, include_in_schema=False)
    add("/docs", lambda: HTMLResponse(docs_html(app.openapi())), include_in_schema=False)
    add("/plain", service.plain, "POST", include_in_schema=False)
    add("/healthz", service.healthz)
    add("/metrics", service.prometheus, response_class=Response, **asks)
    add("/model", service.about, **asks)
    add(
        "/predict",
        service.predict,
        "POST",
        response_model=list[answers.PredictionFigures] | dict[str, Any],
        responses={200: {"content": images}, **ERRORS},
        **asks,
    )
    add("/images", service.keep, "POST", responses=ERRORS, **asks)
    add(
        "/view",
        service.view,
        "POST",
        response_class=Response,
        responses={200: {"model": answers.View}, **ERRORS},
        **asks,
    )


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The token is missing or wrong."},
    413: {"description": "More bytes or work than the server takes, or than fit into memory."},
    422: {"description": "An option or an image that cannot be used; `detail` says why."},
    429: {"description": "Too many images are under way: try again after a second."},
    503: {"description": "No answer within the time limit, or the server is ending."},
}


def _add_errors(app: FastAPI) -> None:
    """Answer every error with one sentence, on a page for browsers; unexpected ones are written to the log."""

    def add(
        kind: type[Exception], status: int, sentence: Callable[[Any], str], retry: Callable[[Any], int | None] = _never
    ) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            if "text/html" in request.headers.get("accept", ""):  # a form that was sent without scripts
                return HTMLResponse(report_html("That did not work", [], sentence(error)), status)
            return said(status, sentence(error), retry=retry(error))

        app.add_exception_handler(kind, handler)

    add(ConfigError, 422, str)
    add(DataError, 422, str)
    add(RequestValidationError, 422, _invalid)
    add(TooExpensive, 413, str)
    add(Overloaded, 429, lambda error: FULL, lambda error: 1)
    add(Expired, 503, lambda error: "there was no answer within the time limit: try again.", lambda error: 1)
    add(Saturated, 503, str, lambda error: error.seconds)
    for kind in (MemoryError, torch.OutOfMemoryError):
        add(kind, 413, lambda error: "the images do not fit into memory: send fewer or smaller ones.")
    add(Exception, 500, lambda error: "an unexpected error occurred on the server: see its log.")


def _never(error: Exception) -> None:
    """Return no time after which to ask again."""


def _invalid(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{first['loc'][-1]}: {first['msg']}."


def serve(
    model: ExitSegmenter,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    precision: Precision = "fp32",
    token: str | None = None,
    by: Reducer | None = None,
) -> None:
    """Serve until interrupted. Raises `ConfigError` for an address that cannot be used.

    by: what merges tokens beside every method.
    """
    listener = listen(host, port)
    address, port = listener.getsockname()[:2]
    local = is_local(address)  # of the address, as a name may stand for any
    closed = local and token is None
    app = create_app(model, name, limits=limits, precision=precision, token=token, local_only=closed, by=by)
    if not local and token is None:
        print(
            "tokenexit serve: everybody who reaches this address may use it; set a token to restrict access.",
            file=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    print(f"page and API: http://{shown}:{port}", flush=True)
    server_of(app).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Open the socket for connections. Raises `ConfigError` for an address that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--host {host} --port {port} cannot be used ({reason}): choose another address.") from None
    # Connections inherit it. Without, an answer's last packet waits 40 ms for a client that acknowledges late.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
