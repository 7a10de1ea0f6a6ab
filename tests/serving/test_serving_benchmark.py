"""The load test counts what is answered, refused and unlike, and sends no request twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")
pytest.importorskip("python_multipart", reason="needs python-multipart: pip install 'tokenexit[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'tokenexit[serve]'")

from benchmarks.serving import MARK, Load, Server, body, load, main, quantile, soak, to_table

from tests.serving.live import Client, running, small_model

FORMS = [body(n, (32, 48), {"method": "dtop", "format": "png"}) for n in range(3)]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running(small_model()) as client:
        yield client


def server(client: Client) -> Server:
    return Server(psutil.Process(), client.port)


def masks(client: Client) -> list[bytes]:
    kind = {"Content-Type": f"multipart/form-data; boundary={MARK}"}
    return [client.send("POST", "/predict", form, kind).body for form in FORMS]


@pytest.mark.parametrize("clients", [1, 4])
def test_load__every_request_is_sent_once_and_answered(client: Client, clients: int) -> None:
    wanted = masks(client)
    before = server(client).figure("tokenexit_batch_pictures_sum")
    found = load(server(client), FORMS, wanted, clients, 10)
    assert (found.answered, found.different, found.busy, len(found.times)) == (10, 0, 0, 10)
    assert server(client).figure("tokenexit_batch_pictures_sum") == before + 10
    assert 1 <= found.batch <= clients
    assert 0 < found.p50 <= found.p99 == max(found.times)


def test_load__answers_unlike_those_that_came_alone_are_counted(client: Client) -> None:
    wanted = masks(client)
    found = load(server(client), FORMS, [wanted[0], b"another", wanted[2]], 2, 9)
    assert (found.answered, found.different) == (9, 3)


def test_soak__tells_memory_after_each_tenth(client: Client) -> None:
    rows = soak(server(client), FORMS, masks(client), 20)
    assert [row["requests"] for row in rows] == list(range(0, 21, 2))
    assert all(row["answered"] == 2 for row in rows[1:])
    assert all(row["mib"] > 10 for row in rows)


def test_quantile__is_the_time_within_which_the_share_came() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2
    assert quantile(list(range(1, 101)), 0.99) == 99
    assert quantile([7], 0.99) == 7
    assert math.isnan(quantile([], 0.5))


def test_to_table__has_a_row_for_each_number_of_clients() -> None:
    text = to_table([Load(8, 40, 39, 1, 0, 12.34, 5, 9, 3.25)], "x").to_markdown()
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        *("8", "12.3", "5", "9", "3.2", "39/40", "1")
    ]


def test_main__prints_a_table_and_writes_json(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    @contextmanager
    def running_already(*asked: Any) -> Iterator[Server]:
        started.append(asked)
        yield server(client)

    monkeypatch.setattr("benchmarks.serving.served", running_already)
    asked = ["runs/street", "--clients", "2", "--requests", "4", "--size", "32", "48"]
    assert main([*asked, "--serve=--wait-ms 0 --device cpu", "--json", str(tmp_path / "s.json")]) == 0
    assert started == [(Path("runs/street"), ["--wait-ms", "0", "--device", "cpu"])]
    assert "| clients |" in capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["about"]["torch"] == torch.__version__
    assert [(row["clients"], row["answered"]) for row in found["loads"]] == [(2, 4)]


def test_main__what_cannot_be_measured_is_told_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs/street", "--clients", "0"]) == 2
    assert capsys.readouterr().err == "serving: --clients and --requests must be at least 1, and --soak at least 0.\n"
    assert main(["runs/street", "--serve=--port 70000"]) == 2  # in the server's own words
    assert capsys.readouterr().err == ("serving: tokenexit serve: --port 70000 is no port: give one from 0 to 65535.\n")
