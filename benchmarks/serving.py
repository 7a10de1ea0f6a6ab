"""Measure `tokenexit serve` under load: images per second, waiting times, and whether memory stays flat.

    python -m benchmarks.serving MODEL --clients 1 8 32 --requests 400 --soak 2000 --json serving.json

Starts the server on a free port of this machine and talks to it over loopback, client and server sharing its cores.
Drawn scenes are sent as JPEG, each asked for alone first: answers under load must be the same masks, and none may be
missing. An answer of 429 is asked for again after its Retry-After and counted. Memory is the server's resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from tokenexit.data.scenes import render_scene
from tokenexit.errors import ConfigError, TokenExitError
from tokenexit.report.tables import Column, Table

PICTURES = 8
MARK = "tokenexit-benchmark"


@dataclass
class Load:
    """What one number of clients saw. answered: of `requests`; different: answers unlike the one that came alone.

    busy: times that 429 was said. batch: mean images in a call of the model. Times in milliseconds.
    """

    clients: int
    requests: int
    answered: int = 0
    different: int = 0
    busy: int = 0
    pictures_per_second: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    batch: float = 0.0
    times: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Server:
    process: psutil.Process
    port: int

    def memory(self) -> float:
        """Resident MiB."""
        mib: float = self.process.memory_info().rss / 2**20
        return mib

    def figure(self, name: str) -> float:
        """One of the server's own figures."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as wire:
            wire.request("GET", "/metrics")
            found = re.search(rf"^{name} (\S+)$", wire.getresponse().read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def served(model: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """A server in a process of its own. Raises `ConfigError` with its words if it does not start."""
    command = [sys.executable, "-m", "tokenexit", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        try:
            address = re.search(r":(\d+)\n", run.stdout.readline())
            if address is None:
                raise ConfigError(run.stderr.read().strip() or "the server ended without a word.")
            yield Server(psutil.Process(run.pid), int(address[1]))
        finally:
            run.terminate()


def body(number: int, size: tuple[int, int], options: dict[str, str]) -> bytes:
    """A form with a drawn scene of this size."""
    buffer = io.BytesIO()
    Image.fromarray(render_scene(number, size)[0]).save(buffer, "JPEG", quality=90)
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in options.items()]
    parts.append(b'Content-Disposition: form-data; name="images"; filename="scene.jpg"\r\n\r\n' + buffer.getvalue())
    return b"".join(f"--{MARK}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{MARK}--\r\n".encode()


def ask(wire: http.client.HTTPConnection, form: bytes) -> tuple[int, bytes]:
    wire.request("POST", "/predict", form, {"Content-Type": f"multipart/form-data; boundary={MARK}"})
    answer = wire.getresponse()
    return answer.status, answer.read()


def load(server: Server, forms: Sequence[bytes], masks: Sequence[bytes], clients: int, requests: int) -> Load:
    """So many requests by so many clients, each of which sends its next when it has the answer to its last."""
    found, numbers, lock = Load(clients, requests), count(), threading.Lock()

    def client() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)) as wire:
            while (n := next(numbers)) < requests:
                start = time.perf_counter()
                while (answer := ask(wire, forms[n % len(forms)]))[0] == 429:
                    with lock:
                        found.busy += 1
                    time.sleep(1)
                with lock:
                    found.times.append(1e3 * (time.perf_counter() - start))
                    found.answered += answer[0] == 200
                    found.different += answer[0] == 200 and answer[1] != masks[n % len(masks)]

    calls, images = (server.figure(f"tokenexit_batch_pictures_{name}") for name in ("count", "sum"))
    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.pictures_per_second = requests / (time.perf_counter() - start)
    calls = server.figure("tokenexit_batch_pictures_count") - calls
    found.batch = (server.figure("tokenexit_batch_pictures_sum") - images) / max(calls, 1)
    found.p50, found.p99 = (quantile(found.times, share) for share in (0.5, 0.99))
    return found


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest time within which this share of all came; NaN of none."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)] if times else math.nan


def soak(server: Server, forms: Sequence[bytes], masks: Sequence[bytes], requests: int) -> list[dict[str, float]]:
    """Memory after each tenth of the requests, by 8 clients."""
    rows = [{"requests": 0.0, "mib": server.memory()}]
    for part in range(1, 11):
        one = load(server, forms, masks, 8, requests // 10)
        rows.append({"requests": part * (requests // 10), "mib": server.memory(), "answered": one.answered})
    return rows


def to_table(loads: Sequence[Load], caption: str) -> Table:
    columns = [
        Column("clients", align="right"),
        Column("images/s", "{:.1f}", "right"),
        Column("p50 ms", "{:.0f}", "right"),
        Column("p99 ms", "{:.0f}", "right"),
        Column("images per call", "{:.1f}", "right"),
        Column("answered", align="right"),
        Column("different", align="right"),
    ]
    rows = [
        [o.clients, o.pictures_per_second, o.p50, o.p99, o.batch, f"{o.answered}/{o.requests}", o.different]
        for o in loads
    ]
    return Table(columns, rows, caption)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400, help="number of requests for each number of clients")
    parser.add_argument("--soak", type=int, default=0, help="number of requests after which memory is compared")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 192], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--method", default="dtop")
    parser.add_argument("--serve", default="", help="options of the server, as --serve='--queue 8 --wait-ms 0'")
    parser.add_argument("--json", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    size = (options.size[0], options.size[1])
    try:
        if min(options.clients) < 1 or options.requests < 1 or options.soak < 0:
            raise ConfigError("--clients and --requests must be at least 1, and --soak at least 0.")
        forms = [body(n, size, {"method": options.method, "format": "png"}) for n in range(PICTURES)]
        with served(options.model, shlex.split(options.serve)) as server:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)) as wire:
                alone = [ask(wire, form) for form in forms]
            if any(status != 200 for status, _ in alone):
                raise ConfigError(f"the server answers {alone[0][1].decode(errors='replace')}")
            masks = [mask for _, mask in alone]
            loads = [load(server, forms, masks, clients, options.requests) for clients in options.clients]
            memory = soak(server, forms, masks, options.soak) if options.soak else []
    except TokenExitError as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    about: dict[str, Any] = {
        "model": options.model.name,
        "size": list(size),
        "method": options.method,
        "serve": options.serve,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[2] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    caption = f"{about['model']}, {options.method}, images of {size[0]}x{size[1]}, {about['cores']} cores"
    print(to_table(loads, caption).to_markdown())
    for row in memory:
        print(f"{row['requests']:.0f} requests: {row['mib']:.0f} MiB")
    if options.json is not None:
        rows = [{k: v for k, v in asdict(one).items() if k != "times"} for one in loads]
        options.json.write_text(json.dumps({"about": about, "loads": rows, "memory": memory}, indent=2) + "\n")
    lost = sum(one.requests - one.answered + one.different for one in loads)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
