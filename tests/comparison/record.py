"""Record what the code says, or compare it with a record.

    python -m tests.comparison.record --out FILE        write what the code of this checkout says
    python -m tests.comparison.record --against FILE    compare it with a record, say what differs and how far

Bits depend on the kernels of a processor and a torch version. The committed record, `reference.json`, was made by the
commit that added this folder; where its kernels are not those of your machine, check that commit out, write a record
of your own, and compare later commits with that. Only `macs` and `macs by part` of `truncated` were recorded anew, by
the commit from which on prefix tokens do not run behind its exit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.comparison.cases import entries

REFERENCE = Path(__file__).with_name("reference.json")

Entry = dict[str, list[Any]]
"""By name of a value its digest, how many numbers it has, and two figures of it: its norm and a fixed projection."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def kernels() -> dict[str, str]:
    """What the bits depend on besides the library: torch, and a digest of what its operators answer here."""
    rng = torch.Generator().manual_seed(0)
    answers: list[Tensor] = []
    with one_thread(), torch.no_grad():
        for rows in (1, 7, 20, 133):
            x, w = torch.randn(rows, 32, generator=rng), torch.randn(64, 32, generator=rng)
            for dtype in (torch.float32, torch.bfloat16):
                y = F.linear(x.to(dtype), w.to(dtype))
                q = y.view(1, rows, 2, 32).transpose(1, 2)
                answers += [y, F.gelu(y), F.scaled_dot_product_attention(q, q, q)]
            answers += [F.layer_norm(y.float(), (64,)), y.float().softmax(1), y.float().exp(), y.float().log_softmax(1)]
        maps = torch.randn(2, 12, 9, 11, generator=rng)
        kernel = torch.randn(12, 12, 3, 3, generator=rng)
        for dtype in (torch.float32, torch.bfloat16):
            answers.append(F.conv2d(maps.to(dtype), kernel.to(dtype), padding=1))
        answers += [
            F.interpolate(maps, (27, 40), mode="bilinear"),
            F.interpolate(maps, (5, 13), mode="bicubic", antialias=True),
        ]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": "1",
        "operators": summary(answers)[0],
    }


def summary(value: Any) -> list[Any]:
    """The digest of a value's bytes, types and shapes, and figures that say how far two such values are apart."""
    digest, tensors = hashlib.sha256(), []
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous()
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.flatten().view(torch.uint8).numpy().tobytes())
            tensors.append(leaf.flatten().double())
        else:
            digest.update(repr(leaf).encode())
            if isinstance(leaf, int | float):
                tensors.append(torch.tensor([leaf], dtype=torch.float64))
    flat = torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.float64)
    wave = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 1.7)
    figures = (flat.norm().item(), (flat * wave).sum().item())
    return [digest.hexdigest()[:12], len(flat), *(float(f"{figure:.6g}") for figure in figures)]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield f"{len(value)} of"
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def record_entry(make: Any) -> Entry:
    with one_thread():
        torch.manual_seed(0)
        return {name: summary(value) for name, value in make().items()}


def differences(now: Mapping[str, list[Any]], then: Mapping[str, list[Any]]) -> list[str]:
    """What of an entry is not bit for bit what it was, a line each."""
    lines = [f"{name}: not recorded before" for name in now.keys() - then.keys()]
    lines += [f"{name}: recorded before, now missing" for name in then.keys() - now.keys()]
    for name in sorted(now.keys() & then.keys()):
        (digest, count, *figures), (old, old_count, *old_figures) = now[name], then[name]
        if digest == old:
            continue
        if count != old_count:
            lines.append(f"{name}: {old_count} numbers before, {count} now")
            continue
        apart = max(abs(a - b) for a, b in zip(figures, old_figures)) / max(old_figures[0], 1e-30)
        lines.append(
            f"{name}: other bits, about {apart:.1e} of its norm apart (norm and projection {old_figures} -> {figures})"
        )
    return lines


def record(say: Any = lambda line: None) -> dict[str, Any]:
    made = {}
    for name, make in entries():
        say(name)
        made[name] = record_entry(make)
    return {"kernels": kernels(), "entries": made}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with one entry a line, which keeps differences readable."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
        for name, entry in content["entries"].items()
    ]
    head = json.dumps(content["kernels"])
    path.write_text(f'{{"kernels": {head},\n"entries": {{\n' + ",\n".join(lines) + "\n}}\n")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record what the code says, or compare it with a record.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--out", type=Path, metavar="FILE", help="record to write")
    group.add_argument("--against", type=Path, metavar="FILE", help="record to compare with")
    options = parser.parse_args(None if arguments is None else list(arguments))
    now = record()
    if options.out is not None:
        write(options.out, now)
        print(f"{len(now['entries'])} entries written to {options.out}")
        return 0
    then = json.loads(options.against.read_text())
    if now["kernels"] != then["kernels"]:
        print(
            f"note: recorded with {then['kernels']}, here {now['kernels']}: bits may differ without a cause in the code"
        )
    names = dict.fromkeys([*then["entries"], *now["entries"]])
    lines = [
        f"{name}: {line}"
        for name in names
        for line in differences(now["entries"].get(name, {}), then["entries"].get(name, {}))
    ]
    print("\n".join(lines) or f"all {len(names)} entries are bit for bit the same")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
