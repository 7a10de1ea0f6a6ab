"""Cityscapes, fine annotations: 19 classes, 2,975 images of 1024x2048 pixels to train and 500 to validate.

Cordts et al.: The Cityscapes dataset for semantic urban scene understanding (2016). Masks are the files of train ids.
"""

from tokenexit.data.layout import Folders, Layout, read_labels


def _part(split: str) -> Folders:
    return Folders(f"leftImg8bit/{split}", f"gtFine/{split}", ("_leftImg8bit.png",), ("_gtFine_labelTrainIds.png",))


CITYSCAPES = Layout(
    title="Cityscapes",
    labels=read_labels("""
128  64 128  road
244  35 232  sidewalk
 70  70  70  building
102 102 156  wall
190 153 153  fence
153 153 153  pole
250 170  30  traffic light
220 220   0  traffic sign
107 142  35  vegetation
152 251 152  terrain
 70 130 180  sky
220  20  60  person
255   0   0  rider
  0   0 142  car
  0   0  70  truck
  0  60 100  bus
  0  80 100  train
  0   0 230  motorcycle
119  11  32  bicycle
"""),
    parts={"train": _part("train"), "val": _part("val")},
    homes=(".", "cityscapes"),
    withheld=("test",),
    hint="unpack leftImg8bit and gtFine there, and draw *_labelTrainIds.png from the polygons with cityscapesscripts",
)
