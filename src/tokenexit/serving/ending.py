"""Shutdown of the server: no new work, and running requests are finished or refused within a time limit."""

from __future__ import annotations

import asyncio
import socket
import time
from functools import partial

import uvicorn

from tokenexit.serving.connections import Connection, Connections
from tokenexit.serving.guards import Ending

FLUSH = 0.5
"""Seconds for sending the last answers."""


class Server(uvicorn.Server):
    """A server that drains before it stops listening, so that requests meanwhile get an answer.

    ending: what the application knows of it. seconds: for the requests that are under way; then they are refused.
    """

    def __init__(self, config: uvicorn.Config, ending: Ending, seconds: float) -> None:
        super().__init__(config)
        self._ending, self._seconds = ending, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending.begun = True
        await self._idle(self._seconds)
        self._ending.over.set()
        await self._idle(FLUSH)
        loop = asyncio.get_running_loop()
        for connection in list(self.server_state.connections):  # whoever does not take an answer holds nothing up
            loop.call_later(FLUSH, connection.transport.abort)
        await super().shutdown(sockets)

    async def _idle(self, seconds: float) -> None:
        """Wait until no request is running, the seconds are over, or somebody interrupts twice."""
        until = time.monotonic() + seconds
        while self._ending.under_way and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.02)


def server(app: object, ending: Ending, connections: Connections, seconds: float, log_level: str = "warning") -> Server:
    """Make the server of an application with these limits. seconds: see `Server`."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(Connection, connections),  # type: ignore[arg-type]
        log_level=log_level,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, ending, seconds)
