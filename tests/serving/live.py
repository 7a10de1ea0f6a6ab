"""A server of a small model in a thread, and a client of the standard library: what is tested goes over the wire."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers import tiny_segmenter
from tokenexit.inputs.labels import Labels
from tokenexit.segmenter import ExitSegmenter

File = tuple[str, bytes]
"""The name a file is sent under, and what is in it."""
LABELS = Labels(
    ("sky", "road", "tree", "car", "person"), ((9, 9, 200), (90, 9, 90), (9, 150, 9), (0, 0, 90), (220, 9, 9))
)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        """What the server says is wrong: one sentence."""
        said: str = self.json["detail"]
        assert said.endswith(".")
        assert "\n" not in said
        assert "Traceback" not in said
        return said


@dataclass(frozen=True)
class Client:
    port: int
    headers: Mapping[str, str]

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, b"", headers)

    def post(self, path: str, body: Any) -> Reply:
        return self.send("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def form(self, path: str, files: Sequence[tuple[str, File]] = (), **fields: Any) -> Reply:
        body, kind = multipart(files, fields)
        return self.send("POST", path, body, {"Content-Type": kind})

    def predict(self, *files: File, **fields: Any) -> Reply:
        return self.form("/predict", [("images", file) for file in files], **fields)

    def send(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


def multipart(files: Sequence[tuple[str, File]], fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """A form's body and its content type."""
    mark = uuid.uuid4().hex
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    for field, (name, data) in files:
        head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data)
    body = b"".join(b"--" + mark.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


@contextmanager
def running(model: ExitSegmenter, token: str | None = None, **options: Any) -> Iterator[Client]:
    """A server on a free port, and a client that knows its token."""
    from tokenexit.serving.app import create_app, server_of

    listener = socket.create_server(("127.0.0.1", 0))
    server = server_of(create_app(model, "tiny", token=token, **options), log_level="critical")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.01)
    try:
        yield Client(listener.getsockname()[1], {} if token is None else {"Authorization": f"Bearer {token}"})
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def small_model(**options: Any) -> ExitSegmenter:
    """A model whose classes have names."""
    model = tiny_segmenter(**options)
    model.preprocessing = replace(model.preprocessing, labels=LABELS)
    return model


def drawing(height: int = 24, width: int = 33, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(height: int = 24, width: int = 33, seed: int = 0) -> bytes:
    return encoded(drawing(height, width, seed))
