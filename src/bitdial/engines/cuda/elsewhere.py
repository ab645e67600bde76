"""Instructions without kernels: the reference engine computes them on the host, between two recorded runs of launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cuda.plan import Plan
from bitdial.engines.cuda.values import Buffer
from bitdial.engines.fallback import ReferenceSteps
from bitdial.engines.views import sizes_of
from bitdial.quantization.instructions import Instruction
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]


class Elsewhere:
    """Imports torch when made. reasons: of the instructions that are to be computed here. Raises EngineError without torch."""

    def __init__(self, program: Program, reasons: dict[str, str]) -> None:
        named = [f"'{name}' ({program.instruction(name).operation}: {reason})" for name, reason in reasons.items()]
        self.reference = ReferenceSteps(program, "the cuda engine", reasons, named)
        self.program, self.torch, self.executor = program, self.reference.torch, self.reference.executor

    def __call__(self, step: Instruction, plan: Plan) -> None:
        """Compute one instruction of a batch: from the device and back to it."""
        values = {v: self.torch.from_numpy(self._read(v, plan)) for v in step.operands() if v not in self.program.constants}
        with self.torch.no_grad(), self.torch.autocast("cpu", enabled=False):
            result = self.executor.step(step, values, self.reference.settings(plan.ratio), plan.batch)
        self._write(step.name, np.asarray(result.numpy()), plan)

    def _read(self, value: str, plan: Plan) -> Array:
        """A value in the network's order; 8-bit ones as float32."""
        buffer, place = self._buffer(value, plan)
        items = np.empty((plan.batch, buffer.item), buffer.dtype or (np.int8 if buffer.signed else np.uint8))
        plan.device.download(plan.span(value), items)
        array = items[:, buffer.offsets().reshape(-1)].reshape(plan.batch, *buffer.shape)
        shape = list(buffer.shape)
        shape[place] *= plan.batch
        moved = np.moveaxis(array, 0, place).reshape(shape)
        return np.ascontiguousarray(moved, np.float32) if not buffer.dtype else np.ascontiguousarray(moved)

    def _write(self, value: str, array: Array, plan: Plan) -> None:
        buffer, place = self._buffer(value, plan)
        split = array.reshape(*buffer.shape[:place], plan.batch, *buffer.shape[place:])
        items = np.zeros((plan.batch, buffer.item), buffer.dtype or (np.int8 if buffer.signed else np.uint8))
        items[:, buffer.offsets().reshape(-1)] = np.moveaxis(split, place, 0).reshape(plan.batch, -1)
        plan.device.upload(plan.span(value), items)

    def _buffer(self, value: str, plan: Plan) -> tuple[Buffer, int]:
        """(where it lies, the axis that carries the batch)."""
        _, place = sizes_of(plan.compiled.types[value])
        assert place is not None
        return plan.compiled.buffers[value], place
