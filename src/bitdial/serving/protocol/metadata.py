"""Metadata documents of the Open Inference Protocol v2, and what public clients ask for beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitdial._version import __version__
from bitdial.serving.protocol.datatypes import datatype_of
from bitdial.serving.protocol.response import VERSION

if TYPE_CHECKING:
    from bitdial.serving.worker.info import ModelInfo, TensorInfo

PLATFORM = "bitdial"
EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")


def server_metadata() -> dict[str, Any]:
    """GET /v2."""
    return {"name": "bitdial", "version": __version__, "extensions": list(EXTENSIONS)}


def tensor_metadata(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    """Name, datatype and shape (-1 at the batch axis) of tensors."""
    return [{"name": t.name, "datatype": datatype_of(t.dtype), "shape": list(t.shape)} for t in tensors]


def model_metadata(
    name: str, info: ModelInfo, slo: float, top: float | None = None, bound_by: str = "", dilation: float | None = None
) -> dict[str, Any]:
    """GET /v2/models/{m}. `parameters` holds what this server adds: the ratios, their accuracies as measured (0..1), the latency
    bound (given in seconds), the highest ratio that the dial takes (top; None: the last), and what bounds it
    (`Settings.bound_by`); where times are modelled, the seconds of the wall clock in one of them (dilation)."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": tensor_metadata(info.inputs),
        "outputs": tensor_metadata(info.outputs),
        "parameters": {
            "ratios": list(info.ratios),
            "accuracy": list(info.accuracy),
            "max_ratio": info.ratios[-1] if top is None else top,
            "max_ratio_from": bound_by,
            "slo_ms": 1000.0 * slo,
            "digest": info.digest,
            **({} if dilation is None else {"dilation": dilation}),
        },
    }


def model_config(name: str, info: ModelInfo, max_batch: int, max_wait: float) -> dict[str, Any]:
    """GET /v2/models/{m}/config, in the form that Triton's clients read. max_wait: seconds."""

    def tensors(items: Sequence[TensorInfo]) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "data_type": f"TYPE_{datatype_of(t.dtype)}", "dims": [d for d in t.shape if d >= 0]}
            for t in items
        ]

    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": max_batch,
        "input": tensors(info.inputs),
        "output": tensors(info.outputs),
        "dynamic_batching": {"max_queue_delay_microseconds": math.ceil(1e6 * max_wait)},
    }
