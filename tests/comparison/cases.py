"""What is compared: models, images and methods. Everything is drawn from seeds or written down as a number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.comparison import adapter

CLASSES = 5
EXITS = (1, 3)
PATCH = 4
MIXED = ((16, 20), (9, 33), (4, 4), (16, 20), (13, 8))
CROPS = ((12, 16), (12, 16))

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "dinov2_linear": {"kind": "dinov2_linear"},
    "fcn": {"kind": "fcn", "channels": 24},
    "setr_naive": {"kind": "setr_naive", "channels": 24},
    "atm": {"kind": "atm", "channels": 16, "layers": 2, "num_heads": 2},
    "mask_transformer": {"kind": "mask_transformer", "channels": 24, "layers": 2, "num_heads": 3},
    "setr_pup": {"kind": "setr_pup", "channels": 12, "steps": 2, "kernel": 3, "up": 2},
}
TOKEN_HEADS = ("linear", "dinov2_linear", "fcn", "setr_naive", "atm", "mask_transformer")
SOFTMAX_HEADS = ("linear", "dinov2_linear", "fcn", "setr_naive", "mask_transformer", "setr_pup")
MIXED_HEADS = {"fcn then atm": ("fcn", "atm"), "linear then setr_pup": ("linear", "setr_pup")}

THRESHOLDS: dict[str, tuple[float, float]] = {
    "probability of linear": (0.9174, 0.9455),
    "probability of dinov2_linear": (0.9204, 0.9394),
    "probability of fcn": (0.8946, 0.908),
    "probability of setr_naive": (0.8272, 0.7156),
    "probability of atm": (0.2455, 0.6197),
    "probability of mask_transformer": (0.9941, 0.9982),
    "probability of setr_pup": (0.2468, 0.243),
    "margin of atm": (0.1482, 0.0392),
    "margin of fcn": (0.8158, 0.8223),
    "margin of setr_naive": (0.6932, 0.5117),
    "entropy of fcn": (0.7633, 0.8018),
    "entropy of setr_naive": (0.6333, 0.4995),
    "entropy of setr_pup": (0.0091, 0.0097),
}
"""By score and exit head: about half of these models' tokens are above, at each exit."""


# ------------------------------------------------------------------------------------------------ models and images


def model_of(head: str, window: Any = None, **backbone: Any) -> Any:
    """A small model whose weights depend on their names alone, in evaluation mode."""
    exit_head, decode_head = (dict(HEADS[kind]) for kind in MIXED_HEADS.get(head, (head, head)))
    shape: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": PATCH, "mlp_ratio": 2.0}
    shape |= {"pos_embed_grid": (3, 4), **backbone}
    model = adapter.make_model(exit_head, decode_head, EXITS, CLASSES, window, **shape)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Lively weights: fresh ones have near-constant features, and no token would leave."""
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif name.endswith("queries.weight"):
            value.normal_(generator=rng)
        elif value.ndim > 1:
            fan_in = value[0].numel() if value.shape[0] > 1 else 1
            gain = 3.0 if name.endswith(("classifier.weight", "presence.weight")) else 1.0
            value.normal_(std=fan_in**-0.5, generator=rng).mul_(gain)
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight", "gamma")):
            value.normal_(1.0, 0.2, generator=rng).mul_(6.0 if name.endswith("mask_norm.weight") else 1.0)
        else:
            value.normal_(std=0.1, generator=rng)


def images_of(sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Noise, `(3, H, W)` each."""
    return [torch.randn(3, *size, generator=torch.Generator().manual_seed(seed)) for seed, size in enumerate(sizes, 1)]


class Noise:
    """A dataset of noise of two sizes in turn."""

    labels = adapter.default_labels(CLASSES)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int, /) -> adapter.Sample:
        rng, size = np.random.default_rng(index), ((16, 20), (12, 24))[index % 2]
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        return adapter.Sample(image, rng.integers(0, CLASSES, size), f"noise-{index}")


# ---------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Case:
    """A method with some of its options, on some heads.

    limits: whether it takes thresholds; "class" for one by class. trains: maps of all exits can be recorded.
    """

    spec: dict[str, Any]
    heads: tuple[str, ...]
    limits: str = "exit"
    trains: bool = True
    sizes: tuple[tuple[int, int], ...] = MIXED

    def method(self, head: str) -> Any:
        return adapter.build_method(self.specified(head))

    def specified(self, head: str) -> dict[str, Any]:
        if not self.limits:
            return self.spec
        score = self.spec.get("score", "entropy" if self.spec["name"] == "paumer" else "probability")
        taus: list[Any] = list(THRESHOLDS[f"{score} of {MIXED_HEADS.get(head, (head,))[0]}"])
        if self.limits == "class":
            taus = [[min(1.0, t * (0.9 + 0.05 * c)) for c in range(CLASSES)] for t in taus]
        return {**self.spec, "threshold": taus}


def dtop(*heads: str, **options: Any) -> Case:
    limits = options.pop("limits", "exit")
    return Case({"name": "dtop", "keep_per_class": 1, **options}, heads, limits)


def dovit(*heads: str, **options: Any) -> Case:
    limits, sizes = options.pop("limits", "exit"), options.pop("sizes", MIXED)
    return Case({"name": "dovit", **options}, heads, limits, sizes=sizes)


METHODS: dict[str, Case] = {
    "dense": Case({"name": "dense"}, (*TOKEN_HEADS, "setr_pup", *MIXED_HEADS), limits=""),
    "dtop": dtop(*TOKEN_HEADS),
    "dtop mixed": Case({"name": "dtop"}, ("fcn then atm",), trains=False),
    "dtop keeps nobody": dtop(*TOKEN_HEADS, keep_per_class=0),
    "dtop frozen": dtop("atm", "fcn", keep_per_class=2, finish="frozen"),
    "dtop detached": dtop("atm", "fcn", detach_canvas=True),
    "dtop margin": dtop("atm", "fcn", score="margin"),
    "dtop entropy": dtop("fcn", "setr_naive", score="entropy", temperature=1.5),
    "dtop by class": dtop("atm", "fcn", limits="class"),
    "dtop guarded": dtop("atm", "mask_transformer", keep_per_class=0, boundary_guard=True),
    "dtop capped": dtop("atm", "fcn", cap=[0.6, 0.3]),
    "dtop warming up": dtop("fcn", threshold_warmup=0.8),
    "fixed ratio": Case({"name": "fixed_ratio", "ratios": [0.6, 0.3]}, ("linear", "setr_naive", "atm"), limits=""),
    "truncated": Case({"name": "truncated", "after": 1}, TOKEN_HEADS, limits="", trains=False),
    "truncated late": Case({"name": "truncated", "after": 2}, TOKEN_HEADS, limits="", trains=False),
    "dovit": dovit(*SOFTMAX_HEADS, *MIXED_HEADS),
    "dovit live": dovit("linear", "fcn", scoring="live"),
    "dovit improving": dovit("fcn", "setr_naive", min_improvement=0.02),
    "dovit blending": dovit("linear", "setr_pup", blend_weight=0.3, blend_trigger=0.4),
    "dovit detached": dovit("fcn", detach_aux=True),
    "dovit mean": dovit("fcn", "setr_pup", batch_mode="mean", sizes=CROPS),
    "dovit margin": dovit("fcn", "setr_naive", score="margin", temperature=0.7),
    "dovit by class": dovit("fcn", "setr_naive", limits="class"),
    "dovit guarded": dovit("mask_transformer", "setr_naive", boundary_guard=True),
    "dovit guarded live": dovit("linear", limits="class", boundary_guard=True, scoring="live"),
    "dovit capped": dovit("fcn", "setr_pup", cap=[0.6, 0.3]),
    "dovit warming up": dovit("fcn", threshold_warmup=0.8),
    "paumer": Case({"name": "paumer"}, ("fcn", "setr_pup")),
}
ALL = [(name, head) for name, case in METHODS.items() for head in case.heads]

BACKBONES: dict[str, dict[str, Any]] = {
    "without class token": {"class_token": False},
    "with registers": {"num_registers": 2, "final_norm": False},
    "with layer scale": {"layer_scale": 1e-5, "pos_embed_prefix": False},
    "with swiglu": {"mlp": "swiglu", "pos_embed_offset": 0.1, "pos_embed_antialias": False},
}


# ---------------------------------------------------------------------------------------------------- what is found


def found(output: Any) -> dict[str, Any]:
    """All that an output says."""
    ledger = output.ledger
    return {
        "value": output.value,
        "exit_map": adapter.exit_maps(output),
        "live": ledger.live,
        "macs": (ledger.macs, ledger.dense_macs),
        "macs by part": [(p.embed, p.blocks, p.exit_heads, p.decode_head) for p in ledger.parts],
        "logits": output.logits,
        "labels": output.labels,
        "scores": output.scores,
    }


def recorded(output: Any) -> dict[str, Any]:
    """What an output says of its exits."""
    records = adapter.exit_records(output)
    return {
        f"record {n} {name}": value
        for n, record in enumerate(records)
        for name, value in (
            ("head", (record.head_tokens, record.kind, record.scale, record.upscale)),
            ("said", (record.logits, record.presence)),
            ("seen", None if record.seen is None else record.seen.x),
        )
    }


def outputs(name: str, head: str, bf16: bool = False, records: bool = False, **backbone: Any) -> dict[str, Any]:
    case = METHODS[name]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = adapter.call(model_of(head, **backbone), images_of(case.sizes), case.method(head), records)
    told = {"grid_logits": output.grid_logits, **found(output)}
    return told | recorded(output) if records else told


def training(name: str, head: str, **backbone: Any) -> dict[str, Any]:
    """One step: outputs, loss, gradients, and what the step did to buffers."""
    model = model_of(head, **backbone).train()
    masks = torch.randint(-1, CLASSES, (2, *CROPS[0]), generator=torch.Generator().manual_seed(9))
    torch.manual_seed(1)
    output = adapter.call(model, images_of(CROPS), METHODS[name].method(head).at(0.4))
    loss = adapter.segmentation_loss(output, masks, -1, 0.4, class_weights=[0.8, 0.9, 1.0, 1.1, 1.2])
    loss.backward()
    grads: dict[str, list[Tensor | None]] = {}
    for parameter, value in model.named_parameters():
        grads.setdefault(f"gradients of {'.'.join(parameter.split('.')[:2])}", []).append(value.grad)
    return {
        "grid_logits": output.grid_logits,
        "exit_map": adapter.exit_maps(output),
        "macs": output.ledger.macs,
        "loss": loss,
        "buffers": list(model.buffers()),
        "randomness": torch.get_rng_state(),
        **grads,
    }


def windows(name: str, head: str) -> dict[str, Any]:
    model, case = model_of(head, window=((8, 12), (6, 8))), METHODS[name]
    with torch.no_grad():
        return found(model.segment(images_of(MIXED), case.method(head), targets=[(h + 3, w) for h, w in MIXED]))


def gated(spec: dict[str, Any], head: str) -> dict[str, Any]:
    with torch.no_grad():
        return found(adapter.call(model_of(head), images_of(MIXED), adapter.build_method(spec)))


def prescribed(head: str, window: Any = None) -> dict[str, Any]:
    model, images = model_of(head, window), images_of(MIXED)
    with torch.no_grad():
        output = adapter.call(model, images, METHODS["dtop"].method(head))
        maps = torch.cat([m.flatten() for m in adapter.exit_maps(output)])
        return found(adapter.call(model, images, adapter.prescribed(maps.roll(7))))


def graph(name: str, head: str) -> dict[str, Any]:
    model, method = model_of(head), METHODS[name].method(head)
    answers = [adapter.graph_answers(model, method, image) for image in images_of(MIXED)]
    return {key: [answer[key] for answer in answers] for key in answers[0]}


def composed(name: str, head: str) -> dict[str, Any]:
    case = METHODS[name]
    first, second = (1.0 - t for t in case.specified(head)["threshold"])
    limits = [(0.0, 0.0), (first, second), (first / 2, 0.0), (0.0, second), (1.0, 1.0)]
    return adapter.composed(model_of(head), Noise(), case.method(head), limits)


def measured(name: str, head: str) -> dict[str, Any]:
    return adapter.measured(model_of(head), Noise(), METHODS[name].method(head))


def costs() -> dict[str, Any]:
    models = [(b, h) for b in ("vit_tiny_patch16", "vit_base_patch16") for h in ("linear", "fcn", "atm")]
    return {
        f"{b} {h} {c}": list(adapter.dense_gmacs(b, h, 19, (512, 768), c).values())
        for b, h in models
        for c in ("tokenexit", "dtop")
    }


def entries() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names, and what makes the values to be compared."""
    for name, head in ALL:
        yield f"{name} / {head}", partial(outputs, name, head)
        yield f"{name} / {head} / bf16", partial(outputs, name, head, bf16=True)
        if METHODS[name].trains:
            yield f"{name} / {head} / records", partial(outputs, name, head, records=True)
            yield f"{name} / {head} / training", partial(training, name, head)
    for title, backbone in BACKBONES.items():
        for name, head in (("dtop", "atm"), ("dtop", "fcn"), ("dovit", "fcn"), ("dovit", "setr_pup")):
            if name == "dtop" or backbone.get("class_token", True):
                yield f"{name} / {head} / {title}", partial(outputs, name, head, records=True, **backbone)
    for name, head in (("dtop", "fcn"), ("dovit", "linear"), ("dense", "atm")):
        yield f"{name} / {head} / drop path", partial(training, name, head, drop_path=0.4)
        yield f"{name} / {head} / windows", partial(windows, name, head)
    for name, head in (("dtop", "atm"), ("dovit", "setr_pup"), ("dovit", "fcn")):
        inner = METHODS[name].specified(head)
        yield f"gated {name} / {head}", partial(gated, {"name": "gated", "method": inner, "closed": [0]}, head)
        closed = [[1, [0, 1]], [9, [1]], [20, []]]
        by_size = {"name": "gated_by_size", "method": inner, "closed": closed}
        yield f"gated by size {name} / {head}", partial(gated, by_size, head)
    for head in ("fcn", "atm"):
        yield f"prescribed / {head}", partial(prescribed, head)
    for name, head in (
        ("dense", "atm"), ("dtop", "atm"), ("dtop", "fcn"), ("dtop by class", "fcn"), ("dtop margin", "fcn"),
        ("dtop frozen", "atm"), ("dovit", "setr_pup"), ("dovit by class", "fcn"), ("dovit improving", "fcn"),
        ("paumer", "fcn"), ("truncated", "linear"),
    ):  # fmt: skip
        yield f"{name} / {head} / graph", partial(graph, name, head)
    for name, head in (
        ("dtop", "fcn"), ("dtop", "atm"), ("dtop keeps nobody", "linear"), ("dtop guarded", "mask_transformer"),
        ("dtop capped", "fcn"), ("dtop entropy", "fcn"), ("dovit", "fcn"), ("dovit", "setr_pup"),
        ("dovit", "fcn then atm"), ("dovit live", "linear"), ("dovit improving", "fcn"), ("dovit capped", "fcn"),
        ("dovit guarded", "setr_naive"), ("paumer", "fcn"),
    ):  # fmt: skip
        yield f"{name} / {head} / dense pass", partial(composed, name, head)
    for name, head in (("dtop", "fcn"), ("dovit", "linear"), ("truncated", "fcn")):
        yield f"{name} / {head} / calibration run", partial(measured, name, head)
    yield "dense costs", costs
