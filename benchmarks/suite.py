"""Measure all rows of `docs/evidence/performance.md` that are missing, and print the tables.

    python -m benchmarks.suite --out docs/evidence/performance/cpu --threads 1
    python -m benchmarks.suite --out docs/evidence/performance/gpu --device cuda
    python -m benchmarks.suite --out docs/evidence/performance/cpu --tables

Every row is a process of its own and a JSON file; interrupted, it goes on with the first row that has no file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL, BASE, LARGE = "vit_small_patch16", "vit_base_patch16", "vit_large_patch16"
MIXED = ["--batch", "8", "--leave", "0.95", "0.8", "0.65", "0.5", "0.4", "0.3", "0.15", "0", "--one-by-one"]
LIVE_SHARES = (45, 40, 35, 30, 25)

Row = tuple[str, list[str]]


def cpu_rows() -> list[Row]:
    rows: list[Row] = []
    for size, backbone, precision in (
        *((512, backbone, precision) for backbone in (SMALL, BASE) for precision in ("bf16", "fp32")),
        *((1024, backbone, precision) for backbone in (SMALL, BASE) for precision in ("bf16", "fp32")),
    ):
        rivals = [] if (size, precision) == (1024, "fp32") else ["--rivals"]
        rows.append((f"half-{_short(backbone)}-{size}-{precision}", _settings(backbone, precision, size) + rivals))
    for backbone in (SMALL, BASE):
        for precision in ("bf16", "fp32"):
            sizes = (512, 448) if (backbone, precision) != (BASE, "fp32") else (384, 320)
            name = f"mixed8-{_short(backbone)}-{precision}"
            rows.append((name, _settings(backbone, precision, *sizes) + MIXED))
            name = f"nothing-{_short(backbone)}-{precision}"
            rows.append((name, [*_settings(backbone, precision, 512), "--leave", "0", "--exits", "3", "6", "9"]))
    rows += dovit_rows(BASE, "setr_naive", [3], "bf16", LIVE_SHARES)
    rows += dovit_rows(BASE, "mask_transformer", [3], "bf16", LIVE_SHARES)
    rows += dovit_rows(LARGE, "setr_naive", [6], "bf16", LIVE_SHARES)
    return rows + rotary_rows() + eomt_rows()


def rotary_rows() -> list[Row]:
    """DINOv3 with half leaving: what rotation adds to queries and keys shrinks with them."""
    rows: list[Row] = []
    for size in (512, 1024):
        for backbone in ("dinov3_vits16", "dinov3_vitb16"):
            for precision in ("bf16", "fp32"):
                rivals = [] if (size, precision) == (1024, "fp32") else ["--rivals"]
                rows.append((f"half-{backbone}-{size}-{precision}", _settings(backbone, precision, size) + rivals))
    return rows


def eomt_rows() -> list[Row]:
    """EoMT with half leaving after a quarter of its blocks; the queries' blocks and masks are in dense and dynamic."""
    return [
        (
            f"half-eomt-{method}-512-{precision}",
            [*_settings("dinov3_vits16", precision, 512), "--head", "eomt", "--method", method, "--num-classes", "150"],
        )
        for method in ("dovit", "dtop")
        for precision in ("bf16", "fp32")
    ]


def gpu_rows() -> list[Row]:
    rows: list[Row] = []
    for backbone in (BASE, LARGE):
        for size in (512, 768):
            one = _settings(backbone, "bf16", size)
            rows.append((f"half-{_short(backbone)}-{size}-bf16", [*one, "--rivals"]))
            rows.append((f"half-{_short(backbone)}-{size}-bf16-captured", [*one, "--captured"]))
            rows.append((f"half-{_short(backbone)}-{size}-bf16-compiled", [*one, "--compiled-blocks"]))
            for batch in (8, 32):
                mixed = ["--batch", str(batch), *MIXED[2:-1]]
                rows.append((f"mixed{batch}-{_short(backbone)}-{size}-bf16", one + mixed))
            rows.append((f"nothing-{_short(backbone)}-{size}-bf16", [*one, "--leave", "0"]))
        depth = 12 if backbone == BASE else 24
        for head in ("setr_naive", "mask_transformer"):
            rows += dovit_rows(backbone, head, [depth // 4], "bf16", LIVE_SHARES)
    return rows


def dovit_rows(backbone: str, head: str, exits: list[int], precision: str, live: Sequence[int]) -> list[Row]:
    """DoViT at 768x768 with a share of the tokens live after its first checkpoint."""
    same = [*_settings(backbone, precision, 768), "--method", "dovit", "--head", head, "--num-classes", "150"]
    same += ["--exits", *map(str, exits)]
    return [
        (f"dovit-{_short(backbone)}-{head}-{share}-{precision}", [*same, "--leave", f"{1 - share / 100:.2f}"])
        for share in live
    ]


def _settings(backbone: str, precision: str, *sizes: int) -> list[str]:
    return ["--backbone", backbone, "--precision", precision, "--size", *map(str, sizes)]


def _short(backbone: str) -> str:
    return backbone.split("_")[1]


def table(folder: Path, names: Sequence[str]) -> str:
    """Markdown, one line for every row that was measured."""
    head = "| row | dense ms | dynamic ms | MAC ratio | speed-up | conversion | against compiled dense |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            lines.append(_line(name, json.loads(path.read_text())))
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    gain = row.get("conversion") or row["overhead"]
    kind = "" if "conversion" in row else f" slower for {row['head_macs_share']:.1%} more MACs"
    rival = row.get("compiled / dynamic")
    return (
        f"| {name} | {row['ms']['dense']:.0f} | {row['ms']['dynamic']:.0f} | {row['mac_ratio']:.2f} "
        f"| {_spread(row['speedup'])} | {_spread(gain)}{kind} | {_spread(rival) if rival else ''} |"
    )


def _spread(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['median']:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="prefix of the names of rows to run")
    parser.add_argument("--tables", action="store_true", help="tables of existing figures only, without measurements")
    options = parser.parse_args()

    rows = [row for row in (cpu_rows() if options.device == "cpu" else gpu_rows()) if row[0].startswith(options.only)]
    for number, (name, settings) in enumerate(rows, 1):
        path = options.out / f"{name}.json"
        if options.tables or path.exists():
            continue
        print(f"{number} of {len(rows)}: {name}", file=sys.stderr, flush=True)
        fixed = ["--device", options.device, "--threads", str(options.threads), "--rounds", str(options.rounds)]
        command = [sys.executable, "-m", "benchmarks.conversion", *settings, *fixed, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(table(options.out, [name for name, _ in rows]))


if __name__ == "__main__":
    main()
