"""The doctor: it says what it sees, and survives whatever it finds."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenexit.cli import doctor
from tokenexit.cli.doctor import Finding, diagnose, format_findings
from tokenexit.runtime import threads
from tokenexit.runtime.threads import THREAD_VARIABLES, Processors


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def test_this_machine_gets_an_answer_to_every_question() -> None:
    found = by_topic(diagnose(seconds=0.0))
    # A package's metadata may leave out the build, "+cu130", that the module itself names.
    assert found["torch"].finding.split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "tokenexit", "cpu", "threads", "load", "precision", "torchmetrics", "huggingface_hub"} <= set(
        found
    )
    assert any(topic.startswith("attention") for topic in found)
    assert {finding.status for finding in found.values()} <= {"ok", "warn", "fail"}
    assert "as fast" in found["precision"].finding or "equally fast" in found["precision"].finding


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the path of the CPU")
def test_the_attention_path_is_the_one_the_library_takes() -> None:
    findings = list(doctor._attention())
    assert [finding.finding.split(":")[0] for finding in findings] == ["loop", "loop"]


def test_cuda_without_its_kernel_is_a_failure_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fp32, bf16 = doctor._attention()
    assert (fp32.status, fp32.finding.split(":")[0]) == ("ok", "padded")
    assert bf16.status == "fail"
    assert "torch>=2.11" in bf16.finding


def test_a_broken_check_becomes_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("first line\nthe driver is gone")

    monkeypatch.setattr(doctor, "_devices", broken)
    found = by_topic(diagnose(seconds=0.0))
    assert found["devices"] == Finding("devices", "could not be checked: RuntimeError: the driver is gone", "fail")
    assert found["precision"].status == "ok"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        pretended = versions.get(name, real)
        if pretended is None:
            raise metadata.PackageNotFoundError(name)
        return pretended if isinstance(pretended, str) else real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_a_torchvision_that_does_not_import_is_a_failure_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pretend_installed(monkeypatch, torchvision="0.28.0")
    (finding,) = doctor._torchvision()
    assert finding.status == "fail"
    assert "operator torchvision::nms does not exist" in finding.finding
    assert "pip uninstall torchvision" in finding.finding


def test_a_torchvision_that_imports_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pretend_installed(monkeypatch, torchvision="0.28.0")
    assert [finding.status for finding in doctor._torchvision()] == ["ok"]


def test_without_torchvision_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, torchvision=None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started a process"))
    assert list(doctor._torchvision()) == []


def test_a_needed_package_that_is_missing_or_old_is_a_failure_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_minimum_versions", lambda: {"torch": "2.11", "rich": "13.7"})
    pretend_installed(monkeypatch, torch="2.9.1+cpu", rich=None, timm=None)
    found = by_topic(list(doctor._versions()))
    assert found["torch"] == Finding("torch", "2.9.1+cpu is too old: pip install 'torch>=2.11'", "fail")
    assert found["rich"] == Finding("rich", "not installed, but needed: pip install 'rich>=13.7'", "fail")
    assert found["timm"] == Finding("timm", "not installed (optional)", "ok")


def test_more_threads_than_processors_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    monkeypatch.setattr(doctor, "idle_cores", lambda: None)
    (finding,) = doctor._threads()
    assert finding.status == "warn"
    assert "OMP_NUM_THREADS=" in finding.finding


def pretend_cores(
    monkeypatch: pytest.MonkeyPatch,
    started: int,
    found: Processors,
    idle: float | None = None,
    seconds: dict[int, float] | None = None,
    **environment: str,
) -> Finding:
    """The finding where torch starts so many threads; seconds: of a pass by their number."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: started)
    monkeypatch.setattr(threads, "pass_seconds", lambda counts: seconds)
    for module in (doctor, threads):
        monkeypatch.setattr(module, "processors", lambda: found)
        monkeypatch.setattr(module, "idle_cores", lambda: idle)
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (finding,) = doctor._threads()
    return finding


def test_a_quota_smaller_than_the_machine_is_a_warning_with_what_commands_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend_cores(monkeypatch, 8, Processors(8, 8, 1.5)) == Finding(
        "threads",
        "torch starts 8; 8 logical CPUs, 8 of them usable by this process, a quota of 1.5: more than cores, so they "
        "would wait for each other; commands start 2; for programs of your own set OMP_NUM_THREADS=2.",
        "warn",
    )


def test_too_many_threads_of_the_environment_are_a_warning_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = pretend_cores(monkeypatch, 8, Processors(8, 8, 1.5), MKL_NUM_THREADS="8")
    assert finding.status == "warn"
    assert finding.finding.endswith("set OMP_NUM_THREADS=2, or leave out MKL_NUM_THREADS=8.")


def test_no_more_threads_than_cores_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = pretend_cores(monkeypatch, 2, Processors(8, 8, 1.5))
    assert (finding.status, finding.finding.split(";")[0]) == ("ok", "torch starts 2")


BUSY = {2: 0.1, 1: 0.01}
"""Seconds of a pass by the number of threads, where another program keeps one of two cores busy."""


def test_busy_cores_are_a_warning_with_what_was_timed_and_what_commands_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend_cores(monkeypatch, 2, Processors(2, 2, None), 1.04, BUSY) == Finding(
        "threads",
        "torch starts 2; 2 logical CPUs, 2 of them usable by this process, 1.0 of them idle: others keep the rest "
        "busy, and fewer threads do as well or better (a small network's pass: 10 ms with 1, 100 ms with 2); commands "
        "start 1; for programs of your own set OMP_NUM_THREADS=1.",
        "warn",
    )


def test_busy_cores_where_the_environment_says_how_many_are_a_warning_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = pretend_cores(monkeypatch, 2, Processors(2, 2, None), 1.0, BUSY, OMP_NUM_THREADS="2")
    assert finding.status == "warn"
    assert finding.finding.endswith("; set OMP_NUM_THREADS=1, or leave out OMP_NUM_THREADS=2.")


@pytest.mark.parametrize(
    ("started", "idle", "seconds"), [(2, 2.0, None), (2, 1.0, {2: 0.01, 1: 0.02}), (1, 0.0, None), (2, None, None)]
)
def test_threads_that_commands_start_too_are_fine(
    started: int, idle: float | None, seconds: dict[int, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = pretend_cores(monkeypatch, started, Processors(2, 2, None), idle, seconds)
    assert finding.status == "ok"
    assert finding.finding.startswith(f"torch starts {started}; 2 logical CPUs")
    assert finding.finding.endswith("usable by this process" if idle is None else f", {idle} of them idle")


@pytest.mark.parametrize(("load", "status"), [(3.4, "ok"), (4.6, "warn"), (None, "ok")])
def test_a_load_above_the_cores_is_a_warning(load: float | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "load", lambda: load)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    (finding,) = doctor._load()
    assert (finding.topic, finding.status) == ("load", status)
    assert load is None or finding.finding.startswith(f"{load} on 4 logical CPUs")


def test_findings_are_printed_as_aligned_lines() -> None:
    text = format_findings([Finding("cpu", "a", "ok"), Finding("torchvision", "b", "fail")])
    assert text == "ok    cpu          a\nfail  torchvision  b"


def test_the_doctor_starts_without_torch() -> None:
    """A broken torch is one of the things it is asked about."""
    code = "import sys; sys.modules['torch'] = None; from tokenexit.cli import doctor; print(doctor.diagnose(0.0))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "topic='threads', finding='could not be checked" in result.stdout
