"""A written model in ONNX Runtime against an engine of bitdial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError, ExportError
from bitdial.export.onnx.builder import require
from bitdial.graph.ir import BatchDim, Values
from bitdial.graph.operators import OPERATORS
from bitdial.quantization.instructions import Dequantize, Quantize
from bitdial.quantization.program import Program

MOST_STEPS, LEAST_AGREEMENT = 1.0, 0.999
LEAST_WITHIN = 0.95  # of the samples, where operators between the layers run in float32
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """What a run of both on the same samples gave.

    samples: how many. identical: share of output values that agree to the bit. max_steps: largest difference in output
    quantization steps; the step of an output is its 8-bit scale, or, where the last layer's result is float32, the one
    that an 8-bit encoding of the reference's outputs on these samples would have (largest magnitude / 127).
    within_step: share of samples with no output more than one step apart. max_difference: in the output's own unit.
    top1: share of samples with the same largest entry along the last axis; None if no output is [N, classes].
    float_operators: operators that round in float32 (softmax, LayerNorm, GELU, ...) feed 8-bit values. runtime: the version
    of ONNX Runtime.
    """

    samples: int
    identical: float
    max_steps: float
    within_step: float
    max_difference: float
    top1: float | None
    float_operators: bool
    runtime: str

    @property
    def passed(self) -> bool:
        """99.9 % of top-1 answers the same, and at most one step apart: on every sample, or on 95 % of them where float32
        operators feed 8-bit values. There the last bit of an exponential decides now and then which way an activation is
        rounded, and in low groups that moves it by 2^shift steps: the reference engine differs as much from itself once
        these operators run in float64.
        """
        near = self.within_step >= LEAST_WITHIN if self.float_operators else self.max_steps <= MOST_STEPS
        return near and (self.top1 is None or self.top1 >= LEAST_AGREEMENT)

    @property
    def limits(self) -> str:
        """What `passed` asks for, in words."""
        which = f"{100 * LEAST_WITHIN:.0f} % of the samples within 1 step" if self.float_operators else "1 step"
        return f"{which}, top-1 the same for {100 * LEAST_AGREEMENT:.1f} %"


def rounds_in_float(program: Program) -> bool:
    """Whether a float32 operator whose last bit depends on the runtime stands before a `quantize`."""
    producers = {step.name: step for step in program.instructions}
    seen: set[str] = set()
    waiting = [step.inputs[0] for step in program.instructions if isinstance(step, Quantize)]
    while waiting:
        value = waiting.pop()
        step = producers.get(value)
        if step is None or value in seen or value in program.qparams or value in program.layers:
            continue
        seen.add(value)
        if step.operation not in OPERATORS or OPERATORS[step.operation].rounds:
            return True
        waiting.extend(step.as_node().data_operands())
    return False


def random_batches(graph: Values, samples: int, seed: int, batch_size: int = 16) -> Iterator[list[Floats]]:
    """Standard normal float32 inputs, drawn from the seed. Raises ConfigError if an input is not float32."""
    generator = np.random.default_rng(seed)
    for value in graph.inputs:
        if graph.types[value].dtype != "float32":
            raise ConfigError(
                f"input '{value}' is {graph.types[value].dtype}, for which random values mean nothing: export with "
                "--no-check, and compare on data of your own with bitdial.export.onnx.compare"
            )
    for start in range(0, samples, batch_size):
        n = min(batch_size, samples - start)
        shapes = [[d.factor * n if isinstance(d, BatchDim) else d for d in graph.types[v].shape] for v in graph.inputs]
        yield [generator.standard_normal(shape, dtype=np.float32) for shape in shapes]


def session(data: bytes, threads: int | None = None, optimize: bool = True) -> Any:
    """An onnxruntime.InferenceSession on the CPU. Raises ExportError if the package is missing or refuses the model."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise ExportError(
            f"ONNX Runtime {ort.__version__} does not load the model: {error}; a newer ONNX Runtime, or another --opset, "
            "may"
        ) from error


def compare(
    data: bytes,
    program: Program,
    engine: Any,
    ratio: float,
    batches: Iterable[list[Floats]],
    *,
    threads: int | None = None,
    optimize: bool = True,
) -> Comparison:
    """Run a model's bytes in ONNX Runtime and `engine` at `ratio` on the same batches (one array per model input).

    optimize: let ONNX Runtime rewrite the graph, as it does by default. Raises ExportError, and the engine's errors.
    """
    running = session(data, threads, optimize)
    names = [i.name for i in running.get_inputs()]
    n_outputs = len(program.outputs)
    expected: list[list[Floats]] = [[] for _ in range(n_outputs)]
    found: list[list[Floats]] = [[] for _ in range(n_outputs)]
    samples = 0
    for batch in batches:
        reference = engine.run(batch if len(batch) > 1 else batch[0], ratio)
        outputs = running.run(None, dict(zip(names, batch, strict=True)))
        for position, (a, b) in enumerate(
            zip(reference if isinstance(reference, tuple) else (reference,), outputs, strict=True)
        ):
            expected[position].append(np.asarray(a))
            found[position].append(np.asarray(b))
        samples += _batch_size(program, batch)
    if not samples:
        raise ConfigError("no samples to compare on: give one batch at least")
    steps, difference, same, count = 0.0, 0.0, 0, 0
    near = np.ones(samples, np.bool_)
    agreements = []
    for value, many, others in zip(program.outputs, expected, found, strict=True):
        a, b = np.concatenate(many), np.concatenate(others)
        if a.shape != b.shape:
            raise ExportError(f"output '{value}' has shape {list(b.shape)} in ONNX Runtime, and {list(a.shape)} here")
        with np.errstate(invalid="ignore"):
            apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
        apart[a == b] = 0.0  # equal infinities too
        apart = np.nan_to_num(apart, nan=np.inf)
        step = output_step(program, value, a)
        largest = float(apart.max(initial=0.0))
        difference, steps = max(difference, largest), max(steps, largest / step)
        if a.ndim and a.shape[0] == samples:
            near &= apart.reshape(samples, -1).max(axis=1, initial=0.0) <= step
        elif largest > step:  # samples cannot be told apart
            near[:] = False
        same += int((a == b).sum())
        count += a.size
        if a.ndim == 2 and a.shape[1] > 1:
            agreements.append(float((a.argmax(axis=1) == b.argmax(axis=1)).mean()))
    version = str(require("onnxruntime").__version__)
    top1 = min(agreements) if agreements else None
    return Comparison(
        samples=samples,
        identical=same / max(1, count),
        max_steps=steps,
        within_step=float(near.mean()),
        max_difference=difference,
        top1=top1,
        float_operators=rounds_in_float(program),
        runtime=version,
    )


def output_step(program: Program, value: str, outputs: Floats) -> float:
    """The quantization step of an output; see `Comparison`."""
    step = next((s for s in program.instructions if s.name == value), None)
    if value in program.qparams:
        return 1.0
    if isinstance(step, Dequantize):
        return float(program.qparams[step.inputs[0]].scale)
    finite = outputs[np.isfinite(outputs)]
    return max(float(np.abs(finite).max(initial=0.0)) / 127.0, 1e-30)


def _batch_size(graph: Values, batch: list[Floats]) -> int:
    for value, array in zip(graph.inputs, batch, strict=True):
        for dim, size in zip(graph.types[value].shape, array.shape, strict=True):
            if isinstance(dim, BatchDim):
                return int(size) // dim.factor
    return 1
