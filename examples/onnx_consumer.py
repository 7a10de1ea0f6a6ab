"""Run an exported model with numpy and onnxruntime alone: onnx_consumer.py model.onnx photo.jpg mask.png

Thresholds are an input: append 0.95/0.8/0.7 to move them.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

path, photo, mask, *thresholds = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["tokenexit"])

picture = Image.open(photo).convert("RGB")
mean, std = (np.array(about["preprocessing"][name], np.float32) for name in ("mean", "std"))
image = ((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]

values = [float(t) for t in thresholds[0].split("/")] if thresholds else about["thresholds"]
labels, _, stages = session.run(None, {"image": image, "thresholds": np.array(values, np.float32)})

out = Image.fromarray(labels[0].astype(np.uint8), "P")
out.putpalette([value for colour in about["palette"] for value in colour])
out.save(mask)
for stage, block in enumerate([*about["exits_after_blocks"], "the last"]):
    print(f"{(stages == stage).mean():.0%} of the tokens left after block {block}")
print("classes:", ", ".join(about["classes"][k] for k in np.unique(labels)))
