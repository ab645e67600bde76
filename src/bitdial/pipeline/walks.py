"""What runs a program while its numbers are being found: the compiled engine's steps, or torch where they do not reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitdial.engines.cpu.layer_walk import LayerWalk
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.engines.reference.walk import Batches, TorchWalk, Walk
from bitdial.errors import EngineError
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program


class CompiledWalk:
    """A `Walk` of the CPU engine's kernels: a multiple of torch's speed, and its values are the program's own, bit for bit.

    Raises EngineError where the program does not compile whole.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._steps = LayerWalk(program, threads=torch.get_num_threads())
        self.executor = FastExecutor(program)

    def layers(self, index: int, batches: Batches) -> Iterator[Contract]:
        arrays = [[x.contiguous().numpy() for x in batch] for batch in batches]
        for name in self._steps.layers(index, arrays):
            step = self.program.instruction(name)
            assert isinstance(step, Contract)
            yield step

    def stored(self, step: Contract) -> list[Tensor]:
        return [torch.from_numpy(x) for x in self._steps.inputs(step.name)]

    def renew(self, step: Contract) -> None:
        self._steps.renew(step.name)

    def outputs(self) -> list[Tensor]:
        return [torch.from_numpy(x) for x in self._steps.outputs()]


def walk_of(program: Program) -> Walk:
    """The fastest walk that there is of a program."""
    try:
        return CompiledWalk(program)
    except EngineError:
        return TorchWalk(program)
