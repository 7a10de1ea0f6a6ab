"""Largest difference of features from the libraries', for every family of backbones, source of weights and path.

    python docs/evidence/backbones/parity.py --out docs/evidence/backbones/parity.json
    python docs/evidence/backbones/parity.py --out docs/evidence/backbones/parity.json --table

Needs timm and transformers (`pip install -e '.[parity]'`). Weights are random, queries and keys of rotary models three
times as long as usual, so that features depend on place. The figure is the largest |ours - theirs| over the larger of 1
and the largest |theirs|, in fp32, over the embedding, every block and the last norm, at two sizes, one of them square.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout
from tests.engine.test_cuda_graphs import Recorder
from tests.parity import (
    conftest,  # noqa: F401 declares what PyPI's torchvision misses beside a CPU build of torch
    test_dinov3,
    test_eva,
    test_timm,
    test_transformers,
)
from tests.parity.compare import Reference, largest_distance, phases_of_others

from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.conversion.convert import convert
from tokenexit.conversion.wrap import wrap
from tokenexit.engine.vit import ViT

EXITS = (1, 2)
PATHS = ("all tokens", "tokens leave", "tokens leave, padded graphs", "control: phases of other tokens")
Options = dict[str, Any]


def cases() -> Iterator[tuple[str, str, Any, dict[str, Tensor] | None, Reference, Options]]:
    """Family, source, the library's module, weights as the source names them (None: the module), what to compare."""
    for family, (name, changes) in test_timm.FAMILIES.items():
        model = test_timm.library_model(name, **changes)
        yield family, "timm", model, model.state_dict(), test_timm.reference(model), {"num_heads": 4}
        yield family, "timm module", model, None, test_timm.reference(model), {}
    for family in test_transformers.FAMILIES:
        model = test_transformers.library_model(family)
        reference = test_transformers.reference(model)
        options = {"num_heads": 4, "norm_eps": model.config.layer_norm_eps}
        yield family, "transformers", model, model.state_dict(), reference, options
        yield family, "transformers module", model, None, reference, {}
    for gated in (False, True):
        family = f"dinov3, {'swiglu' if gated else 'gelu'}"
        model = test_dinov3.timm_model(gated)
        reference = test_dinov3.timm_reference(model)
        yield family, "timm", model, model.state_dict(), reference, {"num_heads": 3}
        yield family, "timm module", model, None, reference, {}
        yield family, "release", model, test_dinov3.own_names(model.state_dict()), reference, {"num_heads": 3}
        model = test_dinov3.transformers_model(gated)
        reference = test_dinov3.transformers_reference(model)
        yield family, "transformers", model, model.state_dict(), reference, {"num_heads": 3}
        yield family, "transformers module", model, None, reference, {}
    for family in test_eva.FAMILIES:
        model = test_eva.library_model(family)
        reference = test_dinov3.timm_reference(model)
        yield family, "timm", model, model.state_dict(), reference, {"num_heads": 3}
        yield family, "timm module", model, None, reference, {}
        if family.startswith("eva02"):
            yield family, "release", model, test_eva.own_names(model.state_dict()), reference, {"num_heads": 3}
    model = test_eva.siglip()
    options = {"num_heads": 3, "mlp": "gelu_tanh"}
    yield "siglip2", "timm", model, model.state_dict(), test_timm.reference(model), options
    yield "siglip2", "timm module", model, None, test_timm.reference(model), {}


def opened(model: Any, state: dict[str, Tensor] | None, options: Options) -> ViT:
    """Convert the weights, or wrap the module."""
    if state is None:
        return wrap(model, num_classes=2).backbone
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = (Path(temporary) / f"{name}.safetensors" for name in ("theirs", "ours"))
        save_file({key: value.contiguous() for key, value in state.items()}, theirs)
        report = convert(theirs, ours, options=options)
        backbone = ViT(report.backbone).eval()
        load_backbone(backbone, read_state_dict(ours))
    return backbone


def figures(ours: ViT, reference: Reference) -> dict[str, float]:
    """The largest difference on every path; the control is there for rotary positions alone."""
    side = ours.config.patch_size
    sizes = [(8 * side, 8 * side), (5 * side, 12 * side)]

    def largest(compare: Callable[[tuple[int, int]], float]) -> float:
        return max(map(compare, sizes))

    found = {
        PATHS[0]: largest(lambda size: largest_distance(ours, reference, size)),
        PATHS[1]: largest(lambda size: largest_distance(ours, reference, size, EXITS)),
    }
    if ours.config.rope is not None:
        found[PATHS[3]] = min(largest_distance(ours, reference, size, EXITS, phases_of_others) for size in sizes)
    ours.capture_blocks(step=8, record=Recorder())
    found[PATHS[2]] = largest(lambda size: largest_distance(ours, reference, size, EXITS))
    return {path: found[path] for path in PATHS if path in found}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| family | source | {' | '.join(PATHS)} |", "|---|---|" + "---:|" * len(PATHS)]
    for row in rows:
        cells = [f"{row['figures'][path]:.1e}" if path in row["figures"] else "" for path in PATHS]
        lines.append(f"| {row['family']} | {row['source']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="table of existing figures only")
    options = parser.parse_args()
    if not options.table:
        torch.manual_seed(0)
        rows = []
        for family, source, model, state, reference, given in cases():
            found = figures(opened(model, state, given), reference)
            rows.append({"family": family, "source": source, "figures": found})
            print(family, source, found, flush=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
