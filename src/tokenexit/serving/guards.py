"""What stands before the endpoints: who may ask, how much they may send, and how long they may take to send it."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tokenexit.serving.metrics import Metrics

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/page.css", "/page.js", "/healthz", "/openapi.json")
"""Need no token, nor do the drawn samples: none says more of the model than its name, or anything of pictures."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """Wraps the application.

    token: what clients must send as `Authorization: Bearer`; None asks for nothing. local_only: answer under local
    host names alone, and to no page from elsewhere, so that what a browser visits cannot use the server (DNS
    rebinding, foreign forms). body_bytes, body_seconds: limits on what is sent.
    """

    def __init__(
        self,
        app: App,
        *,
        metrics: Metrics,
        token: str | None,
        local_only: bool,
        body_bytes: int,
        body_seconds: float,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._token, self._local_only = token, local_only
        self._body_bytes, self._body_seconds = body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            app = self._refusal(scope["path"], dict(scope["headers"])) or self._app
            await app(scope, self._limited(receive), sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.add("tokenexit_requests_total", route=route, status=str(status))
            self._metrics.observe("tokenexit_request_seconds", time.perf_counter() - start, route=route)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> App | None:
        """What answers in place of the application."""
        refusal: App | None = None
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        length = headers.get(b"content-length", b"0")
        if self._local_only and re.sub(r":\d*$", "", host) not in LOCAL_NAMES:
            refusal = said(
                421, "this server answers under local names only: open it as http://localhost, with its port."
            )
        elif self._local_only and origin and origin.partition("://")[2] != host:
            refusal = said(403, "this server answers its own page and programs, not pages from elsewhere.")
        elif not self._may_ask(path, headers):
            refusal = said(401, "send this server's token as 'Authorization: Bearer TOKEN'.", bearer=True)
        elif not length.isdigit() or int(length) > self._body_bytes:
            refusal = said(413, self._too_large)
        return refusal

    def _may_ask(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._token is None or path in OPEN or path.startswith("/samples/"):
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self._token}".encode())

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that ends a body which is too large or too slow."""
        until, received, complete = time.monotonic() + self._body_seconds, 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what follows is only told when the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the upload took more than {self._body_seconds:g} seconds.") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited

    @property
    def _too_large(self) -> str:
        return f"the upload is larger than {self._body_bytes} bytes: send fewer or smaller pictures."


def said(status: int, sentence: str, bearer: bool = False, retry: bool = False) -> JSONResponse:
    """An answer that says in one sentence what is wrong."""
    headers = {"WWW-Authenticate": "Bearer"} if bearer else {"Retry-After": "1"} if retry else None
    return JSONResponse({"detail": sentence}, status, headers)
