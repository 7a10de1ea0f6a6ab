from pathlib import Path

import numpy as np
import pytest

from tests.data.pictures import write_pair
from tokenexit.data.camvid import CAMVID

ROOT = Path(__file__).parents[3] / "shared" / "data" / "camvid"
real = pytest.mark.skipif(not ROOT.is_dir(), reason=f"CamVid is not at {ROOT}")


def test_camvid__eleven_classes_with_their_usual_colours():
    colours = dict(zip(CAMVID.labels.names, CAMVID.labels.palette))
    assert CAMVID.labels.num_classes == 11
    assert colours["Sky"] == (128, 128, 128)
    assert colours["Bicyclist"] == (0, 128, 192)
    assert len(set(CAMVID.labels.palette)) == 11


def test_camvid__eleven_in_the_files_is_void(tmp_path):
    write_pair(tmp_path, "train", "a", np.array([[0, 10, 11]], np.uint8), ".webp")
    assert CAMVID(tmp_path, "train")[0].mask.tolist() == [[0, 10, 255]]


@real
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101), ("test", 233)])
def test_camvid__the_splits_have_their_known_sizes(split, count):
    assert len(CAMVID(ROOT, split)) == count


@real
def test_camvid__images_are_360_by_480_and_roads_lie_below_skies():
    dataset = CAMVID(ROOT, "train")
    rows: dict[str, list[float]] = {"Sky": [], "Road": []}
    for index in range(0, len(dataset), 40):
        sample = dataset[index]
        assert sample.size == (360, 480)
        assert set(np.unique(sample.mask)) <= {*range(11), 255}
        for name, means in rows.items():
            found = np.nonzero(sample.mask == CAMVID.labels.names.index(name))[0]
            means.extend([found.mean()] if len(found) else [])
    assert max(rows["Sky"]) < min(rows["Road"])
