"""What commands share: the machine that was asked for."""

from __future__ import annotations

import argparse

import pytest

from tokenexit.cli.options import machine_of
from tokenexit.runtime import precision as inference

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["evaluate", "predict", "serve", "calibrate", "sweep", "report", "gate"])
def test_precision__is_auto_by_default_in_every_command(command: str, capsys: Captured) -> None:
    from tokenexit.cli import main

    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--precision {auto,fp32,bf16,fp16}" in text
    assert "fp32 on CPUs (default: auto)" in text


def test_machine_of__resolves_auto_and_warns_of_a_slow_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(inference, "cpu_instructions", lambda: frozenset({"avx2"}))

    def asked(precision: str) -> tuple[str, str]:
        given = argparse.Namespace(device="cpu", precision=precision)
        assert machine_of(given).type == "cpu"
        return given.precision, capsys.readouterr().err

    assert asked("auto") == ("fp32", "")
    precision, warning = asked("bf16")
    assert precision == "bf16"
    assert warning.startswith("warning: precision bf16 is slow on this cpu")
    assert warning.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert asked("bf16") == ("bf16", "")  # of several processes, the first speaks
