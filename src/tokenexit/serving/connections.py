"""Limits on connections: their number, how long they may be silent, and a reserve for health checks.

Whoever sends nothing holds nothing: where the limit is reached, a new connection replaces the one that has been
silent longest. Where all are at work, a few more are admitted, for `/healthz` only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenexit.serving.guards import App, Message, Receive, Scope, Send, said

SPARE = 8
"""Connections beyond the limit that get answers to `/healthz`."""
GRACE = 0.5
"""Seconds in which a new connection is not taken for a silent one: what it sends may be on its way."""


class Connections:
    """The open connections of a server and their limits.

    most: open at once. per_address: of one client; an IPv6 client is its /64 network. seconds: how long one may take to
    send a request's head, or to take the next bytes of its answer.
    """

    def __init__(self, most: int, per_address: int, seconds: float) -> None:
        self.most, self.per_address, self.seconds = most, per_address, seconds
        self._open: set[Connection] = set()
        self._spare: set[Connection] = set()

    def admit(self, new: Connection) -> bool:
        """Return whether a connection may stay: in place of a silent one, or a few for health checks only."""
        own = [connection for connection in self._open if connection.address == new.address]
        crowded = own if len(own) >= self.per_address else self._open if len(self._open) >= self.most else []
        if not crowded or _end_silent(crowded):
            self._open.add(new)
            return True
        if len(self._spare) >= SPARE and not _end_silent(self._spare):
            return False
        new.app = _health_only(new.app)
        self._spare.add(new)
        return True

    def discard(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._spare.discard(connection)


def _end_silent(connections: Iterable[Connection]) -> bool:
    """End the connection that has been silent longest; False if all are at work."""
    oldest = min((c for c in connections if c.silent), key=lambda c: c.silent_since, default=None)
    if oldest is None or time.monotonic() - oldest.silent_since < GRACE:
        return False
    oldest.end()
    return True


class Connection(H11Protocol):
    """uvicorn's connection with time limits: on a request's head, on its pauses, and on unread answers."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self.address = ""
        self.silent_since = time.monotonic()

    @property
    def silent(self) -> bool:
        """Whether none of its requests is being received or answered."""
        return self.cycle is None or self.cycle.response_complete

    def end(self) -> None:
        self._all.discard(self)  # at once: its place is wanted
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        if self._all.admit(self):
            self._wait(None)
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.silent:  # a head that is not whole yet keeps the clock that runs
            self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.silent:
            self.silent_since = time.monotonic()
            self._wait(self.transport.get_write_buffer_size())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.silent:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._all.discard(self)
        super().connection_lost(exc)

    def _wait(self, unsent: int | None) -> None:
        """Start the time limit. unsent: bytes of an answer that the client has not taken yet."""
        self._stop()
        self._timer = self.loop.call_later(self._all.seconds, self._look, unsent)

    def _look(self, before: int | None) -> None:
        unsent = self.transport.get_write_buffer_size()
        if before is not None and 0 < unsent < before:  # slow, but it takes its answer
            self._wait(unsent)
        else:
            self.transport.abort()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _network(host: str) -> str:
    """Return the client of an address: an IPv4 address, or the /64 network of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # of a Unix socket
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _health_only(app: App) -> App:
    """Make the application for a connection beyond the limit: it answers `/healthz` and refuses the rest, once."""
    refusal = said(503, "too many connections are open: try again in a second.", retry=1)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await (app if scope.get("path") == "/healthz" else refusal)(scope, receive, last)

    return answer
