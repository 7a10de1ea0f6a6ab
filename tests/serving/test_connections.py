"""Connections that say nothing hold nothing, and a health check always gets through."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")
pytest.importorskip("python_multipart", reason="needs python-multipart: pip install 'tokenexit[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'tokenexit[serve]'")

from tests.serving.live import Client, png, running, small_model
from tests.serving.test_app import settled
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.app import Limits
from tokenexit.serving.connections import GRACE, SPARE, _network

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
UPLOAD = HEAD + b"Content-Length: 1000\r\n\r\n--x\r\n"
"""A request whose body does not go on: it is at work until the upload's time is over."""


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return small_model()


@pytest.fixture
def wires() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(wires: ExitStack, client: Client, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    wire = socket.create_connection(("127.0.0.1", client.port), timeout=20, source_address=(source, 0))
    wires.enter_context(wire)
    wire.sendall(sent)
    return wire


def ended(wire: socket.socket) -> bool:
    """Whether the server ends a connection, within 20 seconds, without a word."""
    try:
        return wire.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTT"])
def test_a_connection_without_a_whole_head__is_ended(model: ExitSegmenter, wires: ExitStack, sent: bytes) -> None:
    with running(model, limits=Limits(silence=0.3)) as client:
        assert ended(connect(wires, client, sent))


def test_a_head_that_comes_in_drops__does_not_last_longer(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(silence=0.5)) as client:
        wire = connect(wires, client)
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < start + 20:
                wire.sendall(b"G")
                time.sleep(0.05)


def test_a_connection_that_falls_silent_after_its_answer__is_ended(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(silence=0.3)) as client:
        wire = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        wires.callback(wire.close)
        for _ in range(2):
            wire.request("GET", "/healthz")
            assert wire.getresponse().read()
        wire.sock.sendall(b"GET /healthz HT")  # the second head ends the pause, and does not come to its end
        assert ended(wire.sock)


def test_an_upload_that_pauses__is_ended(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(silence=0.3)) as client:
        wire, sentence = connect(wires, client, UPLOAD), b"the upload took more than 30 seconds, or paused for 0.3."
        reply = b""
        while sentence not in reply and (part := wire.recv(4096)):  # head and body may come one after the other
            reply += part
    assert reply.startswith(b"HTTP/1.1 408")
    assert sentence in reply


def test_an_answer_that_nobody_takes__is_ended(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(silence=0.3)) as client:
        wire = socket.socket()
        wires.enter_context(wire)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect(("127.0.0.1", client.port))
        whole = 400 * len(client.get("/page.js").body)
        wire.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        time.sleep(1.5)  # in which nothing is taken
        taken = 0
        with suppress(ConnectionResetError):
            while part := wire.recv(1 << 20):
                taken += len(part)
        assert taken < whole


def test_silent_connections__make_room_for_others(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(connections=8, silence=60.0)) as client:
        silent = [connect(wires, client, sent) for sent in [b"", b"GET / HTTP/1.1\r\n"] * 4]
        time.sleep(3 * GRACE)  # the server takes connections up later than clients open them
        assert client.predict(("a.png", png())).status == 200
        assert ended(silent[0])  # the oldest had to go


def test_connections_of_one_address__leave_room_for_others(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(per_address=4, silence=20.0)) as client:
        for _ in range(4):
            connect(wires, client, UPLOAD, "127.0.0.9")
        wire = connect(wires, client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "127.0.0.9")
        answer = b"".join(iter(lambda: wire.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert b"too many connections are open" in answer
        assert client.predict(("a.png", png())).status == 200


def test_a_health_check__has_a_place_where_all_others_are_at_work(model: ExitSegmenter, wires: ExitStack) -> None:
    with running(model, limits=Limits(connections=4, silence=20.0)) as client:
        for _ in range(4):
            connect(wires, client, UPLOAD)
        for _ in range(SPARE):  # nor do silent ones take the places that are kept
            connect(wires, client)
        time.sleep(3 * GRACE)  # the server takes connections up later than clients open them
        assert client.get("/healthz").status == 200
        refused = client.get("/model")
        assert (refused.status, refused.headers.get("connection")) == (503, "close")
        wires.close()
        settled(lambda: client.get("/model").status == 200)


@pytest.mark.parametrize(
    ("host", "network"),
    [("10.0.0.7", "10.0.0.7"), ("2001:db8::1", "2001:db8::/64"), ("fe80::1%eth0", "fe80::/64"), ("", "")],
)
def test_an_address__belongs_to_its_network(host: str, network: str) -> None:
    assert _network(host) == network
