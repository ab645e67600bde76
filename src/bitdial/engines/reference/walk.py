"""Running a program layer by layer at one ratio, while its weights and bias rows are still being found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from bitdial.engines.reference.eight_bit_values import EightBitValues
from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program

Batches = Sequence[Sequence[Tensor]]


class Walk(Protocol):
    """Walks of one program, any number one after another. Activation shifts and low groups stay as they were when it was made."""

    program: Program

    @property
    def executor(self) -> Executor:
        """Its layers' states say how inputs are extracted."""

    def layers(self, index: int, batches: Batches) -> Iterator[Contract]:
        """The conv and linear layers in order. Each runs for all batches, as it then is, when the next one is asked for."""

    def stored(self, step: Contract) -> list[Tensor]:
        """The input of the layer that `layers` gave last, per batch: integers, in bytes. Valid until the layer runs."""

    def renew(self, step: Contract) -> None:
        """Take over that layer's bias rows, low weights and their shifts, which have changed."""

    def outputs(self) -> list[Tensor]:
        """The program's first output per batch, after the last layer."""


class TorchWalk:
    """In torch: for programs that do not compile, and where there is no compiled engine. executor: `FastExecutor` by default."""

    def __init__(self, program: Program, executor: Executor | None = None) -> None:
        self.program = program
        self.executor = executor or FastExecutor(program)
        self._values: list[EightBitValues] = []

    def layers(self, index: int, batches: Batches) -> Iterator[Contract]:
        executor = self.executor
        self._values = [EightBitValues(self.program, dict(zip(self.program.inputs, batch, strict=True))) for batch in batches]
        walks = [executor.schedule.walk(own) for own in self._values]
        for steps in zip(*walks, strict=True):
            step, settings = steps[0], {}
            if isinstance(step, Contract):
                yield step
                settings = executor.settings(index, [step.name])
            for own, batch in zip(self._values, batches, strict=True):
                own[step.name] = executor.step(step, own, settings, len(batch[0]))

    def stored(self, step: Contract) -> list[Tensor]:
        return [own.stored(step.inputs[0], self.executor.constants) for own in self._values]

    def renew(self, step: Contract) -> None:
        self.executor.renew(step.name)

    def outputs(self) -> list[Tensor]:
        first = self.program.outputs[0]
        return [own[first] if first in own else self.executor.constants[first] for own in self._values]


def layer_inputs(walk: Walk, batch: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every 8-bit value that a layer reads, once, with its integers in bytes, at ratio index 0."""
    seen: set[str] = set()
    for step in walk.layers(0, [batch]):
        value = step.inputs[0]
        if value not in seen:
            seen.add(value)
            yield value, walk.stored(step)[0]
