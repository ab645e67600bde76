"""What a worker tells of its model, as plain data that crosses between processes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdial.quantization.answers import KeptAnswers

if TYPE_CHECKING:
    from bitdial.serving.control import ServiceTable


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model.

    name          as in the graph
    dtype         NumPy's name, e.g. "float32"
    shape         -1 at the batch axis
    batch_factor  the batch axis holds batch_factor entries per sample, one sample's entries beside each other
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    batch_factor: int = 1

    @cached_property
    def axis(self) -> int:
        """Where the batch lies."""
        return self.shape.index(-1)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """`dtype` as NumPy's object, which compares faster than the name."""
        return np.dtype(self.dtype)

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.shape[: self.axis], self.shape[self.axis + 1 :]

    def of(self, samples: int) -> tuple[int, ...]:
        """Shape of a batch of so many samples."""
        before, after = self._around
        return (*before, samples * self.batch_factor, *after)

    def samples_of(self, shape: tuple[int, ...]) -> int:
        """Samples in an array of that shape; 0 if it does not fit."""
        axis = self.axis
        if len(shape) != len(self.shape) or (shape[:axis], shape[axis + 1 :]) != self._around:
            return 0
        samples, rest = divmod(shape[axis], self.batch_factor)
        return 0 if rest else samples

    def __str__(self) -> str:
        dims = [("N" if self.batch_factor == 1 else f"{self.batch_factor}N") if d == -1 else str(d) for d in self.shape]
        return f"{self.dtype}[{', '.join(dims)}]"


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model.

    name       for people: the one asked for, else the file's name without its ending
    ratios     ascending
    accuracy   per ratio the share of right answers on evaluation data, 0..1; None where the file has none
    agreement  per ratio the share of answers on those data that are the smallest ratio's; None as above
    samples    of those data; None where unknown
    engine     JSON-able: name, processor, and what else the engine says of itself (isa, threads, kernels, memory, device)
    layers     JSON-able, one dict per integer layer in graph order: name, source (module path), kind, macs (per sample),
               eligible, reason (why not), low (share of its multiply-accumulates that run low, per ratio)
    digest     sha256 of the file, hexadecimal
    kept       what quantizing found out about the answers that each ratio keeps, if it did
    modelled   per ratio the seconds of one sample, where a model of a machine that is not here says them (a batch takes as many
               times that); empty where time is this machine's
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ratios: tuple[float, ...]
    accuracy: tuple[float | None, ...]
    engine: dict[str, Any]
    layers: list[dict[str, Any]]
    digest: str
    agreement: tuple[float | None, ...] = ()
    samples: int | None = None
    kept: KeptAnswers | None = None
    modelled: tuple[float, ...] = ()

    def judge(self, table: ServiceTable) -> ServiceTable:
        """A service table of this model's ratios with what the file says about their worth: the one place where a curve becomes
        what the controller goes by."""
        ceiling = None if self.kept is None else self.kept.ceiling
        return replace(table, accuracy=self.accuracy, agreement=self.agreement, samples=self.samples, ceiling=ceiling)

    def as_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return {**asdict(self), "kept": None if self.kept is None else self.kept.as_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelInfo:
        """From `as_json`'s result, also after a round trip through JSON text."""

        def tensors(rows: Any) -> tuple[TensorInfo, ...]:
            return tuple(TensorInfo(r["name"], r["dtype"], tuple(r["shape"]), r["batch_factor"]) for r in rows)

        return ModelInfo(
            data["name"],
            tensors(data["inputs"]),
            tensors(data["outputs"]),
            tuple(data["ratios"]),
            tuple(data["accuracy"]),
            dict(data["engine"]),
            [dict(row) for row in data["layers"]],
            data["digest"],
            tuple(data["agreement"]),
            data["samples"],
            None if data["kept"] is None else KeptAnswers.from_json(data["kept"]),
            tuple(data["modelled"]),
        )

    def signature_difference(self, other: ModelInfo) -> str:
        """What `other` takes or gives that this model does not; "" if requests for one fit the other."""
        found = []
        for kind in ("inputs", "outputs"):
            old, new = ([f"{t.name} {t}" for t in getattr(m, kind)] for m in (self, other))
            if old != new:
                found.append(f"{kind} were {', '.join(old)} and are {', '.join(new)}")
        return "; ".join(found)
