"""Run an exported model with numpy, Pillow and onnxruntime alone: onnx_consumer.py model.onnx photo.jpg mask.png

The mask is the one that `tokenexit predict` writes. Thresholds are an input: append 0.95/0.8/0.7 to move them.
"""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Array = np.ndarray[Any, Any]


def read(path: str) -> Image.Image:
    """Return any image as RGB, 8 bits, upright, on black."""
    file = Image.open(path)
    file.load()
    image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # in [0, 1]
        return Image.fromarray((np.asarray(image) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        return black
    return image.convert("RGB")


def resized(image: Image.Image, resize: Any) -> Image.Image:
    """Resize an image as `resize` says: "none", the shortest side, or [height, width]."""
    width, height = image.size
    if resize == "none":
        return image
    if isinstance(resize, int):
        factor = resize / min(height, width)
        resize = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    return image.resize((resize[1], resize[0]), Image.Resampling.BILINEAR)


def spans(side: int, window: int, stride: int | None) -> list[tuple[int, int]]:
    """Return the beginning and end of every window along one axis; without a stride they are spread evenly."""
    if stride is None:
        last, free = -(-side // window) - 1, max(side - window, 0)
        starts = [n * free // max(last, 1) for n in range(last + 1)]
        return [(start, min(start + window, side)) for start in starts]
    count = max(side - window + stride - 1, 0) // stride + 1
    ends = [min(n * stride + window, side) for n in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def stretch(values: Array, size: int, axis: int) -> Array:
    """Resize bilinearly to `size` along one axis, corners not aligned, as torch does it: float32 throughout."""
    old = values.shape[axis]
    if old == size:
        return values
    place = np.maximum(
        (np.arange(size, dtype=np.float32) + 0.5) * (np.float32(old) / np.float32(size)) - 0.5, 0
    ).astype(np.float32)
    low = place.astype(int)
    share = (place - low).reshape((-1,) + (1,) * (values.ndim - axis - 1))
    return np.take(values, low, axis) * (1 - share) + np.take(values, np.minimum(low + 1, old - 1), axis) * share


def scaled(values: Array, height: int, width: int) -> Array:
    """Resize `(K, h, w)` bilinearly to `(K, height, width)`."""
    return stretch(stretch(values, width, 2), height, 1)


def maps_of(logits: Array, grid: tuple[int, int], about: dict[str, Any], height: int, width: int) -> Array:
    """Return the class maps of one window at its own size, from the graph's grid of `grid` tokens."""
    if about["upscale"] > 1:
        logits = scaled(logits, logits.shape[1] * about["upscale"], logits.shape[2] * about["upscale"])
    patch = about["patch_size"]
    return scaled(logits, grid[0] * patch, grid[1] * patch)[:, :height, :width]


def segment(session: Any, about: dict[str, Any], photo: Image.Image, thresholds: Array) -> tuple[Array, Array]:
    """Return the class of every pixel of an image, and the exits of the tokens of all its windows."""
    steps = about["preprocessing"]
    image = resized(photo, steps["resize"])
    mean, std = (np.array(steps[name], np.float32) for name in ("mean", "std"))
    pixels = ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    _, height, width = pixels.shape
    window = steps["window"] or (height, width)
    stride = (None, None) if steps["stride"] == "even" else steps["stride"] or window
    total = np.zeros((len(about["classes"]), height, width), np.float32)
    seen, exits = np.zeros((height, width), np.float32), []
    for top, bottom in spans(height, window[0], stride[0]):
        for left, right in spans(width, window[1], stride[1]):
            crop = np.ascontiguousarray(pixels[None, :, top:bottom, left:right])
            logits, left_at = session.run(["grid_logits", "exit_stage"], {"image": crop, "thresholds": thresholds})
            maps = maps_of(logits[0], left_at.shape[1:], about, bottom - top, right - left)
            total[:, top:bottom, left:right] += maps
            seen[top:bottom, left:right] += 1
            exits.append(left_at.ravel())
    return scaled(total / seen, photo.height, photo.width).argmax(0), np.concatenate(exits)


def save(labels: Array, palette: list[list[int]], path: str) -> None:
    """Write a palette PNG, or 16-bit grey where there are more classes than a palette holds."""
    if len(palette) > 255:
        Image.fromarray(labels.astype(np.uint16)).save(path)
        return
    out = Image.fromarray(labels.astype(np.uint8))
    out.putpalette([value for colour in palette for value in colour])
    out.save(path)


def main(path: str, photo: str, mask: str, moved: str | None = None) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["tokenexit"])
    thresholds = np.array(about["thresholds"], np.float32)
    if moved:  # one for each exit, and for all classes where the method has one for each
        given = np.array([float(tau) for tau in moved.split("/")], np.float32)
        thresholds = np.broadcast_to(given.reshape(-1, *[1] * (thresholds.ndim - 1)), thresholds.shape)
    labels, exits = segment(session, about, read(photo), thresholds)
    save(labels, about["palette"], mask)
    for exit_index, block in enumerate([*about["exits_after_blocks"], "the last"]):
        print(f"{(exits == exit_index).mean():.0%} of the tokens left after block {block}")
    print("classes:", ", ".join(about["classes"][k] for k in np.unique(labels)))


if __name__ == "__main__":
    main(*sys.argv[1:])
