"""`tokenexit serve` from a shell: it starts, answers, ends on Ctrl-C, and says what cannot be."""

from __future__ import annotations

import builtins
import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")
pytest.importorskip("python_multipart", reason="needs python-multipart: pip install 'tokenexit[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'tokenexit[serve]'")

from tests.serving.live import Client, Reply, png, small_model
from tokenexit.cli import main
from tokenexit.serving.app import listen

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "street"
    small_model().save_pretrained(folder)
    return folder


def wrong(capsys: Captured, *arguments: object) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("tokenexit serve: ").strip()


def test_serve__answers_until_ctrl_c(saved: Path) -> None:
    command = [sys.executable, "-m", "tokenexit", "serve", str(saved), "--port", "0", "--device", "cpu"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell's children ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as run:
        try:
            assert run.stdout is not None
            assert run.stderr is not None
            said = run.stdout.readline()
            address = re.fullmatch(r"page and API: http://127\.0\.0\.1:(\d+)\n", said)
            assert address, said + run.stderr.read()
            client = Client(int(address[1]), {})
            assert client.get("/healthz").json["model"].endswith("/street")
            assert client.predict(("a.png", png()), format="png").status == 200
            connection = http.client.HTTPConnection("127.0.0.1", client.port)  # one that stays open does not hold it up
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            run.send_signal(signal.SIGINT)
            assert run.wait(30) == 130
            assert run.stderr.read() == "\ntokenexit serve: interrupted.\n"
            connection.close()
        finally:
            run.kill()


@contextmanager
def served(saved: Path, *options: str, slow: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """A server in a process of its own. slow: seconds that each block of its model takes longer."""
    program = f"""
import sys, time, torch
from tokenexit.engine.block import Block
real = Block.forward
def forward(self, x, packing, *rest):
    if packing.lengths[0] < 1000:  # not what is timed at the start
        time.sleep({slow})
    return real(self, x, packing, *rest)
Block.forward = forward
from tokenexit.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "serve", str(saved), "--port", "0", "--device", "cpu", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            address = re.search(r":(\d+)\n", run.stdout.readline())
            assert address, run.stderr and run.stderr.read()
            yield run, Client(int(address[1]), {})
        finally:
            run.kill()


@pytest.mark.parametrize(("drain", "status"), [("20", 200), ("0.5", 503)])
def test_serve__on_sigterm_finishes_or_refuses_and_ends_in_time(saved: Path, drain: str, status: int) -> None:
    """Four blocks of 0.5 s: they are finished in 20 s, and refused in 0.5 s."""
    with served(saved, "--drain", drain, slow=0.5) as (run, client):
        replies: list[Reply] = []
        under_way = threading.Thread(target=lambda: replies.append(client.predict(("a.png", png()))))
        under_way.start()
        until = time.monotonic() + 20
        while client.get("/healthz").json["running_seconds"] == 0:
            assert time.monotonic() < until
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        start = time.monotonic()
        while (health := client.get("/healthz")).status == 200:
            assert time.monotonic() < until
        assert (health.status, health.json["status"]) == (503, "ending")
        refused = client.predict(("b.png", png()))
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert refused.detail == "the server is ending: try again in a few seconds."
        under_way.join(20)
        assert run.wait(20) == -signal.SIGTERM
        assert time.monotonic() - start < 10
        assert replies[0].status == status
        assert status == 200 or replies[0].headers["retry-after"] == "5"
        assert run.stderr is not None
        assert run.stderr.read() == ""


def test_serve__ends_at_once_where_nothing_is_under_way(saved: Path) -> None:
    with served(saved, "--drain", "60") as (run, client):
        with socket.create_connection(("127.0.0.1", client.port)):  # a silent one does not count
            assert client.get("/healthz").status == 200
            run.send_signal(signal.SIGTERM)
            assert run.wait(20) == -signal.SIGTERM
        assert run.stderr is not None
        assert run.stderr.read() == ""


@pytest.mark.parametrize("host", ["127.0.0.2", "127.1", "localhost"])
def test_serve__every_loopback_address_is_local(saved: Path, host: str) -> None:
    with served(saved, "--host", host) as (_, client):
        where = "127.0.0.2" if host == "127.0.0.2" else "127.0.0.1"

        def status(**headers: str) -> int:
            wire = http.client.HTTPConnection(where, client.port, timeout=20)
            wire.request("GET", "/healthz", headers=headers)
            with closing(wire):
                return wire.getresponse().status

        assert status() == 200
        assert status(Host="evil.example") == 421
        assert status(Origin="http://evil.example") == 403


def test_serve__an_address_in_use_is_said(saved: Path, capsys: Captured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = wrong(capsys, saved, "--port", port)
    assert said.startswith(f"--host 127.0.0.1 --port {port} cannot be used (")
    assert "cannot be used" in wrong(capsys, saved, "--host", "no.such.host.invalid")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port 70000 is no port: give one from 0 to 65535."),
        (["--queue", "0"], "--queue 0 must be above 0."),
        (["--max-pixels", "-1"], "--max-pixels -1 must be above 0."),
        (["--timeout", "nan"], "--timeout nan must be a number of at most 2147483647."),
        (["--max-upload-mb", "0"], "--max-upload-mb 0 must be above 0."),
        (["--max-seconds", "0"], "--max-seconds 0 must be above 0."),
        (["--drain", "0"], "--drain 0 must be above 0."),
        (["--connections", "-3"], "--connections -3 must be above 0."),
        (["--silence", "0"], "--silence 0 must be above 0."),
        (["--wait-ms", "-1"], "--wait-ms -1 must be at least 0."),
        (["--workers", "2"], "unrecognized arguments: --workers 2: see tokenexit serve --help."),
    ],
)
def test_serve__impossible_options_are_named(arguments: list[str], words: str, saved: Path, capsys: Captured) -> None:
    assert wrong(capsys, saved, *arguments) == words


@pytest.mark.parametrize("token", ["", "open sesame", "schön", "a\nb"])
def test_serve__a_token_that_cannot_be_sent_is_refused(
    token: str, saved: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "the token must be one or more letters, digits or -._~+/=, got an empty one or other signs: choose another."
    assert wrong(capsys, saved, "--token", token) == words
    monkeypatch.setenv("TOKENEXIT_TOKEN", token)
    assert wrong(capsys, saved) == words


def test_serve__without_its_packages_says_what_to_install(
    saved: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "fastapi":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *rest)

    for module in [name for name in sys.modules if name.startswith(("fastapi", "tokenexit.serving"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    assert wrong(capsys, saved) == "serve needs the package fastapi: pip install 'tokenexit[serve]'."


def test_connections_send_their_last_packet_at_once() -> None:
    with (
        closing(listen("127.0.0.1", 0)) as listener,
        closing(socket.create_connection(listener.getsockname())),
        closing(listener.accept()[0]) as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
