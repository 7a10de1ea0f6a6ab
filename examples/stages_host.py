"""Run the stages of `tokenexit export --format stages` with numpy and onnxruntime alone (Pillow reads the photo):

    stages_host.py exported/stages photo.jpg mask.png

All shapes inside the stages are fixed. What depends on values is here, and is all there is to port: which tokens leave,
gathering those that stay into the smallest bucket that holds them, and the canvas. Append 0.95/0.8/0.7 to move
thresholds. The mask has the stages' size.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Stages:
    """The manifest, and a session for each file."""

    def __init__(self, about: dict[str, Any], sessions: dict[str, Any]) -> None:
        self.about, self.sessions = about, sessions
        self.files = {stage["name"]: stage["files"] for stage in about["stages"]}

    def run(self, name: str, **given: Array) -> dict[str, Array]:
        """Run a stage in the smallest of its files that holds the tokens, with zeros behind them."""
        count = len(given.get("tokens", ())) - self.about["prefix_tokens"]
        file = next(file for file in self.files[name] if file["tokens"] is None or file["tokens"] >= count)
        given["live"] = np.array([len(given.get("tokens", ()))], np.int32)
        feeds = {}
        for key, expected in file["inputs"].items():
            feeds[key] = np.zeros(expected["shape"], expected["dtype"])
            feeds[key][: len(given[key])] = given[key]
        return dict(zip(file["outputs"], self.sessions[file["file"]].run(list(file["outputs"]), feeds)))


def load(folder: Path) -> Stages:
    import onnxruntime

    about = json.loads((folder / "manifest.json").read_text())
    if (about["format"], about["version"]) != ("tokenexit stages", 2):
        raise SystemExit(f"{folder} has {about['format']} {about['version']}: this loop reads tokenexit stages 2.")
    names = [file["file"] for stage in about["stages"] for file in stage["files"]]
    return Stages(about, {name: onnxruntime.InferenceSession(folder / name) for name in names})


def confident(found: dict[str, Array], count: int, threshold: Array) -> Array:
    """Return which of the first `count` tokens score above their exit's threshold, or that of their class."""
    return found["score"][:count] > (threshold[found["label"][:count]] if threshold.ndim else threshold)


def dtop(stages: Stages, image: Array, thresholds: Array) -> tuple[Array, Array]:
    """Dynamic Token Pruning: easy tokens leave with the exit's answer, but for the surest of each class or window."""
    about, rule = stages.about, stages.about["rule"]
    prefix, exits, cells = about["prefix_tokens"], len(about["exits_after_blocks"]), int(np.prod(about["grid"]))
    tokens, place = stages.run("embed", image=image)["tokens"], np.arange(prefix + cells)
    canvas, left_at = np.zeros((cells, len(about["classes"])), np.float32), np.full(cells, exits)
    for n in range(exits + 1):
        tokens = stages.run(f"span{n + 1}", tokens=tokens, place=place)["next_tokens"][: len(place)]
        found = stages.run(f"exit{n + 1}" if n < exits else "decode", tokens=tokens)
        position = place[prefix:] - prefix
        canvas[position], left_at[position] = found["rows"][: len(position)], n
        if n == exits or n + 1 == rule["stop"]:
            break
        leaves = confident(found, len(position), thresholds[n])
        easy = np.flatnonzero(leaves)
        easy = easy[np.argsort(-found["score"][easy], kind="stable")]  # the surest first
        for k in np.unique(found["label"][easy]):
            leaves[easy[found["label"][easy] == k][: rule["keep_per_class"]]] = False
        if side := rule["keep_in_window"]:
            row, column = np.divmod(position[easy], about["grid"][1])
            leaves[easy[np.unique(row // side * cells + column // side, return_index=True)[1]]] = False
        stays = np.append(np.ones(prefix, bool), ~leaves)
        tokens, place = tokens[stays], place[stays]
    presence = {"presence": found["presence"]} if "presence" in found else {}
    return stages.run("finish", canvas=canvas, **presence)["labels"][0], left_at.reshape(about["grid"])


def dovit(stages: Stages, image: Array, thresholds: Array) -> tuple[Array, Array]:
    """Dynamic Token-Pass: stopped tokens keep their features, and the class token takes up their mean."""
    about, rule = stages.about, stages.about["rule"]
    prefix, exits, cells = about["prefix_tokens"], len(about["exits_after_blocks"]), int(np.prod(about["grid"]))
    full, place = stages.run("embed", image=image)["tokens"], np.arange(prefix + cells)
    keep, left_at, before = np.ones(cells, bool), np.full(cells, exits), None
    for n in range(exits + 1):
        if len(place):
            full[place] = stages.run(f"span{n + 1}", tokens=full[place], place=place)["next_tokens"][: len(place)]
        left_at[place[prefix:] - prefix] = n
        if n == exits:
            break
        seen = np.arange(cells) if rule["scores"] == "all" else place[prefix:] - prefix
        found = stages.run(f"exit{n + 1}", tokens=full if rule["scores"] == "all" else full[place])
        score, stops = np.zeros(cells, np.float32), np.zeros(cells, bool)
        score[seen], stops[seen] = found["score"][: len(seen)], confident(found, len(seen), thresholds[n])
        if rule["min_improvement"] is not None and before is not None:
            stops |= score - before < rule["min_improvement"]
        keep, before = keep & ~stops, score
        if rule["blend_weight"] > 0 and (~keep).sum() / len(full) > rule["blend_trigger"]:
            mean = full[prefix:][~keep].mean(0)
            full[0] = (1 - rule["blend_weight"]) * full[0] + rule["blend_weight"] * mean
        place = np.append(np.arange(prefix), prefix + np.flatnonzero(keep))
    return stages.run("finish", tokens=full)["labels"][0], left_at.reshape(about["grid"])


def segment(stages: Stages, image: Array, thresholds: Array | None = None) -> tuple[Array, Array]:
    """Return the class of every pixel of `image (1, 3, H, W)`, and the exit at which each token left."""
    thresholds = np.array(stages.about["thresholds"], np.float32) if thresholds is None else thresholds
    return {"dtop": dtop, "dovit": dovit}[stages.about["method"]["name"]](stages, image, thresholds)


def main(folder: str, photo: str, mask: str, moved: str | None = None) -> None:
    from PIL import Image, ImageOps

    stages = load(Path(folder))
    steps, (height, width) = stages.about["preprocessing"], stages.about["image_size"]
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(steps["mean"])) / np.float32(steps["std"])
    thresholds = np.array([float(tau) for tau in moved.split("/")], np.float32) if moved else None
    labels, left_at = segment(stages, pixels.transpose(2, 0, 1)[None], thresholds)
    colours = [value for colour in stages.about["palette"] for value in colour]
    out = Image.fromarray(labels.astype(np.uint8 if len(colours) <= 765 else np.uint16))
    if out.mode == "L":
        out.putpalette(colours)
    out.save(mask)
    for n, block in enumerate([*stages.about["exits_after_blocks"], "the last"]):
        print(f"{(left_at == n).mean():.0%} of the tokens left after block {block}")
    print("classes:", ", ".join(stages.about["classes"][k] for k in np.unique(labels)))


if __name__ == "__main__":
    main(*sys.argv[1:])
