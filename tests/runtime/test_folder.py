import os

import pytest

from tokenexit.runtime.folder import COMMITTED, current, replaced_together, settle


def contents(folder):
    """What a reader sees."""
    return {name: current(folder, name).read_text() for name in "abc" if current(folder, name).exists()}


def put(folder, **files):
    with replaced_together(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def test_replaced_together__leaves_the_new_files_and_those_of_other_names(tmp_path):
    put(tmp_path / "m", a="1", b="1", c="1")
    put(tmp_path / "m", a="2", b="2")
    assert contents(tmp_path / "m") == {"a": "2", "b": "2", "c": "1"}
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["a", "b", "c"]


def test_replaced_together__a_failure_in_the_block_leaves_all_as_it_was(tmp_path):
    put(tmp_path, a="1", b="1")
    with pytest.raises(KeyboardInterrupt), replaced_together(tmp_path) as new:
        (new / "a").write_text("2")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a": "1", "b": "1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("stop", range(6))
def test_replaced_together__stopped_before_any_step_a_reader_sees_old_or_new(tmp_path, monkeypatch, stop):
    put(tmp_path, a="1", b="1")
    steps = []

    def stopping(true):
        def step(*args):
            steps.append(true.__name__)
            if len(steps) > stop:
                raise SystemExit  # as a kill, nothing after it runs
            return true(*args)

        return step

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "rmdir"):
            patched.setattr(os, name, stopping(getattr(os, name)))
        patched.setattr("shutil.rmtree", lambda *args, **options: None)
        try:
            put(tmp_path, a="2", b="2", c="2")
        except SystemExit:
            assert len(steps) == stop + 1
    seen = contents(tmp_path)
    assert seen in ({"a": "1", "b": "1"}, {"a": "2", "b": "2", "c": "2"})
    assert (seen["a"] == "2") == (stop > 0)
    settle(tmp_path)
    assert contents(tmp_path) == seen
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(seen)


def test_replaced_together__removes_what_killed_calls_left(tmp_path):
    for name in (".saving-1", ".saving-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("0")
    put(tmp_path, a="1")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_replaced_together__of_one_file_needs_no_second_step(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", None)
    put(tmp_path, a="1")
    assert contents(tmp_path) == {"a": "1"}


def test_current__finds_files_that_a_killed_call_had_committed(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "a").write_text("2")
    assert current(tmp_path, "a").read_text() == "2"
    assert current(tmp_path, "b") == tmp_path / "b"


def test_replaced_together__honours_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        put(tmp_path / "m", a="1", b="1")
    finally:
        os.umask(before)
    assert (tmp_path / "m" / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750
