"""What is to be predicted, and how its results are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenexit.errors import DataError
from tokenexit.sources import Job, jobs_of, list_pictures, list_sources


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a/1.jpg", "in/a/2.png", "in/b/1.jpg", "in/c.jpg", "in/v.mp4", "other/1.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return Path("in")


def listed(*lines: str, name: str = "list.txt", end: str = "\n") -> Path:
    Path(name).write_bytes(end.join([*lines, ""]).encode())
    return Path(f"@{name}")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_list__names_pictures_by_lines_and_results_below_their_common_folder(photos: Path, end: str) -> None:
    jobs = list_sources([listed("in/b/1.jpg", "", "in/a/1.jpg", "in/b/1.jpg", end=end)])
    assert jobs == {Path("in/b/1.jpg"): "b/1", Path("in/a/1.jpg"): "a/1"}
    assert list_sources([listed("in/a/2.png", "in/a/1.jpg")]) == {Path("in/a/2.png"): "2", Path("in/a/1.jpg"): "1"}
    assert list_sources([listed(str(photos.resolve() / "c.jpg"), "other/1.jpg")]) == {
        photos.resolve() / "c.jpg": "in/c",
        Path("other/1.jpg"): "other/1",
    }


def test_list__may_name_folders_and_videos_and_stand_beside_others(photos: Path) -> None:
    jobs = list_sources([Path("other/1.jpg"), listed("in/a", "in/v.mp4")])
    assert list(jobs.items()) == [
        (Path("other/1.jpg"), "1"),
        (Path("in/a/1.jpg"), "a/1"),
        (Path("in/a/2.png"), "a/2"),
        (Path("in/v.mp4"), "v"),
    ]


def test_list__that_names_nothing_or_is_not_there_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"^list 'list\.txt' is empty: write the path of an image in each line\.$"):
        list_sources([listed("", "  ")])
    with pytest.raises(DataError, match=r"^list 'nope\.txt' cannot be read \(No such file or directory\): check the p"):
        list_sources([Path("@nope.txt")])


def test_pictures__are_those_of_a_folder_and_no_videos(photos: Path) -> None:
    assert list(list_pictures([photos]).values()) == ["a/1", "a/2", "b/1", "c"]
    with pytest.raises(DataError, match=r"^in/v\.mp4 is a video: give images, such as its frames\.$"):
        list_pictures([photos / "v.mp4"])


def test_jobs__are_pictures_or_films_of_a_folder_and_videos(photos: Path) -> None:
    sources, out = [photos, photos / "v.mp4"], Path("out")
    single = jobs_of(list_sources(sources, out), films=False)
    assert [(job.name, job.size) for job in single] == [("a/1", 1), ("a/2", 1), ("b/1", 1), ("c", 1), ("v", 1)]
    assert single[-1] == Job("v", video=photos / "v.mp4")
    films = jobs_of(list_sources(sources, out), films=True)
    assert [(job.name, [name for _, name in job.pictures]) for job in films] == [
        ("a", ["a/1", "a/2"]),
        ("b", ["b/1"]),
        ("in", ["c"]),
        ("v", []),
    ]
