"""Run-length encoding (RLE) of label maps as COCO defines it: counts of every class, and their text.

Legend: H, W height and width in pixels. Runs go down the columns, left to right, and begin with background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def run_lengths(labels: npt.ArrayLike) -> dict[int, list[int]]:
    """Return, for every class in an `(H, W)` map, run lengths of other, own, other, ... pixels, column by column."""
    flat = np.asarray(labels).ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    classes = flat[starts]
    lengths = {}
    for k in np.unique(classes):
        own = classes == k
        edges = np.stack([starts[own], ends[own]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=flat.size)
        lengths[int(k)] = (counts if counts[-1] else counts[:-1]).tolist()
    return lengths


def compressed(counts: Sequence[int]) -> str:
    """Encode run lengths as the text that COCO's tools read.

    From the fourth on, each is stored as its difference to the one two before; five bits to a character, least first,
    with a sixth for "more follows", from character 48 on.
    """
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = rest & 0x1F
            rest >>= 5
            more = rest != (-1 if bits & 0x10 else 0)  # the highest bit written is the sign
            text.append(chr((bits | (0x20 if more else 0)) + 48))
    return "".join(text)
