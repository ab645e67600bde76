"""The reference engine behind the common interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.base import Dial
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.errors import EngineError, InputError
from bitdial.graph.inputs import split_batch
from bitdial.quantization.program import Program

CACHE_BYTES = 512 << 20  # read-back weights kept per ratio, in float32, as long as all of them fit


class ReferenceEngine(Dial):
    """Integer-exact; the definition of every other engine's results.

    device: any torch device. check_finite: look for NaN and infinity in every batch (one pass over the input).
    Thread-safe: `run` reads the dial once at its start and keeps no other state.
    """

    def __init__(self, program: Program, device: str | torch.device = "cpu", check_finite: bool = True) -> None:
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device, dtype=torch.float64)  # exact sums need float64 off the CPU
        except (RuntimeError, AssertionError, TypeError) as error:
            raise EngineError(f"torch device '{device}' is not available here: {error}") from None
        super().__init__(program)
        self.check_finite = check_finite
        self.executor = Executor(program, self.device)
        self._cache: dict[int, dict[str, Setting]] = {}
        weights = sum(layer.weight.size for layer in program.layers.values() if layer.weight is not None)
        self._keep = 4 * weights * len(program.ratios) <= CACHE_BYTES

    def settings(self, index: int) -> dict[str, Setting]:
        """Layer settings at a ratio index; kept after first use where memory allows."""
        settings = self._cache.get(index)
        if settings is None:
            settings = self.executor.settings(index)
            if self._keep:
                self._cache[index] = settings
        return settings

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """Outputs for a batch (float32 [N, ...]); NumPy in, NumPy out, torch in, torch out. Raises InputError, RatioError."""
        index = self.index(ratio)
        inputs, was_numpy = self.inputs(batch)
        # autocast would round accumulators to 16 bits
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            outputs = self.executor.run(inputs, self.settings(index))
        results = tuple(o.cpu().numpy() if was_numpy else o for o in outputs)
        return results[0] if len(results) == 1 else results

    def inputs(self, batch: Any) -> tuple[list[Tensor], bool]:
        """Check a batch and bring it to the device. Raises InputError."""
        parts = split_batch(self.program, batch)
        tensors = []
        for name, part in zip(self.program.inputs, parts, strict=True):
            tensor = _from_numpy(part) if isinstance(part, np.ndarray) else part
            if self.check_finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"input '{name}' holds NaN or infinite values")
            tensors.append(tensor.detach().to(self.device))
        return tensors, bool(parts) and isinstance(parts[0], np.ndarray)

    def describe(self) -> dict[str, Any]:
        """JSON-able description: every layer's precision, groups and shifts, what runs in float and why."""
        from bitdial.engines.describe import describe_program

        result = describe_program(self.program)
        result["engine"] = {
            "name": "reference",
            "device": str(self.device),
            "arithmetic": "exact integers carried in float32 or float64; no speed is claimed",
        }
        return result


def _from_numpy(array: npt.NDArray[Any]) -> Tensor:
    """Shares the array's memory where that is possible; the engine never writes into its inputs."""
    array = np.asarray(array, order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())
