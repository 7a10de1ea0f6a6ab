"""The HTTP API over the wire: what it answers, what it refuses, and that both are said plainly."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import struct
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")
pytest.importorskip("python_multipart", reason="needs python-multipart: pip install 'tokenexit[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'tokenexit[serve]'")

from tests.serving.live import LABELS, Client, drawing, encoded, multipart, png, running, small_model
from tests.serving.test_metrics import values
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Gated, Method, Reduced, Resized, spec_of
from tokenexit.reducers import ALGM, MPM, Supertokens, ToMe
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.app import Limits, create_app
from tokenexit.serving.guards import Ending
from tokenexit.serving.pace import Pace, dense_macs
from tokenexit.serving.service import Service

MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return small_model()


@pytest.fixture(scope="module")
def client(model: ExitSegmenter) -> Iterator[Client]:
    with running(model, limits=Limits(upload_bytes=MIB, pixels=10_000, images=4)) as client:
        yield client


def labels_of(body: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(body)))


# --------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, Dense()),
        ({"method": "dense"}, Dense()),
        ({"method": "dtop", "threshold": "0.6"}, DToP(0.6)),
        ({"method": "dovit", "threshold": "0.7/0.6"}, DoViT((0.7, 0.6))),
    ],
)
def test_predict__png_is_the_models_own_answer(
    client: Client, model: ExitSegmenter, fields: dict[str, str], method: Any
) -> None:
    reply = client.predict(("a.png", png()), format="png", **fields)
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    image = Image.open(io.BytesIO(reply.body))
    assert image.mode == "P"
    assert tuple(image.getpalette() or [])[:15] == tuple(c for colour in LABELS.palette for c in colour)
    np.testing.assert_array_equal(np.asarray(image), model.predict(drawing(), method).labels[0].numpy())


def test_predict__runs_the_plan_of_a_calibration() -> None:
    plan = Resized(Gated(DToP((0.6, 0.9), 1, stop=2), (0,)), 0.7)
    model = small_model()
    model.calibration = Calibration(model=model.fingerprint(), method=json.loads(json.dumps(spec_of(plan))))
    with running(model) as client:
        mask = labels_of(client.predict(("a.png", png()), format="png").body)
        (found,) = client.predict(("a.png", png())).json
        assert client.get("/healthz").json["busy"] == 0
    wanted = model.predict(drawing(), plan)
    np.testing.assert_array_equal(mask, wanted.labels[0].numpy())
    assert (found["method"], found["height"], found["width"]) == ("resized", 24, 33)
    assert found["tokens"] == wanted.ledger.tokens[0] == 5 * 6
    assert found["share_of_dense"] == pytest.approx(wanted.ledger.share_of_dense[0])
    assert found["dense_gmacs"] == pytest.approx(model.predict(drawing(), Dense()).ledger.gmacs[0])


def test_predict__beside_merging_counts_as_left_what_left_at_an_exit() -> None:
    with running(small_model(), by=Supertokens(-1.0, (2,))) as client:
        (found,) = client.predict(("a.png", png())).json
        (page,) = client.predict(("a.png", png()), method="dtop", threshold="0").json
        counted = values(client.get("/metrics").body.decode())
    assert found["share_of_dense"] < 0.6
    assert [exit["left"] for exit in found["exits"]] == [0, 0]
    assert found["stayed"] == found["tokens"] == 6 * 9
    assert sum(exit["left"] for exit in page["exits"]) + page["stayed"] == 6 * 9
    assert page["exits"][0]["left"] > 0
    assert sum(n for name, n in counted.items() if "tokens_total" in str(name)) == 2 * 6 * 9


def test_predict__json_has_the_ledgers_figures(client: Client, model: ExitSegmenter) -> None:
    (found,) = client.predict(("a.png", png()), method="dtop", threshold="0.6").json
    wanted = model.predict(drawing(), DToP(0.6))
    ledger = wanted.ledger
    assert found["gmacs"] == pytest.approx(ledger.gmacs[0])
    assert found["share_of_dense"] == pytest.approx(ledger.share_of_dense[0])
    assert found["tokens"] == ledger.tokens[0] == 6 * 9
    assert [exit["live"] for exit in found["exits"]] == [ledger.live[0][1], ledger.live[0][3]]
    assert [exit["after_block"] for exit in found["exits"]] == [1, 3]
    assert sum(exit["left"] for exit in found["exits"]) + found["stayed"] == found["tokens"]
    assert found["exit_stage"] == wanted.exit_index[0].tolist()
    assert (found["name"], found["height"], found["width"]) == ("a.png", 24, 33)
    assert (found["method"], found["threshold"]) == ("dtop", [0.6, 0.6])
    pixels = torch.bincount(wanted.labels[0].flatten(), minlength=5) / (24 * 33)
    assert {c["name"]: c["share"] for c in found["classes"]} == pytest.approx(
        {LABELS.names[k]: share for k, share in enumerate(pixels.tolist()) if share}
    )
    assert found["milliseconds"] > 0


def test_predict__many_images_of_any_size_keep_names_and_order(client: Client) -> None:
    files = [("a.png", png(24, 33, 1)), ("b.png", png(40, 12, 2)), ("a.jpg", png(5, 7, 3))]
    found = client.predict(*files).json
    assert [(f["name"], f["height"], f["width"]) for f in found] == [
        ("a.png", 24, 33),
        ("b.png", 40, 12),
        ("a-2.jpg", 5, 7),
    ]
    archive = zipfile.ZipFile(io.BytesIO(client.predict(*files, format="png").body))
    assert archive.namelist() == ["a.png", "b.png", "a-2.png"]
    alone = client.predict(files[1], format="png")
    np.testing.assert_array_equal(labels_of(archive.read("b.png")), labels_of(alone.body))


def test_predict__coco_covers_every_pixel_once(client: Client) -> None:
    found = client.predict(("a.png", png()), ("b.png", png(seed=4)), format="coco").json
    for image in (1, 2):
        assert sum(a["area"] for a in found["annotations"] if a["image_id"] == image) == 24 * 33
    assert [c["name"] for c in found["categories"]] == list(LABELS.names)


def test_predict__takes_what_cameras_and_scanners_make(client: Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = encoded(drawing(10, 20), "JPEG", exif=exif)
    (found,) = client.predict(("turned.jpg", turned)).json
    assert (found["height"], found["width"]) == (20, 10)
    for kind, mode in (("WEBP", "RGB"), ("TIFF", "RGB"), ("BMP", "RGB"), ("GIF", "P"), ("PNG", "RGBA"), ("PNG", "L")):
        reply = client.predict(("x", encoded(drawing().convert(mode), kind)))
        assert reply.status == 200, (kind, mode)


def test_predict__names_that_were_sent_stay_names(client: Client) -> None:
    sent = ["../../etc/passwd", "a\\b\\c.png", "<script>.png", ".hidden", ""]
    found = [client.predict((name, png())) for name in sent[:4]]
    assert [f.json[0]["name"] for f in found] == ["passwd", "c.png", "_script_.png", "hidden"]


def test_requests_at_once__share_batches_and_change_no_answer(model: ExitSegmenter) -> None:
    images = [png(24, 33, seed) for seed in range(12)]
    with running(model, limits=Limits(wait=0.1)) as client:
        alone = [
            client.predict(("a.png", image), threshold="0.6", method="dtop", format="png").body for image in images
        ]
        together: dict[int, bytes] = {}

        def ask(n: int) -> None:
            together[n] = client.predict(("a.png", images[n]), threshold="0.6", method="dtop", format="png").body

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures = values(client.get("/metrics").body.decode())
    for n in range(12):
        np.testing.assert_array_equal(labels_of(together[n]), labels_of(alone[n]))
    calls = figures["tokenexit_batch_pictures_count"]
    assert figures["tokenexit_batch_pictures_sum"] == 24
    assert calls < 24


# -------------------------------------------------------------------------------------------------------- refusals


def test_predict__damaged_and_foreign_files_are_refused_by_name(client: Client) -> None:
    whole = png()
    for data in (b"", b"hello", whole[:40], whole[:-30], b"%!PS-Adobe-3.0\nshowpage", b"<svg xmlns='a'/>", b"GIF89a"):
        reply = client.predict(("cat.png", data))
        assert reply.status == 422, data[:10]
        assert "'cat.png'" in reply.detail


def test_predict__a_form_that_is_none_is_refused(client: Client) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "application/json", "text/plain"):
        reply = client.send("POST", "/predict", b"--y\r\nno form at all", {"Content-Type": kind})
        assert reply.status in (400, 422), kind
        assert reply.json["detail"]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged EXIF data
def test_predict__a_flipped_bit_anywhere_is_answered_plainly(client: Client) -> None:
    """Whatever the damage: an image comes back, or a sentence; never an error of the server's."""
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = np.frombuffer(encoded(drawing(16, 20), kind), dtype=np.uint8)
        for _ in range(12):
            damaged = whole.copy()
            at = rng.integers(0, len(damaged), rng.integers(1, 6))
            damaged[at] ^= rng.integers(1, 256, len(at)).astype(np.uint8)
            data = damaged.tobytes()[: rng.integers(1, len(damaged) + 1) if rng.random() < 0.3 else None]
            reply = client.predict(("x", data))
            assert reply.status in (200, 422), reply.body
            if reply.status == 422:
                assert reply.detail


def test_predict__a_decompression_bomb_is_not_decoded(client: Client) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(MIB))) + chunk(b"IEND", b"")
    )
    reply = client.predict(("bomb.png", bomb))
    assert reply.status == 422
    assert reply.detail == "image 'bomb.png' has far more than 10000 pixels: shrink it."


def test_predict__too_many_pixels_are_refused(client: Client) -> None:
    assert "200x60" in client.predict(("large.png", png(200, 60))).detail
    assert client.predict(("fits.png", png(100, 100))).status == 200


def test_predict__a_strip_that_padding_would_blow_up_is_refused(client: Client) -> None:
    reply = client.predict(("strip.png", encoded(Image.new("RGB", (9000, 1)))))
    assert reply.status == 422
    assert "2250 patches" in reply.detail


def test_predict__what_resizing_would_blow_up_is_refused() -> None:
    model = small_model()
    model.preprocessing = replace(model.preprocessing, resize=64)
    with running(model, limits=Limits(pixels=10_000)) as client:
        assert client.predict(("a.png", png(10, 12))).status == 200
        assert "patches" in client.predict(("strip.png", png(2, 300))).detail


def test_predict__too_many_bytes_are_refused_with_and_without_a_length(client: Client) -> None:
    assert client.predict(("a.png", bytes(2 * MIB))).status == 413
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    chunks = iter([head, *[bytes(MIB // 2)] * 4])
    reply = client.send("POST", "/predict", chunks, {"Content-Type": "multipart/form-data; boundary=x"})
    assert reply.status == 413
    assert str(MIB) in reply.detail


def test_predict__too_many_images_are_refused(client: Client) -> None:
    assert "there must be at most 4 images, got 5" in client.predict(*[("a.png", png())] * 5).detail


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "unet"}, "method 'unet' is unknown"),
        ({"threshold": "high"}, "threshold must be a number, got 'high'"),
        ({"compute": "2"}, "compute must lie in [0, 1], got 2"),
        ({"compute": "much"}, "compute:"),
        ({"format": "bmp"}, "format:"),
    ],
)
def test_predict__options_that_cannot_work_are_named(client: Client, fields: dict[str, str], words: str) -> None:
    reply = client.predict(("a.png", png()), **fields)
    assert reply.status == 422
    assert words in reply.detail


def test_predict__without_an_image_says_so(client: Client) -> None:
    reply = client.form("/predict", method="dtop")
    assert reply.status == 422
    assert "images" in reply.detail


def test_an_upload_that_stalls__is_ended(model: ExitSegmenter) -> None:
    with (
        running(model, limits=Limits(seconds=0.3)) as client,
        socket.create_connection(("127.0.0.1", client.port)) as wire,
    ):
        wire.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n")
        wire.sendall(b"Content-Length: 1000\r\n\r\n--x")
        wire.settimeout(20)
        assert wire.recv(100).startswith(b"HTTP/1.1 408")


def held_model() -> tuple[ExitSegmenter, threading.Event, threading.Event]:
    """A model that says when it was called and waits until it may go on."""
    model, started, go = small_model(), threading.Event(), threading.Event()
    real = model.segment

    def segment(*args: Any, **kwargs: Any) -> Any:
        started.set()
        assert go.wait(20)
        return real(*args, **kwargs)

    model.segment = segment  # type: ignore[method-assign]
    return model, started, go


def test_a_full_queue__refuses_at_once_and_recovers() -> None:
    model, started, go = held_model()
    with running(model, limits=Limits(slots=2)) as client:
        replies: list[int] = []
        threads = [
            threading.Thread(target=lambda: replies.append(client.predict(("a.png", png())).status)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert started.wait(20)
        until = time.monotonic() + 20
        while client.get("/healthz").json["busy"] < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        refused = client.predict(("a.png", png()))
        go.set()
        for thread in threads:
            thread.join()
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "try again" in refused.detail
        assert replies == [200, 200]
        assert client.get("/healthz").json["busy"] == 0
        assert client.predict(("a.png", png())).status == 200


def test_an_answer_that_takes_too_long__is_not_waited_for() -> None:
    model, _, go = held_model()
    with running(model, limits=Limits(seconds=0.3)) as client:
        reply = client.predict(("a.png", png()))
        go.set()
        assert reply.status == 503
        assert "time limit" in reply.detail


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("secret /path"), 500), (torch.OutOfMemoryError(), 413), (MemoryError(), 413)]
)
def test_an_error_of_the_model__shows_nothing_of_the_server(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()

    def segment(*args: Any, **kwargs: Any) -> Any:
        raise error

    model.segment = segment  # type: ignore[method-assign]
    with caplog.at_level(logging.CRITICAL), running(model) as client:
        reply = client.predict(("a.png", png()))
        assert reply.status == status
        assert "secret" not in reply.detail
        assert client.get("/healthz").json["busy"] == 0


def test_unknown_addresses__are_refused_plainly(client: Client) -> None:
    assert client.get("/nothing").status == 404
    assert client.get("/predict").status == 405
    assert client.get("/samples/77.png").detail == "there are samples 0 to 5."


# ------------------------------------------------------------------------------------------------------ what it costs


def paced(monkeypatch: pytest.MonkeyPatch, seconds: float, size: tuple[int, int] = (24, 33)) -> None:
    """Let an image of this size be expected to take so many seconds."""
    pace = seconds / dense_macs(small_model(), size)
    monkeypatch.setattr(Pace, "measured", classmethod(lambda cls, model, precision: cls(pace)))
    monkeypatch.setattr(Pace, "observe", lambda self, macs, seconds: None)


def test_predict__what_takes_too_long_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 4.0)
    model, started, _ = held_model()
    with running(model, limits=Limits(work=7.0)) as client:
        reply = client.predict(("a.png", png()), ("b.png", png()), method="dense")
        assert reply.status == 413
        assert reply.detail == (
            "a request must take at most 7 seconds of this machine, got about 8: send fewer or smaller images."
        )
        key = kept(client, png(40, 60))
        assert client.post("/view", {"image": key, "method": "dtop"}).status == 413
        assert not started.is_set()
        assert client.get("/healthz").json["busy"] == 0


def test_predict__what_takes_too_long_goes_by_the_size_that_the_method_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 8.0)
    model = small_model()
    model.calibration = Calibration(
        model=model.fingerprint(), method={"name": "resized", "method": {"name": "dense"}, "scale": 0.5}
    )
    with running(model, limits=Limits(work=7.0)) as client:
        assert client.predict(("a.png", png()), method="dense").status == 413
        assert client.predict(("a.png", png())).status == 200


def test_predict__what_takes_too_long_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 8.0)
    model, started, _ = held_model()

    def decode(*given: Any) -> Any:
        raise AssertionError("an image that is refused for its work was decoded")

    monkeypatch.setattr("tokenexit.serving.service.read_image", decode)
    with running(model, limits=Limits(work=7.0)) as client:
        reply = client.predict(("a.png", png()), method="dense")
    assert (reply.status, started.is_set()) == (413, False)


def test_predict__what_cannot_be_in_time_behind_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 4.0)
    model, started, go = held_model()
    with running(model, limits=Limits(work=7.0, seconds=7.0)) as client:
        first = threading.Thread(target=client.predict, args=(("a.png", png()),))
        first.start()
        assert started.wait(20)
        health = client.get("/healthz").json
        assert (health["status"], health["busy"]) == ("ok", 1)
        assert health["running_seconds"] > 0
        reply = client.predict(("a.png", png()))
        go.set()
        first.join()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert "the server is busy, and the answer would come about" in reply.detail
        assert client.predict(("a.png", png())).status == 200


def test_predict__a_client_that_leaves_takes_its_work_along(model: ExitSegmenter) -> None:
    """The model's call ends before its next block, and the place is free."""
    ran: list[int] = []
    entered, go = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        entered.set()
        assert go.wait(20)

    with running(model) as client:
        handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in model.backbone.blocks]
        handles.append(model.backbone.blocks[0].register_forward_hook(hold))
        try:
            body, kind = multipart([("images", ("a.png", png()))], {})
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            with socket.create_connection(("127.0.0.1", client.port)) as wire:
                wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert entered.wait(20)
            settled(lambda: client.get("/healthz").json["busy"] == 0)
            go.set()
            settled(lambda: client.get("/healthz").json["running_seconds"] == 0)
            assert len(ran) == 1
            assert 'route="/predict",status="499"' in client.get("/metrics").body.decode()
        finally:
            go.set()
            for handle in handles:
                handle.remove()


def settled(true: Any) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_healthz__says_that_there_is_no_room() -> None:
    model, started, go = held_model()
    with running(model, limits=Limits(slots=1)) as client:
        assert client.get("/healthz").json["status"] == "ok"
        first = threading.Thread(target=client.predict, args=(("a.png", png()),))
        first.start()
        assert started.wait(20)
        health = client.get("/healthz")
        assert (health.status, health.json["status"], health.json["places"]) == (200, "saturated", 1)
        # Nothing is read of what cannot be taken: the answer comes before the body.
        with socket.create_connection(("127.0.0.1", client.port)) as wire:
            wire.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n")
            wire.settimeout(20)
            assert wire.recv(100).startswith(b"HTTP/1.1 429")
        go.set()
        first.join()
        assert client.get("/healthz").json["status"] == "ok"


def test_uploads__stay_in_memory(model: ExitSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: written.append(1))
    with running(model, limits=Limits(upload_bytes=8 * MIB)) as client:
        assert client.predict(("a.png", png() + bytes(4 * MIB))).status == 200
    assert not written


def test_uploads__of_all_clients_together_are_bounded(model: ExitSegmenter) -> None:
    def held() -> float:
        return values(client.get("/metrics").body.decode())["tokenexit_upload_bytes"]

    with running(model, limits=Limits(upload_bytes=MIB, held_bytes=MIB, silence=60.0)) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with socket.create_connection(("127.0.0.1", client.port)) as wire:
            part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            wire.sendall(head + b"Content-Length: 900000\r\n\r\n" + part + bytes(800_000))
            settled(lambda: held() > 800_000)
            assert client.predict(("a.png", png() + bytes(400_000))).status == 429
            assert client.predict(("a.png", png())).status == 200
        settled(lambda: held() == 0)
        assert client.predict(("a.png", png() + bytes(400_000))).status == 200


# ------------------------------------------------------------------------------------------------------ who may ask


def test_token__is_asked_for_before_anything_is_read(model: ExitSegmenter) -> None:
    with running(model, token="open-sesame", limits=Limits(upload_bytes=MIB)) as client:
        stranger = replace(client, headers={})
        for wrong in ("", "Bearer", "Bearer open", "Basic open-sesame", "Bearer open-sesame2", "open-sesame"):
            reply = stranger.send("POST", "/predict", bytes(3 * MIB), {"Authorization": wrong})
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/model", "/metrics"):
            assert stranger.get(path).status == 401
        for path in ("/", "/page.js", "/page.css", "/samples/0.png", "/healthz", "/openapi.json", "/docs"):
            assert stranger.get(path).status == 200
        for right in ("Bearer open-sesame", "bearer open-sesame", "BEARER  open-sesame"):
            assert stranger.get("/model", Authorization=right).status == 200
        assert client.predict(("a.png", png())).status == 200
        assert "HTTPBearer" in client.get("/openapi.json").json["components"]["securitySchemes"]


def test_a_local_server__answers_under_local_names_only(client: Client, model: ExitSegmenter) -> None:
    for host in ("localhost", f"127.0.0.1:{client.port}", "[::1]:80", "[::1]", "LOCALHOST:1", "127.0.0.2:80"):
        assert client.get("/healthz", Host=host).status == 200, host
    for host in (
        "evil.example",
        f"evil.example:{client.port}",
        "localhost.evil.example",
        "",
        "10.0.0.1",
        "127.0.0.1.x",
    ):
        assert client.get("/healthz", Host=host).status == 421, host
    with running(model, local_only=False) as other:
        assert other.get("/healthz", Host="segmenter.example").status == 200


def test_a_local_server__answers_no_page_from_elsewhere(client: Client) -> None:
    own = f"127.0.0.1:{client.port}"
    for origin in ("https://evil.example", "http://localhost:1", f"http://{own}.evil.example", "null"):
        reply = client.get("/healthz", Host=own, Origin=origin)
        assert reply.status == 403, origin
        assert "pages from elsewhere" in reply.detail
    assert client.get("/healthz", Host=own, Origin=f"http://{own}").status == 200


def test_every_answer__forbids_foreign_scripts_and_frames(client: Client) -> None:
    for reply in (client.get("/"), client.get("/healthz"), client.predict(("a", b"no"))):
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------------------------------------------- for the page


def shown(client: Client, **asked: Any) -> Any:
    reply = client.post("/view", asked)
    assert reply.status == 200, reply.body
    return reply.json


def kept(client: Client, data: bytes) -> str:
    reply = client.form("/images", [("image", ("a.png", data))])
    assert reply.status == 200, reply.body
    key: str = reply.json["id"]
    return key


def bytes_of(text: str, size: list[int]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(size)


def test_view__of_output_that_is_not_finite_is_refused_as_predictions_are() -> None:
    model = small_model(decode_head="linear")
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.fill_(float("nan"))
    with running(model) as client:
        replies = (client.predict(("a.png", png())), client.post("/view", {"image": kept(client, png())}))
    for reply in replies:
        assert reply.status == 422, reply.body[:200]
        assert "not finite" in reply.detail


@pytest.mark.parametrize(
    "method",
    [Dense(), Reduced(Dense(), ToMe(0.02)), Reduced(DToP(0.9), ALGM(0.9, 2, None))],
    ids=lambda method: method.label,
)
def test_dear_requests__may_give_way_before_every_block_whatever_merges_inside(method: Method[Any]) -> None:
    model, blocks = small_model(), 0

    def count() -> None:
        nonlocal blocks
        blocks += 1

    service = Service(model, "tiny", Limits(), "fp32", Ending())
    try:
        service.batcher.between = count  # type: ignore[method-assign]
        with torch.no_grad():
            model([torch.rand(3, 16, 16)], method)
    finally:
        service.close()
    assert blocks >= len(model.backbone.blocks)


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_view__shows_classes_scores_and_exits_of_the_models_answer(head: str) -> None:
    model = small_model(exit_head=head)
    with running(model) as client:
        found = shown(client, image=kept(client, png()), method="dtop", compute=0.2)
    wanted = model.predict(drawing(), DToP(tuple(found["threshold"])))
    maps = wanted.logits[0]
    scores = maps if wanted.value == "scores" else maps.softmax(dim=0)
    np.testing.assert_array_equal(bytes_of(found["labels"], found["size"]), wanted.labels[0])
    np.testing.assert_allclose(bytes_of(found["scores"], found["size"]) / 255, scores.amax(dim=0), atol=0.003)
    np.testing.assert_array_equal(bytes_of(found["exit_stage"], found["grid"]), wanted.exit_index[0])
    assert found["extent"] == [24 / 4, 33 / 4]
    assert found["share_of_dense"] == pytest.approx(wanted.ledger.share_of_dense[0])


def test_view__has_the_groups_of_merged_tokens() -> None:
    model, by = small_model(), MPM((1, 2))
    with running(model, by=by) as merging, running(model) as plain:
        found = shown(merging, image=kept(merging, png()), method="dtop", compute=0.2)
        alone = shown(plain, image=kept(plain, png()), method="dtop", compute=0.2)
    wanted = model.predict(drawing(), Reduced(DToP(tuple(found["threshold"])), by))
    groups = np.frombuffer(base64.b64decode(found["groups"]), "<u4").reshape(found["grid"])
    np.testing.assert_array_equal(groups, wanted.groups[0])
    assert len(np.unique(groups)) < groups.size
    assert alone["groups"] == ""


def test_view__of_a_model_with_windows_has_a_cell_for_every_patch() -> None:
    model = small_model()
    model.preprocessing = replace(model.preprocessing, window=(16, 16), stride=(8, 8))
    with running(model) as client:
        found = shown(client, image=kept(client, png(24, 40)), method="dtop", compute=0.2)
        (figures,) = client.predict(("a.png", png(24, 40)), method="dtop", compute=0.2).json
    stages = model.predict(drawing(24, 40), DToP(tuple(found["threshold"]))).exit_index[0]
    assert found["grid"] == [6, 10]
    np.testing.assert_array_equal(bytes_of(found["exit_stage"], [6, 10]), stages[2::4, 2::4])
    assert figures["exit_stage"] == stages[2::4, 2::4].tolist()


def test_view__more_compute_leaves_more_tokens(client: Client) -> None:
    key = kept(client, png())
    shares = [shown(client, image=key, method="dtop", compute=c)["stayed"] for c in (0.0, 0.1, 0.3, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 54


def test_view__large_images_are_shown_smaller(model: ExitSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenexit.serving import answers

    assert answers.shown_size((300, 500), 5) == (300, 500)
    assert answers.shown_size((1000, 4096), 5) == (250, 1024)
    height, width = answers.shown_size((1024, 1024), 150)
    assert 150 * height * width <= answers.SHOWN_ELEMENTS < 151 * (height + 1) * (width + 1)
    assert answers.shown_size((1, 5000), 5) == (1, 1024)


def test_view__is_compressed_for_those_who_can_read_it(client: Client) -> None:
    body = json.dumps({"image": kept(client, png()), "method": "dense"}).encode()
    kind = {"Content-Type": "application/json"}
    plain = client.send("POST", "/view", body, kind)
    packed = client.send("POST", "/view", body, {**kind, "Accept-Encoding": "br, gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert json.loads(zlib.decompress(packed.body, 31))["labels"] == plain.json["labels"]


def test_view__of_an_image_that_had_to_go_says_so(model: ExitSegmenter) -> None:
    with running(model, limits=Limits(kept_bytes=30_000)) as client:
        first, second = kept(client, png(40, 40, 1)), kept(client, png(40, 40, 2))
        assert client.post("/view", {"image": second}).status == 200
        reply = client.post("/view", {"image": first})
        assert reply.status == 404
        assert "send it again" in reply.detail


def test_plain__is_a_page_without_scripts(client: Client) -> None:
    reply = client.form("/plain", [("image", ("<b>.png", png()))], method="dtop", compute=0.2)
    page = reply.body.decode()
    assert (reply.status, page.count("<img")) == (200, 4)
    assert "of dense compute" in page
    assert "<script" not in page
    assert "<b>" not in page


def test_plain__takes_a_sample_whatever_else_the_form_has(model: ExitSegmenter) -> None:
    with running(model) as client:
        reply = client.form("/plain", [("image", ("", b""))], sample=2, method="compare", compute=0.4)
    assert reply.status == 200
    assert b"<title>Sample 3</title>" in reply.body


def test_plain__says_on_a_page_what_is_wrong(client: Client) -> None:
    for files, words in (([], "no image was sent"), ([("image", ("<i>.png", b"no"))], "cannot be decoded")):
        body, kind = multipart(files, {"method": "dtop"})
        reply = client.send("POST", "/plain", body, {"Content-Type": kind, "Accept": "text/html,*/*"})
        assert (reply.status, reply.headers["content-type"]) == (422, "text/html; charset=utf-8")
        assert words in reply.body.decode()
        assert b"<i>" not in reply.body


def test_the_page__needs_nothing_from_elsewhere(client: Client) -> None:
    for path in ("/", "/page.css", "/page.js"):
        reply = client.get(path)
        assert reply.status == 200
        assert b"//" not in reply.body.replace(b"http://127.0.0.1:8000/", b"").replace(b"// ", b"").replace(
            b"// --", b""
        )
    assert b"tiny" in client.get("/").body


def test_samples__are_drawn_at_the_models_size(client: Client) -> None:
    image = Image.open(io.BytesIO(client.get("/samples/0.png").body))
    assert image.size == (192, 128)


def test_samples__are_offered_to_models_of_their_classes_only(client: Client) -> None:
    assert client.get("/").body.count(b'class="sample"') == 6
    other = small_model()
    other.preprocessing = replace(other.preprocessing, labels=replace(LABELS, names=("a", "b", "c", "d", "e")))
    with running(other) as stranger:
        page = stranger.get("/").body
        assert b'class="sample"' not in page
        assert b'type="file"' in page
        assert stranger.get("/samples/0.png").status == 404
        assert stranger.get("/samples/0.png").detail == "this model has no samples."
        assert stranger.form("/plain", sample=0).status == 422


def test_docs__say_what_there_is_and_load_nothing(client: Client) -> None:
    reply = client.get("/docs")
    page = reply.body.decode()
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for words in ("POST /predict", "GET /healthz", "threshold", "png", "one for all exits, or one for each", "429"):
        assert words in page
    assert "<script" not in page
    assert "http" not in page.replace("HTTP", "").replace("http-equiv", "").lower().replace("http api", "")


def test_about__is_what_the_page_needs(client: Client) -> None:
    about = client.get("/model").json
    assert (about["classes"], about["exits"], about["blocks"]) == (list(LABELS.names), [1, 3], 4)
    assert len(about["colours"]) == 3
    assert [m["name"] for m in about["methods"]] == ["dense", "dtop", "dovit"]


# ------------------------------------------------------------------------------------------------------ operation


def test_metrics__count_images_tokens_and_savings(model: ExitSegmenter) -> None:
    with running(model) as client:
        client.predict(("a.png", png()), ("b.png", png(seed=2)), method="dtop", threshold="0.6")
        client.predict(("a.png", b"no"))
        figures = values(client.get("/metrics").body.decode())
        found = client.predict(("a.png", png()), ("b.png", png(seed=2)), method="dtop", threshold="0.6").json
    assert figures['tokenexit_pictures_total{method="dtop"}'] == 2
    assert figures['tokenexit_requests_total{route="/predict",status="200"}'] == 1
    assert figures['tokenexit_requests_total{route="/predict",status="422"}'] == 1
    assert figures['tokenexit_macs_total{method="dtop"}'] / 1e9 == pytest.approx(sum(f["gmacs"] for f in found))
    tokens = [figures[f'tokenexit_tokens_total{{method="dtop",exit="{place}"}}'] for place in ("1", "2", "end")]
    assert tokens[0] == sum(f["exits"][0]["left"] for f in found)
    assert sum(tokens) == 2 * 54
    assert figures["tokenexit_busy_pictures"] == 0


def test_openapi__documents_the_api(client: Client) -> None:
    document = client.get("/openapi.json").json
    assert set(document["paths"]) == {"/predict", "/healthz", "/metrics", "/model", "/images", "/view"}
    post = document["paths"]["/predict"]["post"]
    assert {"200", "401", "413", "422", "429", "503"} <= set(post["responses"])
    assert {"application/json", "image/png", "application/zip"} <= set(post["responses"]["200"]["content"])


def test_a_model_without_class_names__gets_names(model: ExitSegmenter) -> None:
    nameless = small_model()
    nameless.preprocessing = replace(nameless.preprocessing, labels=None)
    with running(nameless) as client:
        assert client.get("/model").json["classes"][0] == "class_0"
        assert client.predict(("a.png", png()), format="png").status == 200


def test_create_app__refuses_what_cannot_work(model: ExitSegmenter) -> None:
    with pytest.raises(ConfigError, match="slots must be above 0, got 0"):
        create_app(model, limits=Limits(slots=0))
    foreign = small_model()
    foreign.calibration = Calibration(model="another", method={"name": "dtop"})
    with pytest.raises(CheckpointError, match="other weights"):
        create_app(foreign)
