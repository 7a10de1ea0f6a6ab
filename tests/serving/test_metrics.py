"""Prometheus' text, read back by a small parser."""

from __future__ import annotations

import re
import threading

from tokenexit.serving.metrics import Metrics

LINE = re.compile(r'^[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [0-9.e+-]+$')


def values(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.match(line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_counters__add_up_by_label_without_rounding() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.add("tokenexit_macs_total", 12_345_678_901, method="dtop")
    metrics.add("tokenexit_macs_total", 1, method="dense")
    found = values(metrics.text())
    assert found['tokenexit_macs_total{method="dtop"}'] == 37_037_036_703
    assert found['tokenexit_macs_total{method="dense"}'] == 1


def test_histograms__count_cumulatively_and_bounds_belong_to_their_bucket() -> None:
    metrics = Metrics()
    for images in (1, 2, 3, 100):
        metrics.observe("tokenexit_batch_pictures", images)
    found = values(metrics.text())
    buckets = [found[f'tokenexit_batch_pictures_bucket{{le="{le}"}}'] for le in ("1", "2", "4", "64", "+Inf")]
    assert buckets == [1, 2, 3, 3, 4]
    assert found["tokenexit_batch_pictures_sum"] == 106
    assert found["tokenexit_batch_pictures_count"] == 4


def test_gauges__are_read_when_asked() -> None:
    now = [1.0]
    metrics = Metrics({"tokenexit_busy_pictures": ("Now.", lambda: now[0])})
    now[0] = 7
    assert values(metrics.text())["tokenexit_busy_pictures"] == 7


def test_every_series__has_its_type_said_once() -> None:
    metrics = Metrics()
    metrics.add("tokenexit_pictures_total", method="dense")
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", metrics.text(), re.MULTILINE)
    assert len(dict(kinds)) == len(kinds)
    assert dict(kinds)["tokenexit_batch_seconds"] == "histogram"


def test_counters__lose_nothing_among_threads() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.add("tokenexit_pictures_total", method="dtop")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(metrics.text())['tokenexit_pictures_total{method="dtop"}'] == 2000
