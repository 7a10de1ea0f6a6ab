"""A cache of measurements in the user's cache folder, one JSON file for each; delete a file to measure again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from tokenexit.errors import CheckpointError
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.schema import fits, read_json


def cached_path(kind: str, device: torch.device, *facts: Any) -> Path:
    """Return the path of a measurement on this machine, with its number of threads and torch, and of these facts."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = json.dumps([*facts, name, torch.get_num_threads(), torch.__version__], default=list)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tokenexit" / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_cached(path: Path, kind: Any) -> Any:
    """Return a cached value that fits the annotation `kind`; None where there is none."""
    try:
        values = read_json(path, "delete it")
    except (OSError, CheckpointError):
        return None
    return values if fits(values, kind) else None


def write_cached(path: Path, values: Any) -> None:
    """Write a value to the cache; where that fails, the next call measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(values) + "\n")
    except OSError:
        return
