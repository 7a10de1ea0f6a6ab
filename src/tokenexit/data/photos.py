"""Images without masks: whatever a folder holds, to calibrate on, and to train on with a model as the teacher.

Every pixel is ignored, so what needs labels has none. The classes are not those of the data, but of the model that is
run on it: they are given as `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenexit.data.base import Sample
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import load_image
from tokenexit.inputs.labels import Labels
from tokenexit.inputs.sources import list_images

SPLIT = "train"
"""The one split: parts of a folder are named by their files."""


class UnlabelledImages:
    """Images from disk as a dataset whose masks say nothing.

    Attributes:
        paths: the files, in order.

    Raises:
        DataError: for folders and lists without images, and, when a sample is read, for files that cannot be read.
    """

    def __init__(self, sources: Sequence[Path], labels: Labels | None = None) -> None:
        """List the images.

        Args:
            sources: files, folders and lists of them, as `tokenexit.inputs.sources.list_images` takes them.
            labels: classes of the model that is run on the images; None where nobody asks for them.
        """
        self.paths = list(list_images(sources))
        self._labels = labels

    @property
    def labels(self) -> Labels:
        """Classes of the model that is run on the images. Raises `ConfigError` where they were not given."""
        if self._labels is None:
            raise ConfigError(
                "photos have no classes of their own: give those of a model as labels, or a dataset that has masks."
            )
        return self._labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Sample:
        image = load_image(self.paths[index])
        ignored = 255 if self._labels is None else self._labels.ignore_index
        return Sample(
            image, np.full((image.height, image.width), ignored, np.min_scalar_type(ignored)), str(self.paths[index])
        )


class Photos(UnlabelledImages):
    """The images below a folder, or some of them.

    root: holds the images, at any depth. split: "train", the only one. files: names of images or of folders with
    images, relative to root, as a list or as a text file with one in each line; all images if not given. labels: as in
    `UnlabelledImages`.

    Raises `DataError` where the folder or a file is missing, and for another split.
    """

    def __init__(
        self, root: str | Path, split: str, files: str | Sequence[str] | None = None, labels: Labels | None = None
    ) -> None:
        self.known_split(split)
        folder = Path(root).absolute()  # so that no name stands at the beginning, where @ means a list
        if not folder.is_dir():
            raise DataError(f"folder {str(root)!r} does not exist: give the folder of the photos.")
        names = [""] if files is None else _names(files)
        missing = next((name for name in names if not (folder / name).exists()), None)
        if missing is not None:
            raise DataError(
                f"file {missing!r} does not exist in {str(root)!r}: correct files, or leave it out for all."
            )
        super().__init__([folder / name for name in names], labels)

    @staticmethod
    def known_split(split: str) -> None:
        """Raise `DataError` for another split than the one there is."""
        if split != SPLIT:
            raise DataError(
                f"split {split!r} of photos is unknown: choose {SPLIT}, and name the images of a part as files."
            )

    @staticmethod
    def splits(root: str | Path) -> tuple[str, ...]:
        """Return the one split."""
        return (SPLIT,)


def _names(files: str | Sequence[str]) -> list[str]:
    """Return names as given, or those of a text file, one in each line."""
    if not isinstance(files, str):
        names = list(files)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError("files must be names of images, or a text file of them: give at least one.")
        return names
    try:
        lines = Path(files).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file {files!r} cannot be read ({error}): check that it lists names.") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{files!r} lists no names: write one a line.")
    return names
