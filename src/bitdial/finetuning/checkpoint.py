"""The state of a training run in one safetensors file: tensors, and everything else as JSON in its header. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitdial.errors import DataError
from bitdial.files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write atomically: after an interruption the file is the former one or this one. Raises OutputError."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    document = json.dumps({"format": FORMAT, "sha256": digest(plain), **state}, allow_nan=True)
    write_atomically(path, save(plain, {"bitdial_finetuning": document}), "the checkpoint")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state). Raises DataError if the file is damaged or none of ours."""
    remedy = "delete it to train from the start"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(metadata["bitdial_finetuning"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a readable finetuning checkpoint ({error}); {remedy}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(f"{path} is a checkpoint of another version; {remedy}")
    if state.get("sha256") != digest(tensors):
        raise DataError(f"{path} is damaged: its tensors are not those that were written; {remedy}")
    return tensors, state


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by "index.field" (its hyperparameters follow from the step)."""
    result = {}
    for index, values in optimizer.state_dict()["state"].items():
        for field, value in values.items():
            if isinstance(value, Tensor):
                result[f"{index}.{field}"] = value
    return result


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
