"""Print the table of docs/evidence/adapt.md from the files of the study.

python docs/evidence/adapt/adapt_tables.py docs/evidence/adapt/camvid_seed*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def row(name: str, seed: str, result: dict[str, Any]) -> str:
    low, high = result["miou_minus_dense_interval"]
    photos = result["on_test_photos"]
    return " | ".join(
        [
            f"| {name}",
            seed,
            result["plan"],
            f"{photos['mac_ratio']:.0%}",
            f"{1 - photos['disagreement']:.1%}",
            f"{result['miou']:.2f}",
            f"{result['miou'] - result['miou_dense']:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{result['share_of_dense_on_test_split']:.0%}",
            f"{photos['speedup']:.1f}x |",
        ]
    )


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    results = {path.stem[-1]: json.loads(path.read_text())["results"] for path in files}
    names = list(dict.fromkeys(name for one in results.values() for name in one))
    print("| asked | seed | plan | of dense, photos | pixels as dense | mIoU | to dense | of dense, test | time |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for name in sorted(names):
        for seed, one in sorted(results.items()):
            if name in one:
                print(row(name, seed, one[name]))


if __name__ == "__main__":
    main()
