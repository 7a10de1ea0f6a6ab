"""Unlabelled photos: which of them can be used, and how they are shared out.

Exit heads are fitted on one part, a plan is chosen on the second, and what is said of it is measured on the third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenexit.calibration.targets import Bound, CalibrationTarget
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import load_image

FEWEST, FEW = 60, 200
"""Numbers of photos below which adapting is refused, and below which it is warned of."""
CHOOSE, TEST = 0.2, 0.2
"""Shares of the photos for two parts; a bound takes more for its test, and heads are fitted on the rest."""
MOST_TEST = 0.5
"""Share of the photos that are tested on at most, whatever a bound would take."""
LEAST = 5
"""Photos of which every part has some."""
ROOM = 2.0
"""Photos to test a bound on, as a multiple of those without which nothing could pass."""


@dataclass(frozen=True)
class PhotoSplit:
    """Indices of photos, in three parts that share none.

    Attributes:
        fit: photos that exit heads are fitted on.
        choose: photos that the plan is chosen on.
        test: photos that nothing was chosen on.
    """

    fit: tuple[int, ...]
    choose: tuple[int, ...]
    test: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.fit)} to fit exit heads, {len(self.choose)} to choose, {len(self.test)} to test"


def split_photos(count: int, target: CalibrationTarget, seed: int, fewest: int = FEWEST) -> PhotoSplit:
    """Draw the three parts at random.

    Args:
        count: number of photos.
        target: a budget, or a bound, whose test needs the more photos the tighter it is.
        seed: seed of the draw.
        fewest: number of photos below which there is no point in trying.

    Raises:
        ConfigError: for too few photos, with the number that is needed.
    """
    test = TEST * count
    needed, why = max(fewest, LEAST), ""
    if isinstance(target, Bound):
        least = target.needed_images()
        needed = max(needed, math.ceil(least / MOST_TEST))
        if needed > fewest:
            why = f": {target.what}={target.value:g} at confidence {target.confidence:g} takes {least} to test on alone"
        test = min(max(test, ROOM * least), MOST_TEST * count)
    if count < needed:
        raise ConfigError(
            f"adapting needs at least {needed} photos, got {count}{why}; give more, and a limit that takes them."
        )
    tested, chosen = round(test), round(CHOOSE * count)
    order = _shuffled(count, seed)
    parts = order[:tested], order[tested : tested + chosen], order[tested + chosen :]
    tests, choose, fit = (tuple(sorted(part)) for part in parts)
    return PhotoSplit(fit, choose, tests)


def usable_photos(
    paths: Sequence[Path],
    patch_size: int,
    limit: int,
    seed: int,
    say: Callable[[str], None],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Path]:
    """Draw photos that can be read and are no smaller than a patch, in order, and say which others are left out.

    Each is decoded once, since a file that breaks off later would end an hour's work; no more than are drawn.

    Args:
        paths: the photos to draw from.
        patch_size: side of a patch in pixels.
        limit: largest number of photos.
        seed: seed of the draw.
        say: shows a line.
        progress: wraps the loop over photos.
    """
    order = range(len(paths)) if len(paths) <= limit else _shuffled(len(paths), seed)
    found: list[int] = []
    for n in progress(order):
        if why := _unusable(paths[n], patch_size):
            say(f"left out: {why}")
            continue
        found.append(n)
        if len(found) == limit:
            break
    return [paths[n] for n in sorted(found)]


def _unusable(path: Path, patch_size: int) -> str:
    """Say why a photo cannot be used; nothing if it can."""
    try:
        image = load_image(path)
    except DataError as error:
        return str(error)
    if min(image.size) < patch_size:
        return f"{path} has {image.width}x{image.height} pixels, fewer than a patch of {patch_size}"
    return ""


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
