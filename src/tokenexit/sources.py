"""What is to be predicted: pictures, folders and lists of them, videos; and how their results are called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tokenexit.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def list_sources(sources: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """Pictures and videos, each once, and the relative name of their results, in order.

    sources: files; folders, whose pictures are taken to their depth (videos are named one by one); and lists,
        `@FILE` with a path in each line, relative to the working folder. Names are relative to a folder that was
        given, and to the deepest folder that all of a list share. out: a folder that is passed over, since it holds
        results and no pictures. Hidden files are passed over, too.

    Raises `DataError` for a folder or list that names nothing.
    """
    jobs: dict[Path, str] = {}
    for source in sources:
        if str(source).startswith("@"):
            for path, name in _listed(Path(str(source)[1:]), out):
                jobs.setdefault(path, name)
        elif source.is_dir():
            jobs |= {path: _name(path.relative_to(source)) for path in _inside(source, out)}
        else:
            jobs.setdefault(source, source.stem)
    return jobs


def list_pictures(sources: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """As `list_sources`, for what works on pictures alone: raises `DataError` for a video."""
    jobs = list_sources(sources, out)
    for path in filter(is_video, jobs):
        raise DataError(f"{path} is a video: give pictures, such as its frames.")
    return jobs


def _inside(folder: Path, out: Path | None) -> list[Path]:
    real = folder.resolve()
    below = None if out is None or out.resolve() == real or not out.resolve().is_relative_to(real) else out.resolve()
    found = [path for path in sorted(folder.rglob("*")) if _is_picture(path, folder)]
    if below is not None:
        found = [path for path in found if not path.resolve().is_relative_to(below)]
    if not found:
        raise DataError(f"{folder} holds no picture: name a folder with {', '.join(sorted(SUFFIXES))} files.")
    return found


def _is_picture(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _listed(file: Path, out: Path | None) -> Iterator[tuple[Path, str]]:
    """What a list names, and names of results below the deepest folder that holds all of it."""
    try:  # names of files need not be text
        lines = file.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"list '{file}' cannot be read ({error.strerror}): check the path.") from None
    paths = [Path(line) for line in (line.strip("\r") for line in lines) if line.strip()]
    if not paths:
        raise DataError(f"list '{file}' is empty: write the path of a picture in each line.")
    common = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in paths])
    for path in paths:
        for inside in _inside(path, out) if path.is_dir() else [path]:
            yield inside, _name(Path(os.path.relpath(os.path.abspath(inside), common)))


def _name(path: Path) -> str:
    return str(path.with_suffix(""))


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """What one process takes: a picture, pictures that are the frames of a film, or a video.

    name: of its results. pictures: their paths and the names of their results. video: what to decode instead.
    """

    name: str
    pictures: tuple[tuple[Path, str], ...] = ()
    video: Path | None = None

    @property
    def path(self) -> Path:
        """Of the video, or the first picture."""
        return self.video or self.pictures[0][0]

    @property
    def size(self) -> int:
        """Pictures, a video counting as one."""
        return len(self.pictures) or 1


def list_jobs(sources: Sequence[Path], out: Path, films: bool) -> list[Job]:
    """films: whether the pictures of a folder are the frames of one, in the order of their names."""
    named = list_sources(sources, out).items()
    videos = [Job(name, video=path) for path, name in named if is_video(path)]
    pictures = [(path, name) for path, name in named if not is_video(path)]
    if not films:
        return [*(Job(name, ((path, name),)) for path, name in pictures), *videos]
    folders = groupby(sorted(pictures), lambda picture: picture[0].parent)
    return [
        *(Job(_name_of_film(folder, name), ((path, name), *rest)) for folder, ((path, name), *rest) in folders),
        *videos,
    ]


def _name_of_film(folder: Path, first: str) -> str:
    """That of the folder, below the one that was given."""
    above = Path(first).parent
    return str(above) if above.name else folder.resolve().name


def frame_name(job: Job, number: int) -> str:
    """Of the results of a video's frame, from 1."""
    return f"{job.name}/{number:06d}"
