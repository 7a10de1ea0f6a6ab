"""Several processes train one model, are killed, and go on to the same bits."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.training.driver import drive, ended, free_port
from tests.training.tiny import everything_on, same_weights, silent, weights, write_dataset
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.loop import train

Weights = dict[str, torch.Tensor]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def torchrun(data: Path, out: Path, when: str) -> subprocess.CompletedProcess[str]:
    """Two processes of one agent."""
    address = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    return ended(drive(data, out, when, ("-m", "torch.distributed.run", "--nproc-per-node", "2", *address)))


def without_agent(data: Path, out: Path, when: str) -> list[subprocess.CompletedProcess[str]]:
    """Two processes that nobody looks after."""
    port, processes = free_port(), []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(drive(data, out, when, environment=place))
    return [ended(process) for process in processes]


def results(out: Path) -> tuple[Weights, Weights]:
    """The weights that each process ended with."""
    first, second = (torch.load(f"{out}.{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of two processes that nobody killed, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = torchrun(data, out, "end")
    assert run.returncode == 0, run.stderr
    return out, run.stdout


def test_two_processes_train_one_model_with_every_method_even_when_every_token_leaves(whole: tuple[Path, str]) -> None:
    out, said = whole
    first, second = results(out)
    assert all(bool(value.isfinite().all()) for value in first.values())
    assert same_weights(first, second)
    assert same_weights(first, weights(ExitSegmenter.from_pretrained(out)))
    (headline,) = (line for line in said.splitlines() if line.startswith("training"))  # one of them speaks
    assert "6 steps of 4 in 2 parts" in headline
    assert headline.endswith("2 processes, each with batch statistics of its own, as sync_batch_norm needs CUDA")
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-0000006"]


def test_two_processes_killed_in_a_step_in_a_checkpoint_and_one_alone_end_with_the_same_bits(
    data: Path, tmp_path: Path, whole: tuple[Path, str]
) -> None:
    out = tmp_path / "run"
    latest = out / "checkpoints" / "latest"

    run = torchrun(data, out, "step:8")  # in the second part of step 4
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert latest.read_text() == "step-0000002"

    run = torchrun(data, out, "write:1")  # that of step 4
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert latest.read_text() == "step-0000002"
    half = out / "checkpoints" / ".step-0000004" / "state.pt"
    assert 0 < half.stat().st_size < (out / "checkpoints" / "step-0000002" / "state.pt").stat().st_size

    left, killed = without_agent(data, out, "alone:6")  # in the second part of step 5
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert left.returncode not in (0, -signal.SIGKILL)  # 1; rarely gloo's threads abort while Python shuts down
    sentence = "another process of this run has ended: its own message says why; the same command continues from the "
    assert f"{sentence}last checkpoint." in left.stderr
    assert latest.read_text() == "step-0000004"
    assert not (out / "model.safetensors").exists()

    run = torchrun(data, out, "end")
    assert run.returncode == 0, run.stderr
    assert f"resuming {out} after step 4 of 6" in run.stdout.splitlines()
    for mine, never_killed in zip(results(out), results(whole[0])):
        assert same_weights(mine, never_killed)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step-0000006"]


def test_two_processes_are_one_that_takes_their_parts_one_after_the_other(
    data: Path, tmp_path: Path, whole: tuple[Path, str]
) -> None:
    """Batch statistics are those of a part; running ones are the first process's own."""
    config = everything_on(data, tmp_path)
    config.accumulate = 4
    model = train(config, say=silent, progress=False)
    of_two, _ = results(whole[0])
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, of_two[name], rtol=1e-4, atol=1e-6)


def test_two_processes_train_queries_and_joint_blocks_as_one_does_that_takes_their_parts(
    data: Path, tmp_path: Path
) -> None:
    """Masks are counted over the processes of a part: all images have as many here, so that it makes no difference."""
    run = torchrun(data, tmp_path / "two", "masks")
    assert run.returncode == 0, run.stderr
    first, second = results(tmp_path / "two")
    assert same_weights(first, second)
    config = everything_on(data, tmp_path / "one", head="eomt")
    config.accumulate = 4
    model = train(config, say=silent, progress=False)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-6)


def test_two_agents_of_one_process_each_train_the_model_of_one_agent_with_two(
    data: Path, tmp_path: Path, whole: tuple[Path, str]
) -> None:
    out, meeting = tmp_path / "run", f"127.0.0.1:{free_port()}"
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    agents = [drive(data, out, "end", (*launcher, "--rdzv-endpoint", meeting, "--rdzv-id", "two")) for _ in range(2)]
    for agent in map(ended, agents):
        assert agent.returncode == 0, agent.stderr
    for mine, of_one_agent in zip(results(out), results(whole[0])):
        assert same_weights(mine, of_one_agent)
