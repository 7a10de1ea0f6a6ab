"""What is to be predicted, and how its results are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenexit.errors import DataError
from tokenexit.inputs import heic
from tokenexit.inputs.sources import SUFFIXES, WorkItem, jobs_of, list_images, list_sources, name_apart, quiet


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
def test_list__names_images_by_lines_and_results_below_their_common_folder(photos: Path, end: str) -> None:
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


def test_images__are_those_of_a_folder_and_no_videos(photos: Path) -> None:
    assert list(list_images([photos]).values()) == ["a/1", "a/2", "b/1", "c"]
    with pytest.raises(DataError, match=r"^in/v\.mp4 is a video: give images, such as its frames\.$"):
        list_images([photos / "v.mp4"])


def test_work_items__are_images_or_films_of_a_folder_and_videos(photos: Path) -> None:
    sources, out = [photos, photos / "v.mp4"], Path("out")
    single = jobs_of(list_sources(sources, out), films=False)
    assert [(job.name, job.size) for job in single] == [("a/1", 1), ("a/2", 1), ("b/1", 1), ("c", 1), ("v", 1)]
    assert single[-1] == WorkItem("v", video=photos / "v.mp4")
    films = jobs_of(list_sources(sources, out), films=True)
    assert [(job.name, [name for _, name in job.images]) for job in films] == [
        ("a", ["a/1", "a/2"]),
        ("b", ["b/1"]),
        ("in", ["c"]),
        ("v", []),
    ]


def test_folders__say_what_they_are_passed_over_for(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.avif", "a/y.JP2", "a/z.heic", "b/z.HEIC", "notes.txt", "README", ".hidden.jpg", "more.psd"):
        (photos / name).write_bytes(b"")
    (photos / "folder.jpg").mkdir()
    said: list[str] = []
    monkeypatch.setattr(heic, "is_available", lambda: False)
    named = list_sources([photos], say=said.append)
    assert [named[path] for path in named] == ["a/1", "a/2", "a/x", "a/y", "b/1", "c"]
    assert said == [
        f"passed over in in: 2 .heic, 1 .mp4, 1 .psd, 1 .txt, 1 without a suffix ({heic.CURE}; name videos one by one)."
    ]
    monkeypatch.setattr(heic, "is_available", lambda: True)
    said.clear()
    assert "a/z" in list_sources([photos], say=said.append, suffixes=SUFFIXES | heic.SUFFIXES).values()
    assert said == ["passed over in in: 1 .mp4, 1 .psd, 1 .txt, 1 without a suffix (name videos one by one)."]


def test_list__of_lines_that_end_in_zero_bytes_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"^list 'list\.txt' holds zero bytes: write one path in each line, as find"):
        list_sources([listed("in/c.jpg\0in/a/1.jpg\0")])


def test_name_apart__names_are_distinct_wherever_suffixes_can_make_them_so() -> None:
    def files(path: Path, name: str) -> list[str]:
        return [f"{name}.png", f"{name}.exits.png"]

    plain = {
        Path(name): str(Path(name).with_suffix("")) for name in ("a.jpg", "a.gif", "a.gif.png", "b.jpg", "c/a.jpg")
    }
    said: list[str] = []
    apart = name_apart(plain, files, said.append)
    assert list(apart.values()) == ["a.jpg", "a.gif", "a.gif.png", "b", "c/a"]
    assert name_apart(apart, files, said.append) == apart
    assert len(said) == 1
    same = {Path("x/a.jpg"): "a", Path("y/a.jpg"): "a"}
    assert list(name_apart(same, files, quiet).values()) == ["a.jpg", "a.jpg"]  # for the caller to refuse
    many = {Path(f"{n}.{kind}"): f"{n}" for n in range(30) for kind in ("jpg", "png")}
    name_apart(many, files, said.append)
    assert said[1].endswith(", 9.png as 9.png, and 40 more.")
