"""Answers of the Open Inference Protocol v2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.serving.errors import ComputeFailed
from bitdial.serving.protocol.datatypes import datatype_of
from bitdial.serving.protocol.slices import Steps, finish, write_numbers

VERSION = "1"


def infer_response(
    model: str,
    names: Sequence[str],
    outputs: Sequence[npt.NDArray[Any]],
    requested: Sequence[tuple[int, bool]],
    id: str = "",
    parameters: str = "{}",
) -> tuple[bytes, int | None]:
    """(body, bytes of its JSON part; None if it is JSON throughout) of an answer.

    outputs: all outputs of the model; names: theirs. requested: as in `InferRequest`. parameters: JSON text.
    Raises ComputeFailed if an output that was asked for as JSON is not finite, since JSON cannot say so.
    """
    return finish(infer_response_steps(model, names, outputs, requested, id, parameters))


def infer_response_steps(
    model: str,
    names: Sequence[str],
    outputs: Sequence[npt.NDArray[Any]],
    requested: Sequence[tuple[int, bool]],
    id: str = "",
    parameters: str = "{}",
) -> Steps[tuple[bytes, int | None]]:
    """`infer_response` as work in steps, one of them enough for all but large outputs in JSON."""
    described: list[str] = []
    tail: list[bytes] = []
    for at, binary in requested:
        array = outputs[at]
        head = (
            f'{{"name":{json.dumps(names[at])},"datatype":"{datatype_of(array.dtype)}",'
            f'"shape":[{",".join(map(str, array.shape))}]'
        )
        if binary:
            data = array.tobytes()
            tail.append(data)
            described.append(f'{head},"parameters":{{"binary_data_size":{len(data)}}}}}')
        else:
            try:
                text = yield from write_numbers(array)
            except ValueError:
                raise ComputeFailed(
                    f"output '{names[at]}' is not finite, which JSON cannot say: ask for it in binary"
                ) from None
            described.append(f'{head},"data":{text}}}')
    identity = f'"id":{json.dumps(id)},' if id else ""
    header = (
        f'{{"model_name":{json.dumps(model)},"model_version":"{VERSION}",{identity}'
        f'"parameters":{parameters},"outputs":[{",".join(described)}]}}'
    ).encode()
    if not tail:
        return header, None
    return b"".join([header, *tail]), len(header)


def answer_parameters(ratio: float, queue: float, compute: float, batch: int, dilation: float | None = None) -> str:
    """JSON text of an answer's parameters: the ratio executed, seconds waited and computed (as ms), samples of the batch; where
    they are modelled seconds, how many of the wall clock one takes."""
    slowed = "" if dilation is None else f',"dilation":{dilation!r}'
    return (
        f'{{"ratio":{ratio!r},"queue_ms":{1000 * max(queue, 0.0):.6g},"compute_ms":{1000 * max(compute, 0.0):.6g},'
        f'"batch":{batch}{slowed}}}'
    )


def error_body(message: str) -> bytes:
    """The protocol's error document."""
    return json.dumps({"error": message}).encode()


def plain_json(value: Any) -> Any:
    """`value` with what JSON lacks turned into what it has: NumPy scalars into numbers, NaN and infinity into null."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
