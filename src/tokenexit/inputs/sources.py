"""Sources of a prediction are images, folders and lists of them, and videos; here their results get names."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs import heic

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc"),
}
"""Image files that a folder is searched for: what Pillow itself decodes."""
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
RECORD = "predictions.json"
"""A file in every folder of results that records what they were made with."""

Say = Callable[[str], None]
"""A function that shows a sentence to the user."""


def quiet(sentence: str) -> None:
    """Show nothing."""


def is_video(path: Path) -> bool:
    """Return whether the suffix is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def list_sources(
    sources: Sequence[Path], out: Path | None = None, say: Say = quiet, suffixes: Collection[str] = SUFFIXES
) -> dict[Path, str]:
    """List images and videos, each once and in order, with the relative names of their results.

    sources: files; folders, whose images are taken to their depth (videos are named one by one); and lists,
        `@FILE` with a path in each line, relative to the working folder. Names are relative to a folder that was
        given, and to the deepest folder that all of a list share; bytes that are no text are written as `%FF`.
    out: the folder of the results, which is passed over. So are hidden files, and folders with results of other calls.
    say: shows what else is passed over in folders. suffixes: those of images, for which folders are searched.

    Raises `DataError` for a folder or list that names nothing and for a folder of results, and `ConfigError` for a
    folder that is `out`.
    """
    named: dict[Path, str] = {}
    for source in sources:
        if str(source).startswith("@"):
            for path, name in _listed(Path(str(source)[1:]), out, say, suffixes):
                named.setdefault(path, name)
        elif os.path.isdir(source):
            named |= {path: _name(path.relative_to(source)) for path in _inside(source, out, say, suffixes)}
        else:
            named.setdefault(source, _name(Path(source.name)))
    return named


def list_images(sources: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """List images as `list_sources` does, for callers that take no videos: raises `DataError` for one."""
    named = list_sources(sources, out)
    for path in filter(is_video, named):
        raise DataError(f"{path} is a video: give images, such as its frames.")
    return named


def _inside(folder: Path, out: Path | None, say: Say, suffixes: Collection[str]) -> list[Path]:
    """List the images below a folder, in the order of their paths."""
    results = None if out is None else os.path.realpath(out)
    if results == os.path.realpath(folder):
        raise ConfigError(
            f"{out} is both a folder of images and the place of results, which later calls would take for images: "
            "choose another folder for the results."
        )
    if (folder / RECORD).is_file():
        raise DataError(
            f"{folder} holds results of an earlier call ({RECORD}): give the folder of the images, or name images one "
            "by one."
        )
    found: list[Path] = []
    others: Counter[str] = Counter()
    for path, below, files in os.walk(folder, onerror=lambda error: _say_unreadable(error, say)):
        below[:] = sorted(name for name in below if not _is_passed_over(Path(path, name), results, say))
        for file in (Path(path, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() in suffixes and os.path.isfile(file):
                found.append(file)
            else:
                others[file.suffix.lower() or "without a suffix"] += 1
    if others:
        say(f"passed over in {folder}: {_counted(others)}.")
    if not found:
        raise DataError(f"{folder} holds no image: name a folder with {', '.join(sorted(suffixes))} files.")
    return sorted(found)


def _is_passed_over(folder: Path, results: str | None, say: Say) -> bool:
    if folder.name.startswith(".") or results == os.path.realpath(folder):
        return True
    holds_results = (folder / RECORD).is_file()
    if holds_results:
        say(f"passed over {folder}, which holds results of an earlier call ({RECORD}).")
    return holds_results


def _say_unreadable(error: OSError, say: Say) -> None:
    say(f"passed over {error.filename}, which cannot be read ({error.strerror}).")


def _counted(others: Mapping[str, int]) -> str:
    """Count files by suffix, and say what can be done about those that could be read."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    cures = []
    if heic.SUFFIXES & others.keys() and not heic.is_available():
        cures.append(heic.CURE)
    if VIDEO_SUFFIXES & others.keys():
        cures.append("name videos one by one")
    return f"{counts} ({'; '.join(cures)})" if cures else counts


def _listed(file: Path, out: Path | None, say: Say, suffixes: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files of a list, and names of results below the deepest folder that holds all of them."""
    try:  # names of files need not be text
        content = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"list '{file}' cannot be read ({error.strerror}): check the path.") from None
    if "\0" in content:
        raise DataError(f"list '{file}' holds zero bytes: write one path in each line, as find prints it.")
    paths = [Path(line) for line in (line.strip("\r") for line in content.split("\n")) if line.strip()]
    if not paths:
        raise DataError(f"list '{file}' is empty: write the path of an image in each line.")
    common = os.path.commonpath([os.path.abspath(path if os.path.isdir(path) else path.parent) for path in paths])
    for path in paths:
        for inside in _inside(path, out, say, suffixes) if os.path.isdir(path) else [path]:
            yield inside, _name(Path(os.path.relpath(os.path.abspath(inside), common)))


def _name(path: Path) -> str:
    return _as_text(str(path.with_suffix("")))


def _as_text(name: str) -> str:
    """Write the bytes of a file name that are no text as `%FF`, so that JSON, XML and zips can hold it."""
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in name)


def name_apart(named: Mapping[Path, str], files: Callable[[Path, str], Iterable[str]], say: Say) -> dict[Path, str]:
    """Keep the suffixes in the names of sources whose results would meet: `a.jpg`, `a.png` instead of `a` twice.

    files: every file that a source of that name may leave. Those that still meet, such as `x/a.jpg` and `y/a.jpg`
    given one by one, are left to the caller.
    """
    apart = dict(named)
    renamed: dict[Path, str] = {}
    while meeting := [path for path in _meeting(apart, files) if path not in renamed]:
        renamed |= {path: _as_text(apart[path] + path.suffix) for path in meeting}
        apart |= renamed
    if renamed:
        words = [f"{path} as {name}" for path, name in renamed.items()]
        say(f"results that would meet are named with the suffixes of their sources: {at_most(words)}.")
    return apart


def _meeting(named: Mapping[Path, str], files: Callable[[Path, str], Iterable[str]]) -> list[Path]:
    sources: defaultdict[str, list[Path]] = defaultdict(list)
    for path, name in named.items():
        for file in files(path, name):
            sources[file].append(path)
    return list(dict.fromkeys(path for paths in sources.values() if len(paths) > 1 for path in paths))


def at_most(words: Sequence[str], most: int = 20) -> str:
    """Join the items of a sentence; of many, the first ones and the number of the rest."""
    rest = len(words) - most
    return ", ".join([*words[:most], *([f"and {rest} more"] if rest > 0 else [])])


@dataclass(frozen=True)
class WorkItem:
    """The work that one process takes at a time: an image, images that are the frames of a film, or a video.

    Attributes:
        name: name of its results.
        images: paths of images and the names of their results.
        video: a file to decode instead.
    """

    name: str
    images: tuple[tuple[Path, str], ...] = ()
    video: Path | None = None

    @property
    def path(self) -> Path:
        """The video, or the first image."""
        return self.video or self.images[0][0]

    @property
    def size(self) -> int:
        """Number of images, a video counting as one."""
        return len(self.images) or 1


def jobs_of(named: Mapping[Path, str], films: bool) -> list[WorkItem]:
    """Make work items of sources and the names of their results: images first, then videos.

    films: whether the images of a folder are the frames of one, in the order of their names.
    """
    videos = [WorkItem(name, video=path) for path, name in named.items() if is_video(path)]
    images = [(path, name) for path, name in named.items() if not is_video(path)]
    if not films:
        return [*(WorkItem(name, ((path, name),)) for path, name in images), *videos]
    folders = groupby(sorted(images), lambda image: image[0].parent)
    return [
        *(WorkItem(_name_of_film(folder, name), ((path, name), *rest)) for folder, ((path, name), *rest) in folders),
        *videos,
    ]


def _name_of_film(folder: Path, first: str) -> str:
    """Return the name of the folder, below the one that was given."""
    above = Path(first).parent
    return str(above) if above.name else _as_text(folder.resolve().name)


def frame_name(name: str, number: int) -> str:
    """Name the results of a video's frame. name: that of the video's results. number: from 1."""
    return f"{name}/{number:06d}"
