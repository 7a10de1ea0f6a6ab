"""Small files of measurements in the user's cache folder, one for each machine and question; delete one to ask anew."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from tokenexit.writing import whole


def cached_path(kind: str, device: torch.device, *facts: Any) -> Path:
    """Where an answer is kept that holds for this machine, number of threads and torch, and for these facts."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = json.dumps([*facts, name, torch.get_num_threads(), torch.__version__], default=list)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tokenexit" / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_cached(path: Path) -> Any:
    """What was kept, or None where there is nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def keep(path: Path, values: Any) -> None:
    """Keep for the next time; where the cache cannot be written, the next time measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_text(json.dumps(values) + "\n")
    except OSError:
        return
