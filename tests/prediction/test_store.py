"""A folder of results, and a zip that is one until all is done."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tokenexit.errors import ConfigError
from tokenexit.prediction.store import OutputFolder


def test_output_folder__a_folder_holds_files_by_name(tmp_path: Path) -> None:
    place = OutputFolder(tmp_path / "new" / "out")
    assert place.files() == set()
    assert place.read("a.json") is None
    place.open()
    place.write("a.json", "[1]")
    place.write("sub/b.txt", "b")
    assert place.files() == {"a.json", "sub/b.txt"}
    assert place.read("a.json") == [1]
    place.forget(["a.json", "never.txt"])
    place.close()
    assert place.files() == {"sub/b.txt"}


def test_output_folder__a_zip_appears_at_the_end_and_is_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    place = OutputFolder(out)
    place.open()
    place.write("a/1.json", "1")
    place.write(".parts/a.json", "2")
    (place.folder / ".half.png").write_bytes(b"half")
    assert not out.exists()
    place.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
    assert sorted(zipfile.ZipFile(out).namelist()) == [".parts/a.json", "a/1.json"]

    later = OutputFolder(out)
    assert later.files() == {".parts/a.json", "a/1.json"}
    assert later.read("a/1.json") == 1
    assert later.read("b.json") is None
    later.open()
    later.write("b.json", "3")
    assert OutputFolder(out).files() == {".parts/a.json", "a/1.json", "b.json"}  # a killed call is gone on with
    assert len(zipfile.ZipFile(out).namelist()) == 2  # the old one is whole until then
    later.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
    assert sorted(zipfile.ZipFile(out).namelist()) == [".parts/a.json", "a/1.json", "b.json"]


def test_output_folder__what_is_no_zip_or_cannot_be_written_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK but no more")
    with pytest.raises(ConfigError, match=r"bad\.zip is no zip that can be read: remove it, or choose another name\."):
        OutputFolder(tmp_path / "bad.zip").files()
    for below in ("bad.zip/out", "bad.zip/sub/out.zip"):
        with pytest.raises(ConfigError, match=r"^results cannot be written to .* \(.*\): choose another folder\.$"):
            OutputFolder(tmp_path / below).open()
    (tmp_path / "folder.zip").mkdir()
    place = OutputFolder(tmp_path / "folder.zip")
    with pytest.raises(ConfigError, match="no zip that can be read"):
        place.files()
