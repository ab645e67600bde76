"""How long layers take on a named target: a JSON document that an engine's profiler writes and the quantizer reads.

    {"format": "bitdial-latency-table", "version": 1,
     "target": "amd-zen4-avx512vnni-1thread", "cpu": "AMD EPYC ...", "isa": "avx512vnni", "threads": 1, "batch": 1,
     "layers": {"conv k3x3 s1x1 p1x1 d1x1 g1 in 64x56x56 out 64x56x56": {
         "shape": {...},                                        LayerShape; its key must be the entry's
         "seconds": {"direct": .., "fip": .., "winograd": .., "winograd_fip": ..},
         "mixed": [[0.25, ..], [0.5, ..], [0.75, ..]]}},        low share of the layer, seconds of the best kernels there
     "sha256": "..."}                                           over everything else, canonical JSON

All times are seconds per SAMPLE, measured with batches of `batch` samples. "direct" is the layer at 8 bits and always
there; a mechanism (see `bitdial.quantization.exactness`) that the target does not offer is left out. Keys name shapes, not
layers, so that a table measured on one network serves another. No torch. Source: design notes, section 4.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from bitdial.errors import ConfigError
from bitdial.files import write_atomically
from bitdial.graph.ir import BatchDim, Node, TensorType
from bitdial.quantization.exactness import MECHANISMS, has_winograd

FORMAT = "bitdial-latency-table"
VERSION = 1
FloatArray = npt.NDArray[np.float64]


class LatencyTableError(ConfigError):
    """A latency table is missing, damaged, altered, of an unknown version, or contradicts itself."""


class LayerShape(BaseModel):
    """All that the time of a conv or linear layer depends on, beside its weights.

    kernel, stride, padding, dilation: per spatial dimension, () for linear. in_size, out_size: spatial; linear: (rows,),
    the vectors per sample it is applied to. images: images per sample of a conv (above 1 where windows are folded into
    the batch). Channels count all convolution groups.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    op: Literal["conv", "linear"]
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = Field(default=1, ge=1)
    images: int = Field(default=1, ge=1)

    @property
    def key(self) -> str:
        """Canonical text, e.g. "conv k3x3 s1x1 p1x1 d1x1 g1 in 64x56x56 out 64x56x56" or "linear in 512 out 10 rows 1"."""
        if self.op == "linear":
            return f"linear in {self.in_channels} out {self.out_channels} rows {_by(self.out_size)}"
        folded = f" n{self.images}" if self.images != 1 else ""
        return (
            f"conv k{_by(self.kernel)} s{_by(self.stride)} p{_by(self.padding)} d{_by(self.dilation)} g{self.groups} "
            f"in {self.in_channels}x{_by(self.in_size)} out {self.out_channels}x{_by(self.out_size)}{folded}"
        )

    @property
    def kind(self) -> str:
        """What a shape must share with another for one's speed to say something about the other's."""
        if self.op == "linear":
            return "linear"
        depth = "plain" if self.groups == 1 else "depthwise" if self.groups == self.in_channels else "grouped"
        return f"conv k{_by(self.kernel)} s{_by(self.stride)} d{_by(self.dilation)} {depth}"

    @property
    def depth(self) -> int:
        """Products summed up per output."""
        return self.in_channels // self.groups * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.images * math.prod(self.out_size) * self.out_channels * self.depth

    @property
    def winograd(self) -> bool:
        """Does F(2x2, 3x3) apply?"""
        return self.op == "conv" and has_winograd(self.kernel, self.stride, self.dilation)

    def distance(self, other: LayerShape) -> float:
        """How unlike two shapes of one kind are: sum of the absolute log ratios of channels and positions."""
        own = (self.in_channels, self.out_channels, self.images * math.prod(self.out_size))
        theirs = (other.in_channels, other.out_channels, other.images * math.prod(other.out_size))
        return sum(abs(math.log(a / b)) for a, b in zip(own, theirs, strict=True))


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)


def layer_shape(node: Node, types: Mapping[str, TensorType], weight_shape: Sequence[int]) -> LayerShape:
    """The shape of a conv or linear node, per sample.

    types: of the node's graph, float or quantized. weight_shape: [O, I / groups, *kernel] (linear: [O, I]).
    """
    source, result = types[node.inputs[0]].shape, types[node.name].shape
    if node.op == "linear":
        rows = math.prod(_factor(d) for d in result[:-1])
        return LayerShape(
            op="linear", in_channels=weight_shape[1], out_channels=weight_shape[0], in_size=(rows,), out_size=(rows,)
        )
    groups = int(node.attrs.get("groups", 1))
    return LayerShape(
        op="conv",
        in_channels=weight_shape[1] * groups,
        out_channels=weight_shape[0],
        in_size=tuple(_factor(d) for d in source[2:]),
        out_size=tuple(_factor(d) for d in result[2:]),
        kernel=tuple(int(k) for k in weight_shape[2:]),
        stride=tuple(node.attrs["stride"]),
        padding=tuple(node.attrs["padding"]),
        dilation=tuple(node.attrs["dilation"]),
        groups=groups,
        images=_factor(result[0]),
    )


def _factor(dimension: int | BatchDim) -> int:
    return dimension.factor if isinstance(dimension, BatchDim) else dimension


class LayerTimes(BaseModel):
    """Measured times of one shape, or (`estimated_from` not None) an estimate from another's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shape: LayerShape
    seconds: dict[str, float]
    mixed: tuple[tuple[float, float], ...] = ()
    estimated_from: str | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> LayerTimes:
        unknown = sorted(set(self.seconds) - set(MECHANISMS))
        if unknown:
            raise ValueError(f"unknown mechanisms {', '.join(unknown)}; there are {', '.join(MECHANISMS)}")
        if "direct" not in self.seconds:
            raise ValueError("the time of 'direct' is missing")
        if not self.shape.winograd and {"winograd", "winograd_fip", "winograd_narrow"} & set(self.seconds):
            raise ValueError("Winograd times for a layer that is not 3x3 with stride 1 and dilation 1")
        if not all(t > 0.0 for t in (*self.seconds.values(), *(t for _, t in self.mixed))):
            raise ValueError("times must be above 0")
        shares = [share for share, _ in self.mixed]
        if shares != sorted(set(shares)) or not all(0.0 <= s <= 1.0 for s in shares):
            raise ValueError("the shares of 'mixed' must rise within 0..1")
        return self

    def fastest(self, mechanisms: frozenset[str]) -> tuple[str, float]:
        """The quickest of the measured mechanisms among those named, and its seconds ("direct" always counts)."""
        usable = [name for name in MECHANISMS if name in self.seconds and (name == "direct" or name in mechanisms)]
        name = min(usable, key=lambda n: self.seconds[n])  # the first of equals
        return name, self.seconds[name]

    def curve(self, mechanisms: frozenset[str]) -> tuple[FloatArray, FloatArray]:
        """Shares and seconds, both float64 [n]: points of a piecewise-linear time by low share, from 0 to 1.

        The measured curve runs from "direct" over `mixed` to the fastest mechanism of all. Where the operands' widths rule
        that one out, its gains are scaled down to what the fastest usable mechanism gains. That the shape of the curve
        stays the same then is believed, not measured; so is the straight line where `mixed` is empty.
        """
        points = {0.0: self.seconds["direct"], 1.0: min(self.seconds.values()), **dict(self.mixed)}
        shares = np.array(sorted(points), dtype=np.float64)
        seconds = np.array([points[s] for s in sorted(points)], dtype=np.float64)
        best = min(self.seconds.values())
        usable = self.fastest(mechanisms)[1]
        if usable > best:
            direct = self.seconds["direct"]
            seconds = seconds[0] - (seconds[0] - seconds) * (direct - usable) / (direct - best)
        return shares, seconds


class LatencyTable(BaseModel):
    """Times of layer shapes on one target, with a number of threads and samples per batch. `layers`: key -> times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = Field(min_length=1)
    cpu: str
    isa: str
    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    layers: dict[str, LayerTimes] = Field(min_length=1)

    @model_validator(mode="after")
    def _keys(self) -> LatencyTable:
        for key, times in self.layers.items():
            if times.shape.key != key:
                raise ValueError(f"entry '{key}' holds the shape '{times.shape.key}'")
        return self

    def document(self) -> dict[str, Any]:
        """The JSON document, checksum included."""
        body = {"format": FORMAT, "version": VERSION, **self.model_dump(mode="json")}
        return {**body, "sha256": _checksum(body)}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the document: the table's identity in provenance and search checkpoints."""
        return str(self.document()["sha256"])

    def times(self, shape: LayerShape) -> LayerTimes:
        """The times of a shape: measured, or estimated.

        Estimated from the nearest measured shape of the same kind (kernel, stride, dilation, grouping): equal multiply-
        accumulates per second in every mechanism, equal gain at every share. Where nothing of the kind was measured, only
        "direct" is estimated, from the nearest shape of any kind: such a layer is taken to gain nothing.
        """
        found = self.layers.get(shape.key)
        if found is not None:
            return found
        alike = {k: t for k, t in self.layers.items() if t.shape.kind == shape.kind}
        pool = alike or self.layers
        key = min(sorted(pool), key=lambda k: pool[k].shape.distance(shape))
        near = pool[key]
        factor = shape.macs / near.shape.macs
        names = near.seconds if alike else ("direct",)
        return LayerTimes(
            shape=shape,
            seconds={name: near.seconds[name] * factor for name in names},
            mixed=tuple((share, t * factor) for share, t in near.mixed) if alike else (),
            estimated_from=key,
        )

    def save(self, path: str | Path) -> None:
        """Write the document, whole or not at all. Raises OutputError."""
        text = json.dumps(self.document(), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode(), "the latency table")


def load_latency_table(path: str | Path) -> LatencyTable:
    """Read a table. Raises LatencyTableError if it is missing, damaged, altered, or of another version."""
    remedy = "measure it anew on the target"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise LatencyTableError(f"cannot read the latency table {path} ({reason}); {remedy}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LatencyTableError(f"the latency table {path} is not valid JSON ({error}); {remedy}") from error
    return parse_latency_table(data, str(path))


def parse_latency_table(data: Any, name: str = "given") -> LatencyTable:
    """The table of a JSON document. Raises LatencyTableError, which calls it by `name`."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LatencyTableError(f"the file {name} is not a latency table of bitdial; give another path")
    if data.get("version") != VERSION:
        raise LatencyTableError(
            f"the latency table {name} has version {data.get('version')!r}, this bitdial reads {VERSION}: measure it anew "
            "with this bitdial, or update bitdial"
        )
    body = {k: v for k, v in data.items() if k != "sha256"}
    try:
        checksum = _checksum(body)
    except ValueError as error:
        raise LatencyTableError(
            f"the latency table {name} holds values that are not finite; measure it anew"
        ) from error
    if data.get("sha256") != checksum:
        raise LatencyTableError(
            f"the latency table {name} was altered or cut: its checksum is {data.get('sha256', 'missing')!r}, its content "
            f"has {checksum}; get a sound copy, or measure it anew"
        )
    try:
        # As JSON, where strict types take arrays for tuples.
        content = {k: v for k, v in body.items() if k not in ("format", "version")}
        return LatencyTable.model_validate_json(json.dumps(content, allow_nan=False))
    except (ValidationError, RecursionError) as error:
        detail = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = f"{' > '.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}"
        raise LatencyTableError(f"the latency table {name} is malformed: {detail}; measure it anew") from None


def _read_if_path(given: Any) -> Any:
    return load_latency_table(given) if isinstance(given, (str, Path)) else given


def _identify(table: LatencyTable) -> dict[str, Any]:
    return {"target": table.target, "cpu": table.cpu, "sha256": table.digest}


# As a setting: a path is read. Files name the table they were made with, which is a document of its own.
LatencyTableSetting = Annotated[
    LatencyTable, BeforeValidator(_read_if_path), PlainSerializer(_identify, when_used="json")
]


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
