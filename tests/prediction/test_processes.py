"""Several machines predict one folder, are killed, and go on where they were: nothing is lost or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_segmenter
from tests.prediction.test_predict_files import METHOD, RESULTS, noise
from tests.training.driver import ROOT, ended, free_port
from tokenexit.cli import main

pytestmark = pytest.mark.slow

OPTIONS = ("--method", "dtop", "--threshold", str(METHOD.threshold), "--keep-per-class", "1", "--device", "cpu")
SIZES = ((20, 30), (9, 9), (17, 23), (20, 30), (8, 40), (12, 12), (31, 7))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_segmenter("fcn").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n, size in enumerate(SIZES):
        (folder / f"{n % 2}").mkdir(exist_ok=True)
        noise(*size, seed=n).save(folder / f"{n % 2}" / f"{n}.png")
    return folder


def two_machines(pids: Path, death: tuple[int, int], *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Two agents of one process each. death: which process ends all, after how many saved images."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two"]
    command = [*launcher, "-m", "tests.prediction.driver", pids, *death, "predict", *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    return [ended(agent) for agent in agents]


def whole_files(out: Path) -> dict[str, int]:
    """Every file that has its name, and when it was written; all are images that can be decoded."""
    files = [path for path in out.rglob("*.*") if not path.name.startswith(".") and path.suffix in (".png", ".jpg")]
    for path in files:
        with Image.open(path) as image:
            image.load()
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


def test_two_machines_killed_in_a_write_go_on_and_leave_what_one_process_does(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert main(["predict", str(model), str(photos), "--out", str(alone), *OPTIONS]) == 0
    capsys.readouterr()
    arguments = (model, photos, "--out", out, *OPTIONS)

    for agent in two_machines(tmp_path / "first", (1, 4), *arguments):
        assert agent.returncode == -signal.SIGKILL, agent.stderr
    before = whole_files(out)
    assert 0 < len(before) < len(SIZES) * len(RESULTS)
    done = {name.split(".")[0] for name in before}
    done = {name for name in done if all(f"{name}{suffix}" in before for suffix in RESULTS)}
    assert 0 < len(done) < len(SIZES)

    first, second = sorted(two_machines(tmp_path / "second", (-1, 0), *arguments), key=lambda agent: -len(agent.stdout))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.splitlines() == [
        f"already there and left as they are: {len(done)} (--overwrite makes them again)",
        f"masks, overlays and exit maps: {out}",
    ]
    assert second.stdout == ""
    after, expected = whole_files(out), whole_files(alone)
    assert sorted(after) == sorted(expected)
    for name in expected:
        if name.split(".")[0] in done:
            assert after[name] == before[name], f"{name} was made twice"
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), np.asarray(Image.open(alone / name)))

    capsys.readouterr()
    assert main(["predict", *map(str, arguments)]) == 0  # one process finds what two have made
    assert capsys.readouterr().out.startswith(f"already there and left as they are: {len(SIZES)} ")
    assert whole_files(out) == after


def test_a_bad_image_of_one_machine_is_reported_once_and_both_end_with_1(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(4):
        noise(8, 12, seed=n).save(tmp_path / "in" / f"{n}.png")
    (tmp_path / "in" / "1.png").write_bytes(b"no image")
    out = tmp_path / "out.zip"
    agents = two_machines(tmp_path / "run", (-1, 0), model, tmp_path / "in", "--out", out, *OPTIONS)
    assert [agent.returncode for agent in agents] == [1, 1]
    said = "".join(agent.stderr for agent in agents)
    assert said.count(f"tokenexit predict: image '{tmp_path / 'in' / '1.png'}' cannot be decoded") == 1
    assert out.exists()
    assert not (tmp_path / "out.zip.parts").exists()
