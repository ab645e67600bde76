"""Values of a program in a quarter of the memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitdial.quantization.program import Program


class EightBitValues(dict[str, Tensor]):
    """Values by name; those of 8 bits are kept in bytes and given out as float32 integers, so that many samples fit."""

    def __init__(self, program: Program, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.types = {v: torch.int8 if q.signed else torch.uint8 for v, q in program.qparams.items()}

    def __setitem__(self, name: str, value: Tensor) -> None:
        kind = self.types.get(name)
        super().__setitem__(name, value if kind is None else value.to(kind))

    def stored(self, name: str, constants: Mapping[str, Tensor]) -> Tensor:
        """A value or constant as it is kept."""
        return super().__getitem__(name) if name in self else constants[name]

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value.float() if name in self.types else value
