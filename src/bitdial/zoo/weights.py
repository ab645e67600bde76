"""Trained weights from files: .safetensors, or .pt / .pth read without unpickling objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitdial.errors import DataError

StateDict = dict[str, Tensor]

# Keys under which training scripts store the state dict inside a checkpoint.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and torch.compile


def read_weights(path: Path) -> StateDict:
    """State dict of a weights file, on the CPU.

    A .pt or .pth file goes through `torch.load(weights_only=True)`, which refuses everything but tensors and plain
    containers. A checkpoint that holds its state dict under "state_dict", "model_state_dict", "model" or "net" is
    unwrapped; the prefixes "module." and "_orig_mod." are removed where every name has them.
    Raises DataError if the file is missing, of an unknown kind, damaged, or needs pickle.
    """
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist; check the path given as --weights")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            state = load_file(str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable safetensors file ({error}); copy or export it again") from error
    elif suffix in (".pt", ".pth"):
        state = _read_torch(path)
    else:
        raise DataError(f"weights file {path} has the unknown ending '{suffix}'; use .safetensors, .pt or .pth")
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


def assign_weights(model: nn.Module, state: StateDict, origin: str) -> None:
    """Copy `state` into `model`, every parameter and buffer by name and shape; `origin` names the source in errors.

    Only the counters `num_batches_tracked` of BatchNorm may be absent: they play no part in evaluation.
    Raises DataError naming missing, unexpected and wrongly shaped entries, and entries that are not finite.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems = [
        f"{label}: {_first(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("shape", reshaped))
        if names
    ]
    if problems:
        raise DataError(
            f"{origin} does not fit {type(model).__name__} ({'; '.join(problems)}); "
            "choose the model the weights were trained for, or its number of classes"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{origin}: {name} holds NaN or infinite values; use an undamaged file")
    model.load_state_dict(state, strict=False)


def _read_torch(path: Path) -> StateDict:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for the kinds of unusable files
        raise DataError(
            f"{path} cannot be read as plain tensors: it is damaged or holds pickled objects, which bitdial does not "
            "load. Save the state dict with safetensors.torch.save_file(model.state_dict(), ...), or with "
            "torch.save(model.state_dict(), ...)"
        ) from error
    if isinstance(loaded, Mapping):
        nested = next((loaded[key] for key in _NESTED_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
        if nested and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in nested.items()):
            return dict(nested)
    raise DataError(f"{path} holds no state dict; save it with torch.save(model.state_dict(), ...)")


def _first(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
