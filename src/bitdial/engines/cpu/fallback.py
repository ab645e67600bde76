"""Programs with operators that have no compiled form: compiled steps with the reference engine in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu.compiler import FallbackNode
from bitdial.engines.cpu.loaded import Loaded
from bitdial.engines.cpu.values import Buffer
from bitdial.engines.fallback import ReferenceSteps
from bitdial.errors import InputError

Array = npt.NDArray[Any]


class Fallback:
    """Evaluates the items of a compiled program in order. Imports torch when made. Raises EngineError without torch."""

    def __init__(self, engine: Loaded) -> None:
        steps = [i.step for i in engine.compiled.items if isinstance(i, FallbackNode)]
        named = [f"{n.operation} ('{n.source or n.name}')" for n in steps]
        self.reference = ReferenceSteps(engine.program, "engine 'cpu'", engine.compiled.reasons, named)
        self.engine, self.torch, self.executor = engine, self.reference.torch, self.reference.executor
        self.last_fallback: dict[str, int] = {}  # value -> last item that reads it outside the compiled steps
        for index, item in enumerate(engine.compiled.items):
            if isinstance(item, FallbackNode):
                for value in item.step.operands():
                    self.last_fallback[value] = index
        for value in engine.program.outputs:
            self.last_fallback[value] = len(engine.compiled.items)
        self.written = self._reserve()

    def _reserve(self) -> set[str]:
        """Keep the memory of values that cross between compiled steps and others, from where they are made to where they are
        read. Returns the values made elsewhere that compiled steps read."""
        engine = self.engine
        program, buffers, reasons = engine.program, engine.compiled.buffers, engine.compiled.reasons
        compiled = [step for step in program.instructions if step.name not in reasons]
        made = {step.name for step in compiled}
        written = {v for step in compiled for v in step.operands() if v in reasons}
        done = 0
        for item in engine.compiled.items:
            if not isinstance(item, FallbackNode):
                done = item[1]
                continue
            for value in item.step.operands():
                if value in made:
                    engine.native.touch(buffers[value].tensor, done)
            if item.step.name in written:
                engine.native.touch(buffers[item.step.name].tensor, done)
        for value in program.outputs:
            if value in made:
                engine.native.touch(buffers[value].tensor, done)
        return written

    def _run_steps(self, context: Any, index: int, first: int, last: int) -> None:
        try:
            self.engine.native.run_in(context, index, first, last)
        except IndexError as error:  # of a look-up
            raise InputError(f"the batch holds numbers outside of a table: {error}") from None

    def _read(self, context: Any, buffer: Buffer, n: int) -> Array:
        """A compiled value in the network's order; 8-bit ones as float32."""
        values: Array = np.empty((n, *buffer.shape), np.float32 if buffer.dtype == "8-bit" else buffer.dtype)
        if buffer.dtype in ("8-bit", "float32"):
            self.engine.native.read(context, buffer.tensor, values, buffer.channels_first)
        else:
            self.engine.native.read_whole(context, buffer.tensor, values)
        place = buffer.place or 0
        shape = list(buffer.shape)
        shape[place] *= n
        return np.moveaxis(values, 0, place).reshape(shape)

    def _write(self, context: Any, buffer: Buffer, values: Array, n: int) -> None:
        place = buffer.place or 0
        split = values.reshape(*buffer.shape[:place], n, *buffer.shape[place:])
        array = np.ascontiguousarray(np.moveaxis(split, place, 0), np.float32 if buffer.dtype == "8-bit" else buffer.dtype)
        if buffer.dtype in ("8-bit", "float32"):
            self.engine.native.write(context, buffer.tensor, array, buffer.channels_first)
        else:
            self.engine.native.write_whole(context, buffer.tensor, array)

    def run(self, arrays: list[Array], n: int, index: int) -> list[Array]:
        """Outputs for checked inputs."""
        engine, torch = self.engine, self.torch
        program, buffers = engine.program, engine.compiled.buffers
        native = engine.native
        settings = self.reference.settings(index)
        if engine.check_finite and any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
            raise InputError("the batch holds NaN or infinite values")
        context = native.acquire(n)
        own = dict(zip(program.inputs, arrays, strict=True))
        values: dict[str, Any] = {}
        try:
            for name, array in own.items():
                if name in buffers:
                    native.bind(context, buffers[name].tensor, array)

            def value(name: str) -> Any:
                if name in values:
                    return values[name]
                if name in self.executor.constants:
                    return self.executor.constants[name]
                if name in own:
                    array = own[name] if own[name].flags.writeable else own[name].copy()
                    values[name] = torch.from_numpy(array)
                else:
                    values[name] = torch.from_numpy(self._read(context, buffers[name], n))
                return values[name]

            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for position, item in enumerate(engine.compiled.items):
                    if not isinstance(item, FallbackNode):
                        self._run_steps(context, index, *item)
                        continue
                    step = item.step
                    mine = {v: value(v) for v in step.operands() if v not in self.executor.constants}
                    result = self.executor.step(step, mine, settings, n)
                    values[step.name] = result
                    if step.name in self.written:
                        self._write(context, buffers[step.name], result.numpy(), n)
                    for name in [v for v in values if self.last_fallback.get(v, -1) <= position]:
                        del values[name]
                outputs = [np.asarray(value(v).numpy(), order="C") for v in program.outputs]
                # an output may be an input, or given twice
                taken = [(*arrays, *outputs[:i]) for i in range(len(outputs))]
                return [
                    o.copy() if any(np.may_share_memory(o, p) for p in before) else o
                    for o, before in zip(outputs, taken, strict=True)
                ]
        finally:
            native.release(context)
