"""Pascal Context: 59 classes, or 60 with the background; 4,998 images to train and 5,105 to validate.

Mottaghi et al.: The role of context for object detection and semantic segmentation in the wild (2014). 0 in the mask
files is the background: void with 59 classes, the first class with 60.
"""

from tokenexit.data.ade20k import ADE20K
from tokenexit.data.layout import Layout, Listed, read_names
from tokenexit.inputs.labels import Labels

_NAMES = read_names("""
background aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat
ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse keyboard
light motorbike mountain mouse person plate platform pottedplant road rock sheep shelves sidewalk sign sky
snow sofa table track train tree truck tvmonitor wall water window wood
""")
_COLOURS = ADE20K.labels.palette[:60]  # by number, as everyone draws it


def _part(split: str) -> Listed:
    lists = ((f"ImageSets/SegmentationContext/{split}.txt",),)
    return Listed(lists, images="JPEGImages", masks=("SegmentationClassContext",))


def _layout(title: str, labels: Labels, reduce_zero_label: bool) -> Layout:
    return Layout(
        title,
        labels,
        parts={"train": _part("train"), "val": _part("val")},
        homes=(".", "VOC2010", "VOCdevkit/VOC2010"),
        withheld=("test",),
        hint="convert the annotations to SegmentationClassContext with mmsegmentation's dataset converter",
        reduce_zero_label=reduce_zero_label,
    )


PASCAL_CONTEXT_59 = _layout("Pascal Context 59", Labels(_NAMES[1:], _COLOURS[1:]), reduce_zero_label=True)
PASCAL_CONTEXT_60 = _layout("Pascal Context 60", Labels(_NAMES, _COLOURS), reduce_zero_label=False)
