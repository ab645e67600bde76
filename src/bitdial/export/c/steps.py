"""What the exported function does, step by step, before any C is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from bitdial.engines.memory import Buffer
from bitdial.export.c.weights import PackedLayer


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

    buffers: value -> where it lies. alias: value -> the value whose memory it is. inputs, outputs: the graph's. ratios: exported.
    quantized_input: the step that quantizes the only input, if all else depends on its result alone.
    """

    steps: list[Step]
    buffers: dict[str, Buffer]
    alias: dict[str, str]
    inputs: list[str]
    outputs: list[str]
    ratios: list[float]
    quantized_input: str | None = None

    def root(self, value: str) -> str:
        while value in self.alias:
            value = self.alias[value]
        return value
