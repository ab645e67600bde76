"""Bodies of requests, made before the run, and the reading of answers (Open Inference Protocol v2, binary tensors)."""

from __future__ import annotations

import json
import os
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdial.errors import ConfigError, DataError
from bitdial.loadtest.client import Target
from bitdial.loadtest.model import DATATYPES, InputInfo, RemoteModel

RANDOM_VARIANTS = 8  # different bodies of random numbers; engines' times do not depend on the values
MOST_BYTES = 1 << 30  # of all prebuilt bodies together


@dataclass(frozen=True)
class LabelledImages:
    """images: as the network takes them, batch axis first, any number type. labels: int64, one per image."""

    images: NDArray[Any]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Payload:
    """requests: bytes of whole HTTP requests. labels: per variant int64 [samples], None without labels. samples: of each."""

    requests: tuple[bytes, ...]
    labels: tuple[NDArray[np.int64], ...] | None
    samples: int


def read_labelled(path: str | os.PathLike[str]) -> LabelledImages:
    """The arrays `images` and `labels` of an .npz file; nothing in it is unpickled.

    Raises DataError: unreadable, an array is missing, they differ in length, values that are not finite.
    """
    place = Path(path)
    try:
        with np.load(place, allow_pickle=False) as held:
            missing = [name for name in ("images", "labels") if name not in held]
            if missing:
                raise DataError(f"{place} has no array '{missing[0]}'; it needs `images` and `labels`")
            images, labels = held["images"], held["labels"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {place}: {error}; it must be an .npz file with `images` and `labels`") from None
    if images.ndim < 1 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise DataError(f"{place}: images {images.shape} and labels {labels.shape} do not belong together")
    if images.dtype.kind not in "biuf" or labels.dtype.kind not in "iu":
        raise DataError(
            f"{place}: images must be numbers and labels whole numbers; they are {images.dtype}, {labels.dtype}"
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise DataError(f"{place}: some values of the images are not finite")
    return LabelledImages(images, labels.astype(np.int64))


def build_payload(
    target: Target,
    model: RemoteModel,
    samples: int,
    *,
    data: LabelledImages | None = None,
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Payload:
    """Requests of `samples` samples each. With data: its samples in an order drawn by `seed`, as many as fit in memory (1 GiB);
    without: random numbers.

    Raises ConfigError (an input that cannot be made up, more samples than there are) and DataError (samples that do not fit).
    """
    if samples < 1:
        raise ConfigError(f"a request needs at least one sample, got {samples}")
    random = np.random.default_rng([seed, 4])
    path = f"/v2/models/{urllib.parse.quote(model.name, safe='')}/infer"
    if data is not None:
        array = _fitting(model, data)
        if len(array) < samples:
            raise ConfigError(f"a request of {samples} samples is more than the {len(array)} of the data; ask for fewer")
        count = min(len(array) // samples, max(1, MOST_BYTES // max(1, array[:samples].nbytes)))
        order = random.permutation(len(array))[: count * samples].reshape(count, samples)
        info = model.inputs[0]
        bodies = tuple(_request(target, path, [(info, array[row])], parameters) for row in order)
        return Payload(bodies, tuple(data.labels[row] for row in order), samples)
    shapes = [_shape(info, samples) for info in model.inputs]
    size = sum(
        int(np.prod(s)) * np.dtype(DATATYPES[i.datatype]).itemsize for i, s in zip(model.inputs, shapes, strict=True)
    )
    if size > MOST_BYTES:
        raise ConfigError(f"a request of {samples} samples would have {size / 1e6:.0f} MB; ask for fewer samples")
    made = []
    for _ in range(max(1, min(RANDOM_VARIANTS, MOST_BYTES // max(1, size)))):
        tensors = [(i, _random(random, DATATYPES[i.datatype], s)) for i, s in zip(model.inputs, shapes, strict=True)]
        made.append(_request(target, path, tensors, parameters))
    return Payload(tuple(made), None, samples)


def _fitting(model: RemoteModel, data: LabelledImages) -> NDArray[Any]:
    if len(model.inputs) != 1:
        raise ConfigError(f"model '{model.name}' has {len(model.inputs)} inputs; labelled samples fit models with one")
    info = model.inputs[0]
    shape = _shape(info, 1)[1:]
    given = data.images.shape[1:]
    # A size that the model leaves free is the data's own.
    if len(given) != len(shape) or any(w not in (-1, g) for w, g in zip(info.shape[1:], given, strict=True)):
        raise DataError(f"samples of shape {list(given)} do not fit the input '{info.name}' of shape {list(info.shape)}")
    return np.ascontiguousarray(data.images, dtype=DATATYPES[info.datatype])


def _shape(info: InputInfo, samples: int) -> tuple[int, ...]:
    if info.datatype not in DATATYPES:
        raise ConfigError(f"input '{info.name}' has the datatype {info.datatype}, for which no values can be made up")
    if not info.shape or info.shape[0] not in (-1, samples):
        raise ConfigError(
            f"input '{info.name}' of shape {list(info.shape)} takes no batch of {samples}; give another --samples"
        )
    return (samples, *(d if d >= 0 else 1 for d in info.shape[1:]))


def _random(random: np.random.Generator, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    if np.dtype(dtype).kind == "f":
        return random.standard_normal(shape, dtype=np.float32).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)  # safe as token numbers and as flags


def _request(
    target: Target, path: str, tensors: Sequence[tuple[InputInfo, NDArray[Any]]], parameters: Mapping[str, float] | None
) -> bytes:
    blocks = [array.tobytes() for _, array in tensors]
    document = {
        "parameters": {**(parameters or {}), "binary_data_output": True},
        "inputs": [
            {
                "name": info.name,
                "datatype": info.datatype,
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(block)},
            }
            for (info, array), block in zip(tensors, blocks, strict=True)
        ],
    }
    head = json.dumps(document, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return target.request("POST", path, b"".join([head, *blocks]), headers)


def read_document(body: bytes, header_length: int) -> dict[str, Any]:
    """The JSON part of an answer. Raises ValueError if it is none."""
    if header_length > len(body):
        raise ValueError("the answer is shorter than its JSON part")
    document = json.loads(body if header_length < 0 else body[:header_length])
    if not isinstance(document, dict):
        raise ValueError("the answer is no JSON object")
    return document


def count_right(document: Mapping[str, Any], body: bytes, header_length: int, labels: NDArray[np.int64]) -> int:
    """How many samples the first output puts the label first for (highest value; the first of equals).

    Raises ValueError if the output does not hold one row of scores per sample.
    """
    try:
        output = document["outputs"][0]
        shape = [int(d) for d in output["shape"]]
        if "data" in output:
            scores: NDArray[Any] = np.asarray(output["data"], np.float64)
        else:
            size = int(output["parameters"]["binary_data_size"])
            dtype = np.dtype(DATATYPES[output["datatype"]])
            scores = np.frombuffer(body, dtype, size // dtype.itemsize, header_length)
        best = scores.reshape(shape).reshape(len(labels), -1).argmax(axis=1)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the answer's first output holds no scores per sample: {error}") from None
    return int(np.count_nonzero(best == labels))
