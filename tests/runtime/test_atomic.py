"""Files appear whole or not at all, and are as open to others as the user's umask says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from safetensors.torch import save_file

from tokenexit.errors import ConfigError
from tokenexit.runtime.atomic import atomic_folder, atomic_write


def test_whole__the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("new")
        assert unfinished.suffix == ".txt"
        assert not (tmp_path / "a.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_whole__an_interrupted_block_leaves_the_older_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(interruption), atomic_write(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise interruption
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def permissions_of(path: Path) -> int:
    return S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_whole__new_and_replaced_files_have_the_permissions_that_the_umask_grants(
    mask: int, umask: Callable[[int], int], tmp_path: Path
) -> None:
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "old.txt").chmod(0o600)
    umask(mask)
    for name in ("old.txt", "new.txt"):
        with atomic_write(tmp_path / name) as unfinished:
            unfinished.write_text("new")
        assert permissions_of(tmp_path / name) == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.txt", "old.txt"]


def test_whole__a_writer_that_replaces_the_temporary_file_does_not_make_it_private(
    umask: Callable[[int], int], tmp_path: Path
) -> None:
    umask(0o022)
    with atomic_write(tmp_path / "a.safetensors") as unfinished:
        save_file({"a": torch.zeros(1)}, unfinished)
    assert permissions_of(tmp_path / "a.safetensors") == 0o644


def test_folder__appears_when_the_block_ends_and_replaces_an_older_one(tmp_path: Path) -> None:
    for turn in ("old", "new"):
        with atomic_folder(tmp_path / "made", "mark") as unfinished:
            (unfinished / "mark").write_text(turn)
            (unfinished / turn).write_text("")
            assert (tmp_path / "made").exists() == (turn == "new")
        assert [path.name for path in tmp_path.iterdir()] == ["made"]
        assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["mark", turn]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_folder__an_interrupted_block_leaves_the_older_one(tmp_path: Path, interruption: type[BaseException]) -> None:
    with atomic_folder(tmp_path / "made", "mark") as unfinished:
        (unfinished / "mark").write_text("old")
    with pytest.raises(interruption), atomic_folder(tmp_path / "made", "mark") as unfinished:
        (unfinished / "mark").write_text("half")
        raise interruption
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "mark").read_text() == "old"


def test_folder__of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("folder", "file"):
        with pytest.raises(ConfigError, match="is no folder with mark"), atomic_folder(tmp_path / name, "mark"):
            pytest.fail("nothing may be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", "mark") as unfinished:
        (unfinished / "mark").write_text("")
    assert (tmp_path / "empty" / "mark").exists()
