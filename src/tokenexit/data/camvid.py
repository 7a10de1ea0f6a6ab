"""CamVid: street scenes of 360x480 pixels, 11 classes, in the selection of the SegNet tutorial.

367 images to train, 101 val, 233 test. Brostow, Fauqueur, Cipolla: Semantic object classes in video (2009).
Layout: `images/SPLIT`, `annotations/SPLIT`; void is 11 in the mask files. `val` shares its drive with `train`: choose
settings on it, report on `test`.
"""

from tokenexit.data.files import IMAGE_SUFFIXES
from tokenexit.data.layout import Folders, Layout, read_labels


def _part(split: str) -> Folders:
    return Folders(f"images/{split}", f"annotations/{split}", IMAGE_SUFFIXES)


CAMVID = Layout(
    title="CamVid",
    labels=read_labels("""
128 128 128  Sky
128   0   0  Building
192 192 128  Pole
128  64 128  Road
 60  40 222  Pavement
128 128   0  Tree
192 128 128  SignSymbol
 64  64 128  Fence
 64   0 128  Car
 64  64   0  Pedestrian
  0 128 192  Bicyclist
"""),
    parts={"train": _part("train"), "val": _part("val"), "test": _part("test")},
    homes=(".", "camvid"),
    ignore_values=(11,),
)
