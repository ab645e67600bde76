"""The engine on the cycle model: results of an engine that runs here, time by the model of the array."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.base import Dial, create_engine, default_engine, engine_spec
from bitdial.engines.npu.costs import Cost, Energy, Machine, layer_cost, reorder_cost, switch_cycles, total
from bitdial.engines.npu.lowering import lower, needed
from bitdial.engines.npu.plan import Design
from bitdial.errors import EngineError
from bitdial.quantization.program import Program


class NpuEngine(Dial):
    """Accumulators are those of the array bit for bit, computed by the engine that is the default here (all give the reference
    engine's); `run` takes its wall clock, `modelled_seconds` is the array's time.

    rows, columns: of the array. pad_groups: allow groups that leave lanes empty. megahertz, dram_bytes_per_cycle: of the model.
    energy: pJ by name in place of `Energy`'s. threads, check_finite: of the arithmetic.
    Raises EngineError for groups that do not fit the array, layers too large for the buffers, or impossible figures, and
    ConfigError for impossible energies.
    """

    def __init__(
        self,
        program: Program,
        rows: int = 32,
        columns: int = 32,
        pad_groups: bool = False,
        megahertz: float = 1000.0,
        dram_bytes_per_cycle: float = 32.0,
        energy: Mapping[str, float] | None = None,
        threads: int = 1,
        check_finite: bool = True,
    ) -> None:
        for name, value in (("megahertz", megahertz), ("dram_bytes_per_cycle", dram_bytes_per_cycle)):
            if not (math.isfinite(value) and value > 0):
                raise EngineError(f"npu: {name} is {value}; give a number above 0")
        super().__init__(program)
        self.machine = Machine(Design(rows, columns), megahertz, dram_bytes_per_cycle, Energy.of(energy or {}))
        self.lowered = lower(program, self.machine.design, pad_groups)
        needed(program, self.lowered)
        self.arithmetic, self.threads = default_engine(program), threads
        # Nothing is timed here: kernels by rule, so that loading is quick.
        wanted = {"threads": threads, "kernels": "fixed", "check_finite": check_finite}
        self._engine = create_engine(program, self.arithmetic, **engine_spec(self.arithmetic).accepted(wanted))

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """As the `run` of every engine."""
        return self._engine.run(batch, self.program.ratios[self.index(ratio)])

    def costs(self, ratio: float | None = None, samples: int = 1) -> dict[str, Cost]:
        """Per layer on the array, and per reorder, for so many samples. Raises RatioError."""
        index = self.index(ratio)
        layers = {name: layer_cost(plan, self.machine, index, samples) for name, plan in self.lowered.plans.items()}
        return layers | {name: reorder_cost(size, self.machine, samples) for name, size in self.lowered.reorders.items()}

    def modelled_seconds(self, samples: int, ratio: float | None = None) -> float:
        """Of the array and its memory, for so many samples one after the other; what the host computes is not in it."""
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
        reorders = [total(own[name] for name in self.lowered.reorders).cycles for own in by_ratio]
        result["engine"] = {
            "name": "npu",
            "isa": f"{design.rows} x {design.columns} array, modelled time",  # what stands beside every figure
            "array": [design.rows, design.columns],
            "arithmetic": f"exact integers, by the {self.arithmetic} engine; time is modelled, not measured",
            "megahertz": self.machine.megahertz,
            "dram_bytes_per_cycle": self.machine.dram_bytes_per_cycle,
            "buffer_bytes": design.buffer_bytes,
            "threads": self.threads,  # of the arithmetic
            "energy_pj": dict(vars(self.machine.energy)),
            "totals": [total(costs.values()).as_json() for costs in by_ratio],
            "reorders": dict(self.lowered.reorders),
            "reorder_cycles": reorders,
            "switch_cycles": switch_cycles(len(self.lowered.plans)),
            "host": dict(self.lowered.host),
        }
        return result


def accumulators(engine: NpuEngine, inputs: npt.NDArray[Any], ratio: float) -> dict[str, tuple[Any, Any]]:
    """Layer -> (its 8-bit input, its accumulators before the bias), integers as NumPy arrays: what the array reads and gives."""
    import torch

    from bitdial.engines.reference.engine import ReferenceEngine
    from bitdial.engines.reference.executor import Setting
    from bitdial.quantization.instructions import Contract

    reference = ReferenceEngine(engine.program)
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
