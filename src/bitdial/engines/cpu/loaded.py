"""A compiled program with its extension: what the engine, its tuning, its description and its fallback share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu.compiler import Compiled, FallbackNode
from bitdial.graph.ir import BatchDim
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]


class Loaded:
    """native: the extension's program with its steps. The settings are those of `CpuEngine`; choice_source: where the kernels'
    choice came from (`tuning.choose_kernels`)."""

    def __init__(
        self, program: Program, native: Any, compiled: Compiled, *, isa: str, threads: int, kernels: str, memory: str,
        batch_hint: int, check_finite: bool,
    ) -> None:  # fmt: skip
        self.program, self.native, self.compiled = program, native, compiled
        self.isa, self.threads, self.kernels, self.memory = isa, threads, kernels, memory
        self.batch_hint, self.check_finite = batch_hint, check_finite
        self.choice_source = ""

    def shape(self, value: str, n: int) -> tuple[int, ...]:
        """Shape of a value at batch size n."""
        dims = self.program.types[value].shape
        return tuple(d.factor * n if isinstance(d, BatchDim) else int(d) for d in dims)

    def compiled_layers(self) -> list[str]:
        """Conv and linear layers with a choice of kernels, in order."""
        return [name for name, kind in self.native.steps() if kind == "conv"]

    def reset_counters(self) -> None:
        """Set all counters to zero."""
        self.native.reset_counters()

    @property
    def can_profile(self) -> bool:
        """Whether all of the program is compiled, so that steps can be timed one by one."""
        return not any(isinstance(item, FallbackNode) for item in self.compiled.items) and self.writes_outputs()

    def writes_outputs(self) -> bool:
        """Whether every output is a tensor of its own that the steps can write to directly."""
        outputs, buffers = self.program.outputs, self.compiled.buffers
        own = all(
            v in buffers and v not in self.program.inputs and buffers[v].place == 0 and buffers[v].own_order for v in outputs
        )
        return own and len(set(outputs)) == len(outputs)

    def profile_arrays(self, batch: int) -> list[tuple[int, Array]]:
        """Inputs (normal, seeded; integers are ones) and outputs for `native.profile`."""
        program, buffers = self.program, self.compiled.buffers
        rng = np.random.default_rng(0)
        bound = []
        for name in program.inputs:
            if name in buffers:
                shape, dtype = self.shape(name, batch), program.types[name].dtype
                values: Array = np.ones(shape, dtype)
                if dtype == "float32":
                    values = rng.standard_normal(shape, dtype=np.float32)
                bound.append((buffers[name].tensor, values))
        return bound + [
            (buffers[v].tensor, np.empty(self.shape(v, batch), program.types[v].dtype)) for v in program.outputs
        ]
