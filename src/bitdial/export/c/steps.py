"""What the exported function does, step by step, before any C is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from bitdial.export.c.weights import PackedLayer


@dataclass
class Place:
    """A value of one sample: rank-4 values lie channels last (h, w, c) where they are 8-bit; float values lie in the
    network's own order. channels_first: its logical order has the channels first."""

    h: int
    w: int
    c: int
    channels_first: bool
    signed: bool
    is_float: bool

    @property
    def count(self) -> int:
        return self.h * self.w * self.c

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * (4 if self.is_float else 1)

    @property
    def planes(self) -> tuple[int, int]:
        """(positions, channels) of the change between the network's order and channels last."""
        return (self.h * self.w, self.c) if self.channels_first else (1, self.count)


@dataclass
class Constant:
    """A const array of the C file. struct: its C type where it is no plain array; `text` is then its initializer."""

    name: str
    values: npt.NDArray[Any] | None = None
    struct: str = ""
    text: str = ""


@dataclass
class Step:
    """One call of a kernel.

    call: C text with {value} placeholders numbered by role: {x}, {y}, ...; `roles` says which value each stands for, and
    {scratch} is the step's own memory. kernels: runtime files needed, in order. overlays: inputs at whose start the output
    may begin if they die here.
    """

    name: str
    op: str
    source: str
    call: str
    roles: dict[str, str]
    output: str
    kernels: list[str]
    constants: list[Constant] = field(default_factory=list)
    overlays: list[str] = field(default_factory=list)
    layer: PackedLayer | None = None
    scratch: int = 0
    macs: int = 0

    @property
    def reads(self) -> list[str]:
        return [v for v in self.roles.values() if v != self.output]


@dataclass
class Lowered:
    """A program as steps.

    places: value -> Place. alias: value -> the value whose memory it is. inputs, outputs: the graph's. ratios: exported.
    quantized_input: the step that quantizes the only input, if all else depends on its result alone.
    """

    steps: list[Step]
    places: dict[str, Place]
    alias: dict[str, str]
    inputs: list[str]
    outputs: list[str]
    ratios: list[float]
    quantized_input: str | None = None

    def root(self, value: str) -> str:
        while value in self.alias:
            value = self.alias[value]
        return value
