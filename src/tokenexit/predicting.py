"""Pictures on disk in, masks, overlays and exit maps on disk out. One bad file does not stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokenexit.calibration.drift import Monitor, monitored
from tokenexit.errors import ConfigError, DataError
from tokenexit.methods import Method
from tokenexit.preprocessing import MAX_PIXELS, default_labels, load_image
from tokenexit.report.pictures import exit_map, overlay, palette_png
from tokenexit.segmenter import ExitSegmenter
from tokenexit.writing import whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
RESULTS = (".png", ".overlay.jpg", ".exits.png")


def predict_files(
    model: ExitSegmenter,
    sources: Sequence[Path],
    out: Path,
    method: Method[Any],
    *,
    precision: str = "fp32",
    max_pixels: int = MAX_PIXELS,
    monitor: Monitor | None = None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> list[str]:
    """Segment pictures and write, for each, `NAME.png` (palette mask at the picture's size, class per pixel),
    `NAME.overlay.jpg` and `NAME.exits.png` to `out`.

    sources: pictures, and folders whose pictures are taken with their sub-folders, but for those in `out`. max_pixels:
    larger pictures are refused. monitor: learns how sure the exits were of each picture. Returns one sentence for each
    picture that could not be segmented. Raises `ConfigError` for options that cannot work with this model or these
    pictures.
    """
    jobs = list_pictures(sources, out)
    check_targets(jobs, out)
    _make_folder(out)
    failed = []
    for path in progress(list(jobs)):
        try:
            with monitored(model, monitor):
                pictures = _predict_one(model, path, method, precision, max_pixels)
        except DataError as error:
            failed.append(str(error))
            continue
        try:
            _make_folder((out / jobs[path]).parent)
            for target, picture in zip(_targets(jobs[path], out), pictures):
                save_atomically(picture, target)
        except OSError as error:
            raise _unwritable(out, error) from None
    return failed


def list_pictures(sources: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """Pictures, each once, and the relative name of their results, in order; folders are searched to their depth.

    out: a folder that is passed over, since it holds results and no pictures. Hidden files are passed over, too.
    """
    jobs: dict[Path, str] = {}
    for source in sources:
        if source.is_dir():
            inside = [path for path in sorted(source.rglob("*")) if _is_picture(path, source, out)]
            if not inside:
                raise DataError(f"{source} holds no picture: name a folder with {', '.join(sorted(SUFFIXES))} files.")
            jobs |= {path: str(path.relative_to(source).with_suffix("")) for path in inside}
        else:
            jobs.setdefault(source, source.stem)
    return jobs


def check_targets(jobs: dict[Path, str], out: Path) -> None:
    """Refuse results that would take the place of each other or of a picture."""
    pictures = {path.resolve() for path in jobs}
    taken: dict[Path, Path] = {}
    for path, name in jobs.items():
        for target in _targets(name, out):
            if target.resolve() in pictures:
                raise ConfigError(f"{target} is a picture and would be overwritten: choose another folder for results.")
            if target in taken:
                raise ConfigError(
                    f"{taken[target]} and {path} would both be written to {target}: rename one, or predict them to "
                    "different folders."
                )
            taken[target] = path


def save_atomically(image: Image.Image, path: Path) -> None:
    """Write a picture so that the file is there whole or not at all."""
    with whole(path) as unfinished:
        image.save(unfinished)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"results cannot be written to {folder} ({reason}): choose another folder.")


def _is_picture(path: Path, folder: Path, out: Path | None) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    result = out is not None and out.resolve() != folder.resolve() and path.resolve().is_relative_to(out.resolve())
    return path.suffix.lower() in SUFFIXES and not hidden and not result and path.is_file()


def _targets(name: str, out: Path) -> list[Path]:
    return [out / f"{name}{suffix}" for suffix in RESULTS]


@torch.inference_mode()
def _predict_one(
    model: ExitSegmenter, path: Path, method: Method[Any], precision: str, max_pixels: int
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Mask, overlay and exit map of one picture, in the order of `RESULTS`."""
    picture = load_image(path, max_pixels)
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model.predict(picture, method)
        labels = output.labels[0].cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        raise DataError(
            f"image '{path}' of {picture.height}x{picture.width} pixels does not fit into memory: shrink it, or "
            "take it in windows."
        ) from None
    classes = model.preprocessing.labels or default_labels(model.config.num_classes)
    size, patch = (picture.height, picture.width), output.patch_size
    extent = (output.sizes[0][0] / patch, output.sizes[0][1] / patch)  # without the padding to whole patches
    stages = output.exit_stage[0].cpu().numpy()
    return (
        palette_png(labels, classes.palette),
        overlay(picture, labels, classes.palette),
        exit_map(stages, output.num_exits, size, image=picture, extent=extent),
    )
