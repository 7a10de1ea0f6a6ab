"""One image and the predictions of several methods, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenexit.data.base import Sample
from tokenexit.inputs.labels import Labels
from tokenexit.methods import Method
from tokenexit.report.html import Figure
from tokenexit.report.pictures import colorize, exit_map
from tokenexit.segmenter import ExitSegmenter


def example(model: ExitSegmenter, sample: Sample, methods: Sequence[Method[Any]], labels: Labels) -> list[Figure]:
    """Make figures of image, ground truth and, for every method, its prediction and (but for dense) its exit map."""
    figures = [
        Figure(sample.image, "image"),
        Figure(colorize(sample.mask, labels.palette, labels.ignore_index), "truth"),
    ]
    for method in methods:
        output = model.predict(sample.image, method)
        share = output.ledger.share_of_dense[0]
        predicted = colorize(output.labels[0].cpu().numpy(), labels.palette)
        figures.append(Figure(predicted, method.name, note=f"{output.ledger.gmacs[0]:.3f} GMACs"))
        if method.name != "dense":
            exit_index = output.exit_index[0].cpu().numpy()
            extent = (output.sizes[0][0] / output.patch_size, output.sizes[0][1] / output.patch_size)
            image = exit_map(exit_index, output.num_exits, sample.size, image=sample.image, extent=extent)
            figures.append(Figure(image, f"{method.name} exits", note=f"{share:.0%} of dense"))
    return figures
