"""Street scenes drawn by a program: images with exact masks, any size and number, no download.

A scene is laid out in metres on a road and projected by a pinhole camera. Everything is drawn back to front as
*material numbers* on one canvas of twice the size; a material knows its class and colour. Image and mask are look-ups
in that canvas, so the mask is what is visible by construction: the image averages 2x2 canvas pixels (antialiasing),
the mask takes one of them (crisp indices).

Coordinates: `s` metres to the right of the camera, along the road's bend; `y` metres above the road; `z` metres ahead.
H, W: height and width. All arithmetic is +, -, *, / and sqrt, which IEEE 754 rounds alike on every platform.
"""

from tokenexit.data.scenes.canvas import SCENE_LABELS
from tokenexit.data.scenes.scene import Scenes, render_scene, scene_split

__all__ = ["SCENE_LABELS", "Scenes", "render_scene", "scene_split"]
