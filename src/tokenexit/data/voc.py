"""PASCAL VOC 2012: 20 classes and the background; 1,464 images to train, 1,449 to validate.

Everingham et al.: The PASCAL visual object classes challenge (2010). Split "trainaug" adds the masks of Hariharan et
al.: Semantic contours from inverse detectors (2011), 10,582 images in all; VOC's own masks come first.
"""

from tokenexit.data.layout import Layout, Listed, read_names
from tokenexit.inputs.labels import Labels, default_palette

_NAMES = read_names("""
background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor
""")
_LISTS = "ImageSets/Segmentation"


def _part(*lists: tuple[str, ...], masks: tuple[str, ...] = ("SegmentationClass",)) -> Listed:
    return Listed(tuple(tuple(f"{_LISTS}/{name}.txt" for name in row) for row in lists), "JPEGImages", masks)


VOC_2012 = Layout(
    title="PASCAL VOC 2012",
    labels=Labels(_NAMES, ((0, 0, 0), *default_palette(20))),
    parts={
        "train": _part(("train",)),
        "trainaug": _part(("train", "aug"), ("trainaug",), masks=("SegmentationClass", "SegmentationClassAug")),
        "val": _part(("val",)),
    },
    homes=(".", "VOC2012", "VOCdevkit/VOC2012"),
    aliases={"train_aug": "trainaug"},
    withheld=("test",),
)
