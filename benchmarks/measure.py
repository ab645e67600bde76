"""Figures of a quantized program on test images: from the CPU engine where it is compiled, checked against the reference engine
on the first batch of every program and ratio, to the bit; else from the reference engine.

Outputs are kept by a digest of everything they depend on, so that programs which agree at a ratio (selectors at 100 %,
all programs of one 8-bit model at 0) are run once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitdial.engines.base import Engine, available_engines, create_engine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import EngineError
from bitdial.quantization.instructions import Lookup
from bitdial.quantization.program import Program
from bitdial.zoo.datasets import ImageSet
from common import BATCH, batches

Outputs = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


def program_digest(program: Program, index: int) -> str:
    """Hex digits over all that a program's outputs at a ratio index depend on."""
    state = hashlib.sha256()

    def add(name: str, array: npt.NDArray[Any]) -> None:
        state.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())

    for step in program.instructions:
        node = step.as_node()
        state.update(f"{node.name} {node.op} {node.operands()} {json.dumps(node.attrs, default=str)}\n".encode())
        factors = getattr(step, "factors", getattr(step, "factor", None))
        state.update(f"{factors!r}\n".encode())
        if isinstance(step, Lookup):
            add(step.name, step.table)
    state.update(f"{program.inputs} {program.outputs}".encode())
    for name in sorted(program.constants):
        add(name, program.constants[name])
    for name in sorted(program.qparams):
        state.update(f"{name} {program.qparams[name].scale!r} {program.qparams[name].signed}\n".encode())
    for name, layer in program.layers.items():
        state.update(f"{name} {layer.kind} {layer.residual_factor!r} {layer.conv_groups}\n".encode())
        add("multiplier", layer.multiplier)
        if layer.weight is None:
            continue
        add("weight", layer.weight)
        add("bias", layer.bias[index])
        if layer.low[index].any():
            state.update(f"{program.extraction} {layer.amax} {layer.wmax}\n".encode())
            add("low", layer.low[index])
            add("bounds", layer.group_bounds)
            add("activation shift", layer.activation_shift)
            add("weight shift", layer.weight_shift)
            if layer.low_weight is not None:
                add("low weight", layer.low_weight)
    return state.hexdigest()


def softmax(outputs: Outputs) -> npt.NDArray[np.float64]:
    """Soft labels, float64, same shape."""
    wide = outputs.astype(np.float64)
    shifted = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def distance(a: Outputs, b: Outputs) -> float:
    """Root of the mean over samples of the squared L2 distance between soft labels."""
    return float(np.sqrt(((softmax(a) - softmax(b)) ** 2).sum(axis=-1).mean()))


def paired_difference(correct: Flags, reference: Flags) -> tuple[float, float]:
    """(mean, standard error) of the difference in accuracy on the same images: sqrt(variance per image / n)."""
    per_image = correct.astype(np.float64) - reference.astype(np.float64)
    n = len(per_image)
    return float(per_image.mean()), float(math.sqrt(per_image.var(ddof=1) / n)) if n > 1 else 0.0


def make_engine(program: Program) -> Engine:
    """The CPU engine without timing kernels, or the reference engine where it is not compiled."""
    if available_engines()["cpu"]:
        return ReferenceEngine(program, check_finite=False)
    return create_engine(program, "cpu", kernels="fixed")


def reference_outputs(program: Program, x: Tensor, ratio: float) -> Outputs:
    """float32 [n, classes] of the reference engine."""
    outputs: Outputs = ReferenceEngine(program, check_finite=False).run(x, ratio).numpy()
    return outputs


def pack_flags(flags: Flags) -> str:
    """Which images were right, as text, so that any two rows can be compared image by image later."""
    return base64.b64encode(np.packbits(flags).tobytes()).decode("ascii")


def unpack_flags(text: str, n: int) -> Flags:
    """The inverse of `pack_flags`."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n)
    result: Flags = bits.astype(np.bool_)
    return result


@dataclass(frozen=True)
class Samples:
    """Test images in float that are no `ImageSet`. pixels: float32 [n, ..]; labels: int64 [n]; size: of a batch, at most."""

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    size: int = BATCH

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        size = min(size, self.size)
        for start in range(0, len(self), size):
            yield self.pixels[start : start + size], self.labels[start : start + size]


class TestBench:
    """One network's float model and the test images."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, model: nn.Module, images: ImageSet | Samples) -> None:
        self.model, self.images = model, images
        self.labels = images.labels
        self._float: Outputs | None = None
        self._kept: dict[str, Outputs] = {}

    def float_outputs(self, progress: Callable[[str, float], None] | None = None) -> Outputs:
        """float32 [n, classes] of the float32 network."""
        if self._float is None:
            parts = []
            with torch.no_grad():
                for x, _ in batches(self.images):
                    parts.append(self.model(x).numpy())
                    if progress is not None:
                        progress("float32", sum(map(len, parts)) / len(self.images))
            self._float = np.concatenate(parts)
        return self._float

    def outputs(
        self,
        program: Program,
        ratio: float,
        progress: Callable[[str, float], None] | None = None,
        engine: Engine | None = None,
    ) -> tuple[Outputs, bool]:
        """(float32 [n, classes] at a ratio of the program's table, whether it was run now).

        engine: runs what the program alone does not say; nothing is remembered then, and there is nothing to compare it with.
        """
        if engine is not None:
            return np.concatenate([part.numpy() for part in self._run(engine, ratio, progress)]), True
        key = program_digest(program, program.ratios.index(ratio))
        if key in self._kept:
            return self._kept[key], False
        engine = make_engine(program)
        parts: list[Outputs] = []
        for (x, _), result in zip(batches(self.images), self._run(engine, ratio, progress), strict=True):
            parts.append(result.numpy())
            unchecked = len(parts) == 1 and not isinstance(engine, ReferenceEngine)
            if unchecked and not np.array_equal(parts[0], reference_outputs(program, x, ratio)):
                raise EngineError(f"the CPU engine and the reference engine differ at {100 * ratio:.0f} %: report this")
        self._kept[key] = np.concatenate(parts)
        return self._kept[key], True

    def _run(self, engine: Engine, ratio: float, progress: Callable[[str, float], None] | None) -> Iterator[Tensor]:
        """The outputs of every batch."""
        done = 0
        for x, _ in batches(self.images):
            yield engine.run(x, ratio)
            done += len(x)
            if progress is not None:
                progress(f"evaluate at {100 * ratio:.0f} %", done / len(self.images))

    def correct(self, outputs: Outputs) -> Flags:
        result: Flags = outputs.argmax(axis=-1) == self.labels
        return result

    def float_figures(self, progress: Callable[[str, float], None] | None = None) -> dict[str, Any]:
        """Accuracy of the float32 network, its standard error over images, and which images were right."""
        started = time.perf_counter()
        correct = self.correct(self.float_outputs(progress))
        return {
            "accuracy": float(correct.mean()),
            "standard_error": _binomial(correct),
            "samples": len(correct),
            "correct": pack_flags(correct),
            "seconds": time.perf_counter() - started,
        }

    def figures(
        self, program: Program, ratios: Sequence[float], progress: Callable[[str, float], None] | None = None
    ) -> dict[str, Any]:
        """{"ratios": [one entry per ratio], "evaluation_seconds", "evaluated": ratios that had to be run}.

        An entry: ratio, accuracy, standard_error (over images), to_float and to_float_standard_error (paired),
        agreement (with the same program's 8-bit model), distance_to_float and distance_to_8bit (of soft labels),
        eligible_share and low_share (multiply-accumulates that run low, of the eligible and of all), correct.
        """
        started = time.perf_counter()
        reference = self.float_outputs(progress)
        right = self.correct(reference)
        eight, ran = self.outputs(program, 0.0, progress)
        evaluated = [0.0] if ran else []
        entries = []
        for ratio in ratios:
            outputs, ran = self.outputs(program, ratio, progress)
            if ran:
                evaluated.append(ratio)
            correct = self.correct(outputs)
            difference, error = paired_difference(correct, right)
            index = program.ratios.index(ratio)
            entries.append(
                {
                    "ratio": ratio,
                    "accuracy": float(correct.mean()),
                    "standard_error": _binomial(correct),
                    "to_float": difference,
                    "to_float_standard_error": error,
                    "agreement": float((outputs.argmax(-1) == eight.argmax(-1)).mean()),
                    "distance_to_float": distance(outputs, reference),
                    "distance_to_8bit": distance(outputs, eight),
                    "eligible_share": program.eligible_share(index),
                    "low_share": program.low_share(index),
                    "correct": pack_flags(correct),
                }
            )
        return {
            "ratios": entries,
            "samples": len(right),
            "evaluated": evaluated,
            "evaluation_seconds": time.perf_counter() - started,
        }


def _binomial(correct: Flags) -> float:
    p = float(correct.mean())
    return math.sqrt(p * (1.0 - p) / len(correct))
