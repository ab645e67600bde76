"""The CUDA engine: a program compiled to launches, recorded once per ratio and batch size. Imports no torch."""

from __future__ import annotations

import importlib
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.base import Dial
from bitdial.engines.cuda import STATUS
from bitdial.engines.cuda.compiler import Compiler
from bitdial.engines.cuda.device import Device, DeviceLostError, DeviceMemoryError, Pool
from bitdial.engines.cuda.elsewhere import Elsewhere
from bitdial.engines.cuda.plan import Plan
from bitdial.engines.cuda.values import LookUp
from bitdial.engines.describe import describe_program
from bitdial.errors import EngineError, InputError
from bitdial.graph.inputs import check_inputs, split_batch
from bitdial.graph.ir import BatchDim
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
MOST_BATCHES = 8  # sizes with memory of their own; the one that was used longest ago goes first


def release(device: Device, pool: Pool, plans: OrderedDict[int, Plan], whole: bool) -> None:
    """Free an engine's memory; whole: and the device's handles. A device that does not answer any more has freed it all."""
    try:
        while plans:
            plans.popitem()[1].close()
        if pool.span is not None:
            device.free(pool.span)
        if whole:
            device.close()
    except EngineError:
        return


class CudaEngine(Dial):
    """Runs a program whole on a GPU, bit for bit as the reference engine. Safe to use from several threads, one at a time runs.

    gpu           number of the GPU, as the driver counts them
    check_finite  refuse NaN and infinite inputs
    device        instead of a GPU: a device made elsewhere, such as the emulated one
    """

    def __init__(self, program: Program, gpu: int = 0, check_finite: bool = True, device: Device | None = None) -> None:
        own = device is None
        if device is None:
            device = importlib.import_module("bitdial.engines.cuda.driver").open_device(gpu)
        assert device is not None
        super().__init__(program)
        self.device, self.check_finite = device, check_finite
        try:
            self.compiled = Compiler(program, device.native_int4).run()
            self._elsewhere = Elsewhere(program, self.compiled.reasons) if self.compiled.reasons else None
            self.compiled.pool.upload(device)
        except EngineError:
            if own:
                device.close()
            raise
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._lost: DeviceLostError | None = None
        self._finalizer = weakref.finalize(self, release, device, self.compiled.pool, self._plans, own)

    def close(self) -> None:
        """Give back what the engine holds on the device, as happens anyway when nothing refers to it any more."""
        with self._lock:
            self._finalizer()
            self._lost = self._lost or DeviceLostError("the engine is closed")

    # ---- running ---------------------------------------------------------------------------------------------------------

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """Outputs for a batch (float32 [N, ...]); NumPy in, NumPy out, torch in, torch out.

        Raises InputError, RatioError, DeviceMemoryError (the batch is too large; the engine stays usable), DeviceLostError.
        """
        return self.run_with_ratio(batch, ratio)[0]

    def run_with_ratio(self, batch: Any, ratio: float | None = None) -> tuple[Any, float]:
        """Outputs, and the ratio they were computed at."""
        index = self.index(ratio)
        arrays: list[Array] = []
        kind = None
        for part in split_batch(self.program, batch):
            if not isinstance(part, np.ndarray):
                kind = part.device
                part = part.detach().cpu().numpy()
            arrays.append(np.asarray(part, order="C"))
        n = check_inputs(self.program, arrays)
        if self.check_finite:
            bad = sum(int(a.size - np.isfinite(a).sum()) for a in arrays)
            if bad:
                raise InputError(f"the batch holds {bad} NaN or infinite values")
        outputs = [np.empty(self._shape(v, n), self.compiled.buffers[v].dtype) for v in self.program.outputs]
        with self._lock:
            if self._lost is not None:
                raise DeviceLostError(str(self._lost))
            try:
                self._run(arrays, outputs, n, index)
            except DeviceLostError as lost:
                self._lost = lost
                raise
        results: tuple[Any, ...] = tuple(outputs)
        if kind is not None:  # the caller has torch, then
            torch = importlib.import_module("torch")
            results = tuple(torch.from_numpy(o).to(kind) for o in outputs)
        return (results[0] if len(results) == 1 else results), self.program.ratios[index]

    def seconds_per_run(self, batch: int, ratio: float, repeats: int = 20) -> float:
        """Seconds that a batch of that size takes on the device, without transfers and what is computed elsewhere: the mean of
        runs one behind the other."""
        index = self.index(ratio)
        with self._lock:
            plan = self._plan(batch)
            plan.run(index)  # values left from another batch, or none: the time does not depend on them
            self.device.wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                plan.run(index)
            self.device.wait()
            return (time.perf_counter() - begin) / repeats

    def seconds_per_step(self, batch: int, ratio: float, repeats: int = 5) -> list[tuple[str, str, float]]:
        """(step, kernel, seconds on the device) of every launch at a ratio, in order: the median of runs one by one, behind one
        that warms up. What lies between launches of a graph is not in it."""
        index = self.index(ratio)
        with self._lock:
            launches = self._plan(batch).launches(index)
            times = [self.device.seconds([launch for _, launch in launches]) for _ in range(repeats + 1)]
        each = np.median(np.array(times[1:]), axis=0)
        return [(name, launch.kernel, float(t)) for (name, launch), t in zip(launches, each, strict=True)]

    def _run(self, arrays: list[Array], outputs: list[Array], n: int, index: int) -> None:
        plan = self._plan(n)
        given = dict(zip(self.program.inputs, arrays, strict=True))
        for name, array in given.items():
            self.device.upload(plan.span(name), array)
        plan.run(index, self._elsewhere)
        for look_up in self.compiled.look_ups:
            self._check_look_up(look_up, given, plan, n)
        for name, array in zip(self.program.outputs, outputs, strict=True):
            self.device.download(plan.span(name), array)

    def _check_look_up(self, look_up: LookUp, given: dict[str, Array], plan: Plan, n: int) -> None:
        """Raises InputError where a batch's numbers lie outside of a table."""
        buffer = self.compiled.buffers[look_up.value]
        numbers = given.get(look_up.value)
        if numbers is None:
            numbers = np.empty(n * buffer.item, buffer.dtype)
            self.device.download(plan.span(look_up.value), numbers)
        numbers = numbers.reshape(n, -1)[:, look_up.offsets]
        wrong = numbers[(numbers < 0) | (numbers >= look_up.rows)]
        if wrong.size:
            raise InputError(
                f"the batch holds numbers outside of a table: '{look_up.name}' looks up row {int(wrong[0])} of {look_up.rows}"
            )

    def _plan(self, n: int) -> Plan:
        """The plan of a batch size; others give way where memory is short."""
        if n in self._plans:
            self._plans.move_to_end(n)
            return self._plans[n]
        while len(self._plans) >= MOST_BATCHES:
            self._plans.popitem(last=False)[1].close()
        while True:
            try:
                self._plans[n] = Plan(self.compiled, self.device, n)
                return self._plans[n]
            except DeviceMemoryError:
                if not self._plans:
                    raise
                self._plans.popitem(last=False)[1].close()

    def _shape(self, value: str, n: int) -> tuple[int, ...]:
        dims = self.program.types[value].shape
        return tuple(d.factor * n if isinstance(d, BatchDim) else int(d) for d in dims)

    # ---- what runs ---------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """JSON-able: the program, the device, whether 4-bit products are native to it, and each layer's kernel."""
        device, pool = self.device, self.compiled.pool
        low = "native 4-bit products"
        if not device.native_int4:
            low = "4-bit weights unpacked to 8-bit products: less memory traffic only"
        if self.program.extraction == "dynamic":
            low = "8-bit products of what is lowered before the layer (dynamic extraction): nothing is saved"
        if not any(layer.n_groups and layer.low.any() for layer in self.program.layers.values()):
            low = "none"
        return describe_program(self.program) | {
            "engine": {
                "name": "cuda", "status": STATUS, "device": device.name, "architecture": device.architecture, "low_products": low,
                "constant_bytes": pool.size, "arena_bytes": {str(n): plan.size for n, plan in self._plans.items()},
                "launches": len(self.compiled.steps), "kernels": dict(self.compiled.products),
                "reference_engine": dict(self.compiled.reasons),
            }
        }  # fmt: skip
