"""Latency and throughput of a quantized model by ratio, batch and threads, on the machine at hand. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.benchmarking.timing import Case, Plan, Samples, measure_interleaved, time_ratio, timed
from bitdial.engines.base import Engine, create_engine, engine_spec, ratio_index
from bitdial.errors import ConfigError
from bitdial.graph.ir import BatchDim
from bitdial.quantization.program import Program

Progress = Callable[[str, float], None]
_ACCURACY_KEYS = ("accuracy", "standard_error", "agreement")


@dataclass(frozen=True)
class LatencyRow:
    """One setting of the dial at one batch size, number of threads and instruction set.

    samples        the seconds measured
    vs_base        time over that of the smallest ratio in the same rounds (below 1: faster); None if that was not measured
    low_share      share of all multiply-accumulates that run low by the plan
    executed_low   the same share as counted by the engine in one run; None where the engine counts nothing
    quality        "accuracy", "standard_error", "agreement" of the stored curve, as far as there
    """

    ratio: float
    batch: int
    threads: int
    isa: str
    samples: Samples
    vs_base: float | None
    low_share: float
    executed_low: float | None
    quality: dict[str, float | None]

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.samples.median

    @property
    def images_per_second(self) -> float:
        return self.batch / self.samples.median

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ratio": self.ratio,
            "batch": self.batch,
            "threads": self.threads,
            "isa": self.isa,
            **self.samples.summary(),
            "images_per_second": self.images_per_second,
            "time_relative_to_base": self.vs_base,
            "speedup": None if self.vs_base is None else 1.0 / self.vs_base,
            "low_share": self.low_share,
            "executed_low_share": self.executed_low,
            **self.quality,
        }


def random_inputs(program: Program, batch: int, seed: int = 0) -> list[npt.NDArray[Any]]:
    """One array per model input: standard normal float32, or zeros and ones for integer and boolean inputs."""
    generator = np.random.default_rng(seed)
    arrays: list[npt.NDArray[Any]] = []
    for name in program.inputs:
        kind = program.types[name]
        shape = tuple(d.factor * batch if isinstance(d, BatchDim) else d for d in kind.shape)
        if np.dtype(kind.dtype).kind == "f":
            arrays.append(generator.standard_normal(shape, np.float32).astype(kind.dtype))
        else:
            arrays.append(generator.integers(0, 2, shape).astype(kind.dtype))
    return arrays


def executed_low_share(engine: Engine, run: Callable[[], Any]) -> float | None:
    """Share of multiply-accumulates that the engine itself counted as low in one `run`; None if it does not count."""
    counters, reset = getattr(engine, "counters", None), getattr(engine, "reset_counters", None)
    if counters is None or reset is None:
        return None
    reset()
    run()
    rows = counters()
    low = sum(int(row["low_macs"]) for row in rows)
    total = low + sum(int(row["high_macs"]) for row in rows)
    return low / total if total else None


def engine_isa(engine: Engine) -> str:
    """The instruction set that the engine says it uses, "" if it does not say."""
    described = engine.describe().get("engine")
    return str(described.get("isa", "")) if isinstance(described, dict) else ""


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads inside (for the reference engine, which has no pool of its own)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def engine_calls(
    engine: Engine, name: str, batch: Sequence[npt.NDArray[Any]], ratio: float, threads: int, samples: int = 1
) -> Callable[[int], list[float]]:
    """`calls` of a timing case: run the batch at the ratio. An engine that models its time is asked for it, not run."""
    if engine_spec(name).modelled:
        modelled: Callable[[int, float], float] = engine.modelled_seconds  # type: ignore[attr-defined]
        return lambda n: [modelled(samples, ratio)] * n
    argument: Any = batch[0] if len(batch) == 1 else list(batch)
    inner = timed(lambda: engine.run(argument, ratio))
    if "threads" in engine_spec(name).options:
        return inner

    def calls(n: int) -> list[float]:
        with torch_threads(threads):
            return inner(n)

    return calls


def measure_latency(
    program: Program,
    engine: str = "cpu",
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    ratios: Sequence[float] | None = None,
    isas: Sequence[str | None] = (None,),
    plan: Plan | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LatencyRow]:
    """Time every combination on random inputs, all interleaved; rows by batch, threads, instruction set, ratio.

    engine: as in `bitdial.engines.create_engine`, which gets `options`. ratios: the table's entries at or below those given;
    None: all. isas: forced instruction sets of the CPU engine (None: its own choice); other engines take None only.
    Raises ConfigError, RatioError, EngineError.
    """
    for what, values in (("batch", batches), ("threads", threads)):
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise ConfigError(f"{what} is {list(values)}: give whole numbers of at least 1")
    spec = engine_spec(engine)
    if not isas or ("isa" not in spec.options and any(isa is not None for isa in isas)):
        raise ConfigError(f"an instruction set can be forced on the cpu engine only, not on '{engine}'")
    table = program.ratios
    indices = range(len(table)) if ratios is None else sorted({ratio_index(table, r) for r in ratios})
    report = progress or (lambda stage, share: None)
    settings = [(b, t, i) for b in dict.fromkeys(batches) for t in dict.fromkeys(threads) for i in dict.fromkeys(isas)]
    engines: list[tuple[int, int, str, Engine]] = []
    cases: list[Case] = []
    executed: dict[str, float | None] = {}
    for number, (batch, count, isa) in enumerate(settings):
        report("preparing", number / len(settings))
        extra = spec.accepted({"isa": isa, "threads": count, "batch_hint": batch})
        one = create_engine(program, engine, **extra, **(options or {}))
        engines.append((batch, count, engine_isa(one) or (isa or ""), one))
        inputs = random_inputs(program, batch, seed)
        for index in indices:
            calls = engine_calls(one, engine, inputs, table[index], count, batch)
            name = f"{number}/{index}"
            executed[name] = executed_low_share(one, lambda calls=calls: calls(1))  # type: ignore[misc]
            cases.append(Case(name, calls))
    samples = measure_interleaved(cases, plan or Plan(seed=seed), lambda share: report("measuring", share))
    curve = {row.get("ratio"): row for row in program.curve}
    rows = []
    for number, (batch, count, isa_name, _) in enumerate(engines):
        base = samples.get(f"{number}/0")
        for index in indices:
            name = f"{number}/{index}"
            stored = curve.get(table[index], {})
            rows.append(
                LatencyRow(
                    table[index], batch, count, isa_name, samples[name],
                    None if base is None else time_ratio(samples[name], base),
                    program.low_share(index), executed[name],
                    {key: stored.get(key) for key in _ACCURACY_KEYS if key in stored},
                )
            )  # fmt: skip
    return rows
