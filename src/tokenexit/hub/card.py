"""A model card that fills itself from what is saved with a model; what is not known is not claimed.

Its head is the metadata that the Hugging Face hub reads (huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

CARD_FILE = "README.md"
MARK = "<!-- Written by tokenexit. Without this line it is yours, and is not written over. -->"


class Calibrated(Protocol):
    """The part of a calibration that a card shows."""

    @property
    def asked(self) -> Mapping[str, Any]: ...
    @property
    def method(self) -> str | Mapping[str, Any]: ...
    @property
    def guarantee(self) -> str: ...
    @property
    def mac_ratio(self) -> float | None: ...


def model_card(
    name: str,
    config: Mapping[str, Any],
    parameters: int,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    calibration: Calibrated | None = None,
    license: str | None = None,
) -> str:
    """Write the card of a model in Markdown.

    config: what `config.json` holds. training, evaluation: contents of `training.json` and of `evaluation.json` (from
    `tokenexit evaluate --json`), where they are known. calibration: the model's, if it has one. license: of the
    weights, by the hub's names, such as "apache-2.0".
    """
    trained_on = _at(training, "config", "data", "name")
    rows = _rows(training, evaluation)
    parts = [
        _head(name, trained_on, evaluation, license),
        MARK,
        f"# {name}",
        _what(config, parameters, trained_on),
        _use(name, _at(config, "model", "decode_head", "import")),
        _section("Accuracy and compute", _table(rows, evaluation, training)),
        _section("Calibration", _calibrated(calibration)),
        _section("Training", _trained(training)),
        _section("Classes", _classes(config)),
        _section("Licence", _licence(license, trained_on)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def may_write(path: Path) -> bool:
    """Return whether there is no card, or one that this module wrote."""
    return not path.exists() or MARK in path.read_text(errors="replace")


def _head(name: str, trained_on: str | None, evaluation: Mapping[str, Any] | None, license: str | None) -> str:
    lines = [
        "library_name: tokenexit",
        "pipeline_tag: image-segmentation",
        f"license: {json.dumps(license or 'unknown')}",
        "tags: [semantic-segmentation, vision-transformer, early-exit, token-pruning]",
    ]
    if trained_on is not None:
        lines.append(f"datasets: [{json.dumps(trained_on)}]")
    data, split = _at(evaluation, "about", "data"), _at(evaluation, "about", "split")
    scores = [row for row in _results(evaluation) if _number(row.get("mIoU")) is not None]
    if data is not None and scores:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task: {type: image-segmentation}"]
        lines.append(f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}, split: {json.dumps(split)}}}")
        lines.append("    metrics:")
        for row in scores:
            words = json.dumps(f"mIoU, {row.get('label')}")
            lines.append(f"    - {{type: mean_iou, value: {row['mIoU']:.2f}, name: {words}}}")
    return "\n".join(["---", *lines, "---"])


def _what(config: Mapping[str, Any], parameters: int, trained_on: str | None) -> str:
    model, backbone = config["model"], config["model"]["backbone"]
    exits = ", ".join(map(str, model["exits"]))
    sentences = [
        f"Semantic segmentation in {model['num_classes']} classes"
        + (f", trained on {trained_on}." if trained_on else "."),
        f"A plain Vision Transformer of {backbone['depth']} blocks and width {backbone['embed_dim']} at patches of "
        f"{backbone['patch_size']} pixels, {parameters / 1e6:.1f} million parameters with all heads.",
    ]
    if exits:
        sentences.append(f"Tokens that are decided leave it after block {exits}: easy images cost less.")
    return " ".join(sentences)


def _use(name: str, head: Any) -> str:
    """Show how the model is loaded. head: import path of a decode head that is no part of the library, else None."""
    given = ", head=MyHead" if head else ""
    note = (
        f"\n\nIts decode head is a module of its own, saved as `{head}`: load that class as `MyHead` first."
        if head
        else ""
    )
    return f"""```python
from tokenexit import ExitSegmenter

model = ExitSegmenter.from_pretrained("{name}"{given})  # the folder, or hf-hub:OWNER/{name}
out = model.predict("photo.jpg")
print(out.labels[0].shape, out.ledger.share_of_dense[0])
```{note}"""


def _rows(training: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> list[list[str]]:
    """List method, mIoU, GMACs and share of dense, from the evaluation, else from the last validation."""
    rows = [
        [str(row.get("label")), _text(row.get("mIoU"), ".2f"), _text(row.get("gmacs_mean"), ".3f"),
         _text(row.get("share_of_dense"), ".1%")]
        for row in _results(evaluation)
    ]  # fmt: skip
    history = _at(training, "history")
    if rows or not isinstance(history, list) or not history:
        return rows
    method = _at(training, "config", "methods")
    name = method[0].get("name", "?") if isinstance(method, list) and method else "?"
    kept = _at(training, "step")  # step of the kept weights; the last ones if unknown
    last = next((entry for entry in history if kept is not None and _at(entry, "step") == kept), history[-1])
    return [[str(name), _text(_at(last, "miou"), ".2f"), _text(_at(last, "gmacs"), ".3f"), ""]]


def _table(
    rows: Sequence[Sequence[str]], evaluation: Mapping[str, Any] | None, training: Mapping[str, Any] | None
) -> str:
    if not rows:
        return ""
    about = _at(evaluation, "about")
    if isinstance(about, Mapping):
        words = f"On {about.get('data')} ({about.get('split')}), {about.get('precision')}, mean of all images."
    else:
        words = f"On {_at(training, 'config', 'data', 'name')} (validation), at the end of training."
    cells = [["method", "mIoU", "GMACs", "of dense"], ["---", "---:", "---:", "---:"], *rows]
    return f"{words}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _calibrated(calibration: Calibrated | None) -> str:
    if calibration is None:
        return ""
    method = calibration.method if isinstance(calibration.method, Mapping) else {"name": calibration.method}
    lines = [f"Asked for: {_pairs(calibration.asked)}.", f"Chosen: {_pairs(method)}.", calibration.guarantee]
    if calibration.mac_ratio is not None:
        lines.append(f"Compute on the calibration images: {calibration.mac_ratio:.1%} of dense.")
    return "\n\n".join(line for line in lines if line)


def _trained(training: Mapping[str, Any] | None) -> str:
    config = _at(training, "config")
    if not isinstance(config, Mapping):
        return ""
    named = {key: config.get(key) for key in ("steps", "batch_size", "precision", "seed")}
    start = _at(config, "model", "init_from") or _at(config, "model", "weights")
    start = PurePath(start).name if isinstance(start, str) and PurePath(start).is_absolute() else start
    named |= {
        "optimiser": _at(config, "optim", "name"),
        "lr": _at(config, "optim", "lr"),
        "crop": _at(config, "data", "crop"),
    }
    named |= {"started from": start}
    return _pairs({key: value for key, value in named.items() if value is not None}) + "; all of it in `training.json`."


def _classes(config: Mapping[str, Any]) -> str:
    labels = config["preprocessing"].get("labels")
    names = labels["names"] if labels else []
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))


def _licence(license: str | None, trained_on: str | None) -> str:
    of = f" Images and labels of {trained_on} have terms of their own." if trained_on else ""
    return f"Weights: {license or 'not stated'}. Code: Apache-2.0.{of}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _results(evaluation: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    rows = _at(evaluation, "results")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _at(values: Any, *keys: str) -> Any:
    """Return the value at nested keys, None where one is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any, form: str) -> str:
    number = _number(value)
    return "" if number is None else format(number, form)
