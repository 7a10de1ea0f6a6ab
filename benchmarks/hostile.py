"""Attack the library with damaged files and the server with hostile clients, and check what others notice.

    python -m benchmarks.hostile images --count 2000 --seed 7
    python -m benchmarks.hostile server MODEL --requests 200 --json hostile.json

`images` damages images of every format and opens them with `load_image`: each must give an image or a `DataError`.
`server` sends so many requests at once, in peace and then beside three hostile clients: one that opens connections and
sends heads in drops, one that asks for large images at full compute, one that leaves before its answers. The status is
1 where something was lost, a traceback stands in the server's log, or the median or the longest wait is more than
twice the one in peace.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import multiprocessing
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving import MARK, body
from tokenexit.data.scenes import render_scene
from tokenexit.errors import DataError
from tokenexit.inputs.images import load_image

KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "EPS", "TGA", "PCX", "ICNS")
MAGICS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"PCD_",
    b"\x89PNG\r\n\x1a\n",
    b"II*\0",
    b"GIF89a",
    b"P6\n",
    b"\xd7\xcd\xc6\x9a",
)
MAX_PIXELS = 4_000_000


# --------------------------------------------------------------------------------------------------------- images


def whole_files() -> list[bytes]:
    files = []
    image = Image.fromarray(render_scene(3, (64, 96))[0])
    for kind in KINDS:
        for mode in ("RGB", "L", "RGBA", "P"):
            buffer = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):  # not every format knows every mode
                image.convert(mode).save(buffer, kind)
                files.append(buffer.getvalue())
    return files


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with a few of: flipped bytes, extreme numbers, foreign beginnings, lost, doubled and moved parts."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at, length = int(rng.integers(0, max(1, len(out)))), int(rng.integers(1, 64))
        match rng.integers(0, 7):
            case 0:
                out[at : at + 1] = rng.bytes(1)
            case 1:
                out[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"][
                    rng.integers(0, 4)
                ]
            case 2:
                magic = MAGICS[rng.integers(0, len(MAGICS))]
                start = [0, at, 2048][rng.integers(0, 3)]
                out[start : start + len(magic)] = magic
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length]
            case _:
                start = int(rng.integers(0, 64))  # headers are where the damage is done
                out[start : start + 2] = rng.bytes(2)
    return bytes(out)


def images(count: int, seed: int) -> dict[str, Any]:
    files, rng = whole_files(), np.random.default_rng(seed)
    found: Counter[str] = Counter()
    longest, faults = 0.0, []
    for number in range(count):
        data = mutated(files[number % len(files)], rng)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_image(data, MAX_PIXELS)
            found["images"] += 1
        except DataError as error:
            found["refused"] += 1
            if "\n" in str(error) or not str(error).endswith("."):
                faults.append(str(error))
        except BaseException:
            faults.append(traceback.format_exc())
        longest = max(longest, time.perf_counter() - start)
    return {"count": count, "seed": seed, **found, "faults": faults, "longest_ms": 1e3 * longest}


# --------------------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def served(model: Path, options: Sequence[str], log: Path) -> Iterator[int]:
    """The port of a server in a process of its own, whose words go to `log`."""
    command = [sys.executable, "-m", "tokenexit", "serve", str(model), "--port", "0", *options]
    with log.open("w") as words, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True) as run:
        try:
            assert run.stdout is not None
            address = re.search(r":(\d+)\n", run.stdout.readline())
            if address is None:
                raise SystemExit(f"hostile: {log.read_text().strip()}")
            yield int(address[1])
        finally:
            run.terminate()
            run.wait()


def post(port: int, form: bytes, source: str) -> tuple[int, str]:
    """Status and, where it was refused, the sentence; 0 where there was no answer."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=600, source_address=(source, 0))
    try:
        wire.request("POST", "/predict", form, {"Content-Type": f"multipart/form-data; boundary={MARK}"})
        answer = wire.getresponse()
        said = answer.read()
        return answer.status, "" if answer.status == 200 else said.decode(errors="replace")
    except OSError:
        return 0, ""
    finally:
        wire.close()


def at_once(port: int, forms: Sequence[bytes], requests: int) -> dict[str, Any]:
    """Send them all at the same moment, from eight addresses; those told to come later do."""
    waits, statuses, barrier = [0.0] * requests, Counter[str](), threading.Barrier(requests)

    def ask(number: int) -> None:
        barrier.wait()
        start = time.perf_counter()
        status = 429
        while status in (429, 503) and time.perf_counter() - start < 300:
            status, _ = post(port, forms[number % len(forms)], f"127.0.0.{2 + number % 8}")
            statuses[str(status)] += 1
            if status != 200:
                time.sleep(1)
        waits[number] = time.perf_counter() - start

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"statuses": dict(statuses), "median_s": statistics.median(waits), "longest_s": max(waits)}


def dear_form(size: tuple[int, int]) -> bytes:
    """A black image at full compute: few bytes and much work."""
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1]).save(buffer, "PNG")
    parts = [b'Content-Disposition: form-data; name="method"\r\n\r\ndense']
    parts.append(b'Content-Disposition: form-data; name="images"; filename="b.png"\r\n\r\n' + buffer.getvalue())
    return b"".join(f"--{MARK}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{MARK}--\r\n".encode()


def drops(port: int, stop: threading.Event, seen: Counter[str]) -> None:
    """Holds 300 connections if it can, each with a head that never ends, and opens 50 a second for it."""
    wires: list[socket.socket] = []
    while not stop.wait(1):
        with contextlib.suppress(OSError):
            for _ in range(min(50, 300 - len(wires))):
                wires.append(socket.create_connection(("127.0.0.1", port), timeout=1, source_address=("127.0.0.66", 0)))
        for wire in list(wires):
            try:
                wire.sendall(b"G")
            except OSError:
                seen["ended"] += 1
                wire.close()
                wires.remove(wire)
    for wire in wires:
        wire.close()


def dear(port: int, stop: threading.Event, seen: Counter[str], form: bytes) -> None:
    """Four requests for much work at any time, each followed by the next."""

    def ask() -> None:
        while not stop.is_set():
            status, said = post(port, form, "127.0.0.67")
            seen[f"{status} {said}".strip()] += 1
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not stop.is_set():
            thread.join(0.2)


def leaving(port: int, stop: threading.Event, seen: Counter[str], form: bytes) -> None:
    """Sends requests and leaves at once."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={MARK}\r\n"
    while not stop.wait(0.1):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=5, source_address=("127.0.0.68", 0)) as wire,
        ):
            wire.sendall(f"{head}Content-Length: {len(form)}\r\n\r\n".encode() + form)
            time.sleep(0.05)
            seen["left"] += 1


def health(port: int, stop: threading.Event, waits: list[float]) -> None:
    """Asks every fifth of a second how the server is; a wait of 60 s stands for no answer."""
    while not stop.wait(0.2):
        start = time.perf_counter()
        wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            wire.request("GET", "/healthz")
            good = b"status" in wire.getresponse().read()
        except OSError:
            good = False
        finally:
            wire.close()
        waits.append(time.perf_counter() - start if good else 60.0)


def attack(port: int, form: bytes, stop: Any, told: Any) -> None:
    """The three hostile clients, in a process of their own: they shall not slow down those who measure."""
    seen = {name: Counter[str]() for name in ("drops", "dear", "leaving")}
    over = threading.Event()
    attacks: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (drops, (seen["drops"],)),
        (dear, (seen["dear"], form)),
        (leaving, (seen["leaving"], form)),
    ]
    threads = [threading.Thread(target=run, args=(port, over, *given), daemon=True) for run, given in attacks]
    for thread in threads:
        thread.start()
    stop.wait()
    over.set()
    for thread in threads:
        thread.join(10)
    told.put({name: dict(counter) for name, counter in seen.items()})


def server(model: Path, options: Sequence[str], requests: int, large: tuple[int, int]) -> dict[str, Any]:
    forms = [body(n, (128, 192), {"method": "dtop", "format": "png"}) for n in range(8)]
    processes = multiprocessing.get_context("spawn")
    stop, told, over, waits = processes.Event(), processes.Queue(), threading.Event(), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with served(model, options, log) as port:
            post(port, forms[0], "127.0.0.2")
            peace = at_once(port, forms, requests)
            hostile = processes.Process(target=attack, args=(port, dear_form(large), stop, told))
            watch = threading.Thread(target=health, args=(port, over, waits))
            hostile.start()
            watch.start()
            time.sleep(8)  # it starts, and its connections fill what they can
            beside = at_once(port, forms, requests)
            stop.set()
            over.set()
            seen = told.get(timeout=60)
            hostile.join()
            watch.join()
        words = log.read_text()
    return {
        "requests": requests,
        "large": list(large),
        "options": list(options),
        "peace": peace,
        "attack": beside,
        "times": {key: beside[key] / peace[key] for key in ("median_s", "longest_s")},
        "hostile": seen,
        "health_longest_s": max(waits, default=0.0),
        "tracebacks": words.count("Traceback"),
        "log": words[-2000:],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    files = kinds.add_parser("images", help="damaged images through load_image")
    files.add_argument("--count", type=int, default=2000, help="number of images")
    files.add_argument("--seed", type=int, default=0, help="random seed")
    attack = kinds.add_parser("server", help="hostile clients beside others")
    attack.add_argument("model", type=Path, help="folder of a saved model")
    attack.add_argument("--requests", type=int, default=200, help="number of requests at once")
    attack.add_argument("--large", type=int, nargs=2, default=[1448, 1448], metavar=("HEIGHT", "WIDTH"))
    attack.add_argument("--serve", default="--queue 256", help="options of the server")
    for one in (files, attack):
        one.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.what == "images":
        found = images(options.count, options.seed)
        bad = bool(found["faults"])
    else:
        large = (options.large[0], options.large[1])
        found = server(options.model, shlex.split(options.serve), options.requests, large)
        lost = found["attack"]["statuses"].get("200", 0) < options.requests
        bad = lost or found["tracebacks"] > 0 or max(found["times"].values()) > 2
    text = json.dumps(found, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
