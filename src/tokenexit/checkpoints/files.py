"""Tensors are read by name from `.safetensors` and PyTorch files; one sentence says what is wrong with a file."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenexit.errors import CheckpointError

PYTORCH_SUFFIXES = (".pth", ".pt", ".bin")

# Under which names training programs keep the weights. Averaged ones win over raw ones, as in timm; DINO's and DINOv2's
# teacher is the average of its student.
_AVERAGED = ("state_dict_ema", "model_ema", "teacher")
_CONTAINERS = (*_AVERAGED, "state_dict", "model", "model_state", "model_state_dict")


_ALLOWING = threading.Lock()
"""torch keeps the names that a safe load may meet for the whole process."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file as a model knows them, without the training program's wrappings.

    Takes the state dict out of containers (`{"state_dict": ...}`, `{"model": ...}`, ...), then `module.` (data
    parallel training) and `backbone.` (segmentation frameworks) off the names where no two names would meet.
    Otherwise, and in its errors, like `read_tensors`.
    """
    return _strip_prefixes(_named_tensors(_unwrap(_read(Path(path)), Path(path)), Path(path)))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file under the very names they have there; floating-point ones in fp32, on the CPU.

    Objects that a PyTorch file holds beside its weights, such as logs of mmengine, are passed over; none of their code
    is imported or run. Raises `CheckpointError` in one sentence: no such file, an empty, damaged or foreign one, an
    entry that is no plain tensor, a NaN or an infinity.
    """
    return _named_tensors(_read(Path(path)), Path(path))


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a training program's file under its own names, and what it keeps beside them as `meta`.

    Like `read_state_dict`, but of the names only `module.` (data parallel training) is taken off: what stands in front
    of the others tells where the weights are from.
    """
    content = _read(Path(path))
    meta = content.get("meta") if isinstance(content, Mapping) else None
    state = _strip_module(_named_tensors(_unwrap(content, Path(path)), Path(path)))
    return state, dict(meta) if isinstance(meta, Mapping) else {}


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a `.safetensors` file, from its header alone. Raises `CheckpointError` as `read_tensors`."""
    from safetensors import safe_open

    _check_is_weights(Path(path))
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except Exception:  # as of `load_file`
        raise _damaged_safetensors(Path(path)) from None


def _read(path: Path) -> Any:
    """Return whatever the file holds: a dict of tensors, or containers, lists and numbers around them."""
    _check_is_weights(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in PYTORCH_SUFFIXES:
        return _read_pytorch(path)
    raise CheckpointError(
        f"weights '{path}' is of an unknown kind: give a .safetensors, {', '.join(PYTORCH_SUFFIXES)} file."
    )


def _check_is_weights(path: Path) -> None:
    """Reject a path that is no file with content."""
    if path.is_dir():
        raise CheckpointError(f"weights '{path}' is a folder: name the weight file in it.")
    if not path.exists():
        raise CheckpointError(f"weights '{path}' does not exist: check the path.")
    if not path.is_file():
        raise CheckpointError(f"weights '{path}' is no file but a device or pipe: name the weight file.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"weights '{path}' cannot be opened ({error.strerror}): check its permissions.") from None
    if not start:
        raise CheckpointError(f"weights '{path}' is empty: download or save it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"weights '{path}' is a Git LFS pointer, not the weights: run 'git lfs pull' in its folder."
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception:  # the library's own error, OSError or ValueError, by its version and the damage
        raise _damaged_safetensors(path) from None


def _damaged_safetensors(path: Path) -> CheckpointError:
    return CheckpointError(f"weights '{path}' is damaged or no safetensors file: download or save it again.")


def _read_pytorch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() and "global" in str(error).lower():
            return _read_beside_objects(path)
    except Exception:  # a cut or foreign file ends in any of a dozen types
        pass
    raise CheckpointError(f"weights '{path}' is damaged or no PyTorch file: download or save it again.")


class _Inert:
    """A placeholder for an object of another program; it accepts any state and does nothing."""

    def __new__(cls, *given: Any, **named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_beside_objects(path: Path) -> Any:
    """Load with torch's safe unpickler, with an `_Inert` for every class or function that it does not know.

    The names are read from the file; nothing of them is imported.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        with _ALLOWING:
            names: list[Any] = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]
            with safe_globals(names):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # objects that are more than set beside the weights, and as many types as above
        raise CheckpointError(
            f"weights '{path}' holds Python objects that are not loaded for safety, and cannot be passed over: where "
            "you trust the file, load it with the program that wrote it and save its state dict alone, with torch.save "
            "or as .safetensors."
        ) from None


def _unwrap(content: Any, path: Path) -> Any:
    """Go down through containers to the dict that has tensors."""
    if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
        return content
    found = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping) and content[name]]
    averaged = [name for name in found if name in _AVERAGED]
    if len(averaged) == 1:
        found = averaged
    if len(found) > 1:
        raise CheckpointError(
            f"weights '{path}' holds several models ({', '.join(found)}): save the one you want in a file of its own."
        )
    if not found:
        return content
    return _unwrap(content[found[0]], path)


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Check every entry, cast floating-point ones to fp32."""
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"weights '{path}' holds {_kind(content)}, not tensors by name: save a model's state dict."
        )
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"weights '{path}' holds {_kind(value)} under '{key}', not a tensor: save a model's state dict alone."
            )
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise CheckpointError(
                f"weights '{path}' holds '{key}' as a sparse, quantised or complex tensor: "
                "save plain fp32, fp16 or bf16 weights."
            )
        if value.is_floating_point():
            value = value.float()
            if not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"weights '{path}' holds NaN or infinite values in '{key}': "
                    "take a checkpoint from before the training diverged, or download it again."
                )
        state[key] = value
    return state


def _kind(value: Any) -> str:
    """Describe a value in words, short enough for a sentence."""
    if isinstance(value, Mapping):
        names = ", ".join(str(name) for name in list(value)[:5])
        return f"a dict of {names}" if names else "an empty dict"
    return f"a value of type {type(value).__name__}"


def _strip_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = _strip_module(state)
    # Beside `backbone.` such files hold heads under other names; these stay as they are.
    stripped = {key.removeprefix("backbone."): value for key, value in state.items()}
    return stripped if len(stripped) == len(state) else state
