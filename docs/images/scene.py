"""The image of the README: a drawn scene, the dense answer, DToP's, and where its compute went.

python docs/images/scene.py runs/quickstart/model docs/images/scene.png --budget 0.6 --scene 9

Its model was made by `tokenexit quickstart --minutes 25`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.targets import Budget
from tokenexit.data.registry import open_dataset
from tokenexit.methods import Dense, DToP, build_method
from tokenexit.report.examples import example
from tokenexit.report.pictures import panel
from tokenexit.segmenter import ExitSegmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--scene", type=int, default=9)
    options = parser.parse_args()
    model = ExitSegmenter.from_pretrained(options.model)
    val, test = (open_dataset("scenes", None, split) for split in ("val", "test"))
    found = calibrate(CalibrationSet(model, val, range(50)), DToP(), Budget("budget", options.budget))
    image, _, dense, dtop, exits = example(
        model, test[options.scene], [Dense(), build_method(found.method)], test.labels
    )
    titles = (
        "a drawn scene",
        f"dense, {dense.note}",
        f"DToP, {dtop.note}",
        "where patches left: the darker, the later",
    )
    figures = (image, dense, dtop, exits)
    panel([(title, figure.image) for title, figure in zip(titles, figures)], height=256).save(options.picture)


if __name__ == "__main__":
    main()
