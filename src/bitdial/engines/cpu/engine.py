"""The CPU engine: a program compiled to C++ steps, its dial one atomic store. Imports no torch."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.base import ratio_index
from bitdial.engines.cpu import description, native, tuning
from bitdial.engines.cpu.compiler import Compiler
from bitdial.engines.cpu.fallback import Fallback
from bitdial.engines.cpu.loaded import Loaded
from bitdial.errors import EngineError, InputError
from bitdial.graph.inputs import check_inputs, split_batch
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
KERNELS = ("auto", "fixed")
MEMORY = ("fast", "small")


class CpuEngine(Loaded):
    """Runs a program in compiled kernels, bit for bit as the reference engine. Safe to use from several threads at once.

    isa           instruction set; None: BITDIAL_CPU_ISA, else the best that this processor has
    threads       threads of the engine's own pool, the caller among them
    kernels       "auto": pick kernels by timing at load (remembered per machine); "fixed": the same choice every time, by
                  rule, without timing; or a kernel's name ("direct", "fip", "winograd", "winograd_fip", "narrow") to use
                  wherever it is exact. All give the same outputs
    memory        "fast", or "small": one 8-bit copy of the weights, from which the kernels derive low ones block by block while
                  they run (no Winograd forms; layers whose weight shifts differ between outputs keep a second copy). Low
                  weights that are stored take half a byte each beside it, a byte where they exceed 7
    batch_hint    batch size that kernels are timed at
    check_finite  refuse NaN and infinite inputs (checked while they are quantized, at no measurable cost)
    """

    def __init__(
        self,
        program: Program,
        isa: str | None = None,
        threads: int = 1,
        kernels: str = "auto",
        memory: str = "fast",
        batch_hint: int = 1,
        check_finite: bool = True,
    ) -> None:
        module = native.extension()
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise EngineError(f"threads must be a whole number in 1..1024, got {threads!r}")
        if memory not in MEMORY:
            raise EngineError(f"memory '{memory}' is unknown: choose one of {list(MEMORY)}")
        names = list(module.METHODS)
        if kernels not in (*KERNELS, *names):
            raise EngineError(f"kernels '{kernels}' is unknown: choose one of {[*KERNELS, *names]}")
        if isinstance(batch_hint, bool) or not isinstance(batch_hint, int) or batch_hint < 1:
            raise EngineError(f"batch_hint must be a positive whole number, got {batch_hint!r}")
        isa = native.choose_isa(isa)
        steps = module.Program(isa, threads, [float(r) for r in program.ratios], memory == "small")
        super().__init__(
            program, steps, Compiler(program, steps).run(), isa=isa, threads=threads, kernels=kernels, memory=memory,
            batch_hint=batch_hint, check_finite=check_finite,
        )  # fmt: skip
        self._set, self._dial = self.native.set_ratio, self.native.dial
        self._fallback: Fallback | None = None if self.can_profile else Fallback(self)
        if self._fallback is None:
            for name in program.outputs:
                self.native.set_external(self.compiled.buffers[name].tensor, True)
        self.choice_source = tuning.choose_kernels(self)
        self.native.seal()

    # ---- the dial --------------------------------------------------------------------------------------------------------

    @property
    def ratios(self) -> list[float]:
        return list(self.program.ratios)

    @property
    def ratio(self) -> float:
        return self.program.ratios[int(self._dial())]

    def set_ratio(self, ratio: float) -> float:
        """Turn the dial: one atomic store. Returns the table's ratio that is now in force. Raises RatioError."""
        try:
            now: float = float("nan") if ratio is True or ratio is False else self._set(ratio)
        except TypeError:
            now = float("nan")
        if now != now:  # the store refused: say why, or understand a number of another kind
            now = self._set(self.program.ratios[ratio_index(self.program.ratios, ratio)])
        return now

    # ---- running ---------------------------------------------------------------------------------------------------------

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """Outputs for a batch (float32 [N, ...]); NumPy in, NumPy out, torch in, torch out. Raises InputError, RatioError."""
        return self.run_with_ratio(batch, ratio)[0]

    def run_with_ratio(self, batch: Any, ratio: float | None = None) -> tuple[Any, float]:
        """Outputs, and the ratio they were computed at."""
        index = self._dial() if ratio is None else ratio_index(self.program.ratios, ratio)
        arrays, kind = self._inputs(batch)
        n = check_inputs(self.program, arrays)
        if self._fallback is None:
            outputs = self._run_whole(arrays, n, index)
        else:
            outputs = self._fallback.run(arrays, n, index)
        if kind is not None:  # the caller has torch, then
            torch = importlib.import_module("torch")
            results: tuple[Any, ...] = tuple(torch.from_numpy(o).to(kind) for o in outputs)
        else:
            results = tuple(outputs)
        return (results[0] if len(results) == 1 else results), self.program.ratios[index]

    def _run_whole(self, arrays: list[Array], n: int, index: int) -> list[Array]:
        program, buffers = self.program, self.compiled.buffers
        outputs = [np.empty(self.shape(v, n), dtype=program.types[v].dtype) for v in program.outputs]
        bound = [(buffers[v].tensor, a) for v, a in zip(program.inputs, arrays, strict=True) if v in buffers]
        bound += [(buffers[v].tensor, a) for v, a in zip(program.outputs, outputs, strict=True)]
        try:
            bad = self.native.run(bound, n, index)
        except IndexError as error:  # of a look-up
            raise InputError(f"the batch holds numbers outside of a table: {error}") from None
        if self.check_finite:
            for name, array in zip(program.inputs, arrays, strict=True):
                if name in self.compiled.unchecked:
                    bad += int(array.size - np.isfinite(array).sum())
        if bad and self.check_finite:
            raise InputError(f"the batch holds {bad} NaN or infinite values")
        return outputs

    def _inputs(self, batch: Any) -> tuple[list[Array], Any]:
        """Contiguous arrays of the graph's inputs, and the torch device to answer on (None: NumPy)."""
        arrays, device = [], None
        for part in split_batch(self.program, batch):
            if not isinstance(part, np.ndarray):
                device = part.device
                part = part.detach().cpu().numpy()
            arrays.append(np.asarray(part, order="C"))  # ascontiguousarray would give a number an axis
        return arrays, device

    # ---- what was executed -----------------------------------------------------------------------------------------------

    def counters(self) -> list[dict[str, Any]]:
        """Multiply-accumulates really executed since the last reset, per layer and kernel, counted inside the kernels.

        low, high: those of the network, by the precision of their values. multiplications: byte products that the
        processor issued for them (fewer than low + high where a fast kernel ran). runs: batches.
        """
        return [
            {
                "layer": layer,
                "kernel": kernel,
                "low_macs": low,
                "high_macs": high,
                "multiplications": issued,
                "runs": runs,
            }
            for layer, kernel, low, high, issued, runs in self.native.counters()
        ]

    def describe(self) -> dict[str, Any]:
        """JSON-able: the program, and which kernel runs every layer at every ratio."""
        return description.describe(self)

    def layer_table(self, batch: int = 1, repeats: int = 15) -> list[dict[str, Any]]:
        """Per layer and ratio: kernel, milliseconds in place, GMAC/s and share of the measured peak (may exceed 1)."""
        return description.layer_table(self, batch, repeats)
