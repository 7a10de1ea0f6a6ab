"""Access control and limits before the endpoints: who may ask, how much they may send, and how long it may take."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
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

OPEN = ("/", "/page.css", "/page.js", "/healthz", "/openapi.json", "/docs")
"""Paths without a token, beside the drawn samples: they reveal only the model's name, and nothing of images."""
FULL = "too many images are under way: try again in a second."
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Ending:
    """The state of the shutdown. begun: no new work is taken. over: running requests are refused."""

    def __init__(self) -> None:
        self.begun = False
        self.over = asyncio.Event()
        self.under_way = 0


class Guard:
    """Middleware that checks requests before the application.

    token: what clients must send as `Authorization: Bearer`; None asks for nothing. local_only: answer under local
    host names alone, and to no page from elsewhere, so that what a browser visits cannot use the server (DNS
    rebinding, foreign forms). body_bytes, body_seconds: limits on what is sent; idle_seconds: on its pauses.
    held_bytes: of all uploads under way. full: whether there is no room for another image; nothing is read then.

    A request ends with its client, and what it started with it.
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
        idle_seconds: float,
        held_bytes: int,
        full: Callable[[], bool],
        ending: Ending,
    ) -> None:
        self._app, self._metrics, self._full, self._ending = app, metrics, full, ending
        self._token, self._local_only = token, local_only
        self._body_bytes, self._body_seconds, self._idle_seconds = body_bytes, body_seconds, idle_seconds
        self._held, self._held_bytes = 0, held_bytes
        metrics.gauges["tokenexit_upload_bytes"] = ("Bytes of uploads under way.", lambda: self._held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, started = time.perf_counter(), 500, False

        async def sending(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        body = _Body(self, receive)
        app = self._refusal(scope, dict(scope["headers"])) or self._app
        self._ending.under_way += 1
        work = asyncio.ensure_future(app(scope, body.receive, sending))
        left = asyncio.ensure_future(body.left())
        over = asyncio.ensure_future(self._ending.over.wait())
        try:
            await asyncio.wait((work, left, over), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                work.cancel()
                await asyncio.wait((work,))
                if not left.done() and not started:
                    await self._ends()(scope, receive, sending)
                elif not started:
                    status = 499  # the client left; a status of logs only
        finally:
            for task in (work, left, over):
                task.cancel()
            self._held -= body.received
            self._ending.under_way -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.add("tokenexit_requests_total", route=route, status=str(status))
            self._metrics.observe("tokenexit_request_seconds", time.perf_counter() - start, route=route)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> App | None:
        """Return the answer in place of the application, if the request is refused."""
        refusal: App | None = None
        path = scope["path"]
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        length = headers.get(b"content-length", b"0")
        if self._local_only and not is_local(re.sub(r":\d*$", "", host)):
            refusal = said(
                421, "this server answers under local names only: open it as http://localhost, with its port."
            )
        elif self._local_only and origin and origin.partition("://")[2] != host:
            refusal = said(403, "this server answers its own page and programs, not pages from elsewhere.")
        elif not self._may_ask(path, headers):
            refusal = said(401, "send this server's token as 'Authorization: Bearer TOKEN'.", bearer=True)
        elif not length.isdigit() or int(length) > self._body_bytes:
            refusal = said(413, self._too_large)
        elif self._ending.begun and path != "/healthz":
            refusal = self._ends()
        elif scope["method"] == "POST" and self._full():
            refusal = said(429, FULL, retry=1)
        return refusal

    def _ends(self) -> App:
        return said(503, "the server is ending: try again in a few seconds.", retry=5)

    def _may_ask(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._token is None or path in OPEN or path.startswith("/samples/"):
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(b" "), self._token.encode())

    def take(self, count: int) -> None:
        """Count more bytes of uploads in memory. Raises status 429 where they would be too many."""
        self._held += count
        if self._held > self._held_bytes:
            raise HTTPException(429, FULL, {"Retry-After": "1"})

    @property
    def _too_large(self) -> str:
        return f"the upload is larger than {self._body_bytes} bytes: send fewer or smaller images."


class _Body:
    """The body of a request, with limits on size and time. received: its bytes so far."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._until = time.monotonic() + guard._body_seconds
        self._complete = asyncio.Event()
        self.received = 0

    async def receive(self) -> Message:
        """Receive the next part of the body for the application."""
        guard = self._guard
        if self._complete.is_set():  # what follows is only told when the client leaves, and to `left`
            await asyncio.Event().wait()
        seconds = min(self._until - time.monotonic(), guard._idle_seconds)
        try:
            message = await asyncio.wait_for(self._receive(), seconds)
        except TimeoutError:
            raise HTTPException(
                408,
                f"the upload took more than {guard._body_seconds:g} seconds, or paused for {guard._idle_seconds:g}.",
            ) from None
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._complete.set()
        count = len(message.get("body", b""))
        self.received += count
        guard.take(count)
        if self.received > guard._body_bytes:
            raise HTTPException(413, guard._too_large)
        return message

    async def left(self) -> None:
        """Wait until the client has left, if its request was read."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def is_local(host: str) -> bool:
    """Return whether a host is this machine: `localhost`, or an address of 127.0.0.0/8 or ::1, also in brackets."""
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def said(status: int, sentence: str, bearer: bool = False, retry: int | None = None) -> JSONResponse:
    """Make an answer that says in one sentence what is wrong. retry: seconds after which to ask again."""
    headers = {"WWW-Authenticate": "Bearer"} if bearer else None if retry is None else {"Retry-After": str(retry)}
    return JSONResponse({"detail": sentence}, status, headers)
