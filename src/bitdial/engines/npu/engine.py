"""The engine on the cycle model: results by the reference arithmetic, time by the model of the array."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.base import Dial
from bitdial.engines.npu.costs import Cost, Energy, Machine, layer_cost, switch_cycles, total
from bitdial.engines.npu.lowering import lower, needed
from bitdial.engines.npu.plan import Design
from bitdial.errors import EngineError
from bitdial.quantization.program import Program


class NpuEngine(Dial):
    """Accumulators are those of the array bit for bit (the reference engine's); `run` takes the reference engine's wall clock,
    `modelled_seconds` the array's.

    rows, columns: of the array. pad_groups: allow groups that leave lanes empty. megahertz, dram_bytes_per_cycle: of the model.
    Raises EngineError for groups that do not fit the array, layers too large for the buffers, or impossible figures.
    """

    def __init__(
        self,
        program: Program,
        rows: int = 32,
        columns: int = 32,
        pad_groups: bool = False,
        megahertz: float = 1000.0,
        dram_bytes_per_cycle: float = 32.0,
        check_finite: bool = True,
    ) -> None:
        from bitdial.engines.reference.engine import ReferenceEngine

        for name, value in (("megahertz", megahertz), ("dram_bytes_per_cycle", dram_bytes_per_cycle)):
            if not (math.isfinite(value) and value > 0):
                raise EngineError(f"npu: {name} is {value}; give a number above 0")
        super().__init__(program)
        self.machine = Machine(Design(rows, columns), megahertz, dram_bytes_per_cycle)
        self.lowered = lower(program, self.machine.design, pad_groups)
        needed(program, self.lowered)
        self._reference = ReferenceEngine(program, check_finite=check_finite)

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """As the reference engine's `run`."""
        index = self.index(ratio)
        return self._reference.run(batch, self.program.ratios[index])

    def costs(self, ratio: float | None = None, samples: int = 1) -> dict[str, Cost]:
        """Per layer on the array, for so many samples. Raises RatioError."""
        index = self.index(ratio)
        return {name: layer_cost(plan, self.machine, index, samples) for name, plan in self.lowered.plans.items()}

    def modelled_seconds(self, samples: int, ratio: float | None = None) -> float:
        """Of the array and its memory, for a batch; what the host computes is not in it."""
        return total(self.costs(ratio, samples).values()).cycles / (1e6 * self.machine.megahertz)

    def describe(self) -> dict[str, Any]:
        """JSON-able: as of every engine, and per layer cycles, utilisation, traffic and energy by ratio; what the host runs."""
        from bitdial.engines.describe import describe_program

        result = describe_program(self.program)
        by_ratio = [self.costs(r) for r in self.program.ratios]
        for layer in result["layers"]:
            name = layer["name"]
            if name in self.lowered.plans:
                layer["npu"] = [costs[name].as_json() for costs in by_ratio]
                layer["max_4bit_chunks"] = list(self.lowered.plans[name].low)
            else:
                layer["host"] = self.lowered.host[name]
        design = self.machine.design
        result["engine"] = {
            "name": "npu",
            "isa": f"{design.rows} x {design.columns} array, modelled time",  # what stands beside every figure
            "array": [design.rows, design.columns],
            "arithmetic": "exact integers of the reference engine; time is modelled, not measured",
            "megahertz": self.machine.megahertz,
            "dram_bytes_per_cycle": self.machine.dram_bytes_per_cycle,
            "buffer_bytes": design.buffer_bytes,
            "energy_pj": dict(vars(Energy())),
            "totals": [total(costs.values()).as_json() for costs in by_ratio],
            "switch_cycles": switch_cycles(len(self.lowered.plans)),
            "host": dict(self.lowered.host),
        }
        return result


def accumulators(engine: NpuEngine, inputs: npt.NDArray[Any], ratio: float) -> dict[str, tuple[Any, Any]]:
    """Layer -> (its 8-bit input, its accumulators before the bias), integers as NumPy arrays: what the array reads and gives."""
    import torch

    from bitdial.engines.reference.executor import Setting
    from bitdial.quantization.instructions import Contract

    reference = engine._reference
    executor = reference.executor
    settings: dict[str, Setting] = reference.settings(engine.index(ratio))
    values: dict[str, torch.Tensor] = {}
    tensors, _ = reference.inputs(inputs)
    with torch.no_grad():
        executor.run(tensors, settings, lambda name, value: values.__setitem__(name, value.clone()))
        result = {}
        for step in engine.program.instructions:
            if isinstance(step, Contract) and step.name in engine.lowered.plans:
                x = values[step.inputs[0]]
                acc = executor.accumulators(step, {step.inputs[0]: x}, settings[step.name], len(tensors[0]))
                result[step.name] = x.numpy().astype(np.int64), acc.double().numpy().astype(np.int64)
    return result
