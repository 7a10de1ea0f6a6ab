"""A training run that ends itself: `python -m tests.training.driver DATA OUT WHEN THREADS`.

WHEN: `step:N` in the middle of step N (before its gradient), `write:N` in the middle of the N-th checkpoint's
weights, `rename` and `pointer` just before the second checkpoint is renamed or named `latest`, `forget` just before the
first one is removed; `interrupt:N` sends itself Ctrl-C in step N. Of several processes, whoever gets there takes all
others and those who started them along; `alone:N` is the end of the second one alone, in its N-th backward pass. `end`
is a run that comes to its end and leaves each process's weights as `OUT.RANK.pt`; so is `masks`, of EoMT.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tests.training.tiny import everything_on, steady_run
from tokenexit.training.loop import train

SAVE = torch.save
ROOT = Path(__file__).resolve().parents[2]


def drive(
    data: Path, out: Path, when: str, launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start this program, through `python launcher` if given."""
    threads = str(torch.get_num_threads())  # another number may round differently
    command = [sys.executable, *launcher, "-m", "tests.training.driver", str(data), str(out), when, threads]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {
        "PYTHONPATH": paths,
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
    }
    variables = os.environ | variables | dict(environment or {})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables, cwd=ROOT)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """The process when it has come to its end."""
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def kill_everybody(out: str) -> None:
    """This process, and if it is one of several, the others and the agent that started them, as a power cut does."""
    rest = [int(path.read_text()) for path in Path(out).parent.glob(f"{Path(out).name}.*.pid")]
    agents = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
    for process in (*agents, *(process for process in rest if process != os.getpid()), os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def on_call(
    number: int, function: Callable[..., Any], end: Callable[[], None], half: Callable[..., None] | None = None
) -> Any:
    """`function`, but the call of this number ends the run instead of doing its work, or after half of it."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return function(*args, **kwargs)
        if half is not None:
            half(*args)
        end()
        return function(*args, **kwargs)

    return counted


def half_a_file(state: Any, path: Path) -> None:
    whole = path.with_suffix(".whole")
    SAVE(state, whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()


def main(data: str, out: str, when: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    rank, several = os.environ.get("RANK", "0"), "RANK" in os.environ
    kind, _, number = when.partition(":")
    kill = partial(kill_everybody, out)
    if kind in ("step", "interrupt") or (kind == "alone" and rank == "1"):
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell that runs the tests in the background ignores it
        itself = partial(os.kill, os.getpid(), signal.SIGINT if kind == "interrupt" else signal.SIGKILL)
        backward: Any = Accelerator.backward
        end = kill if kind == "step" else itself
        Accelerator.backward = on_call(int(number), backward, end)  # type: ignore[method-assign]
    elif kind == "write":
        torch.save = on_call(int(number), torch.save, kill, half_a_file)
    elif kind in ("rename", "pointer"):  # each checkpoint is renamed, then the pointer
        os.replace = on_call(3 if kind == "rename" else 4, os.replace, kill)  # type: ignore[assignment]
    elif kind == "forget":
        remove: Any = shutil.rmtree
        shutil.rmtree = on_call(3, remove, kill)  # type: ignore[assignment]
    if several:
        Path(f"{out}.{rank}.pid").write_text(str(os.getpid()))
    run = partial(everything_on, head="eomt") if kind == "masks" else everything_on if several else steady_run
    model = train(run(Path(data), Path(out)), say=print, progress=False)
    SAVE(model.state_dict(), f"{out}.{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
