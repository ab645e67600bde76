"""Layers of random integers, and what the array must give: plain NumPy sums, written without the compiler's help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bitdial.engines.npu.images import activation_image, place_sums, shift_image, weight_image
from bitdial.engines.npu.plan import Design, Geometry, LayerPlan, dense_chunks, plan_layer
from bitdial.engines.npu.program import job_instructions
from bitdial.engines.npu.words import encode

SMALL = Design(4, 4, words=128, activations=512, weights=2048, shifts=64, sums=512)


def build(design: Design) -> Any:
    pytest.importorskip("amaranth", reason="NO AMARANTH: pip install bitdial[npu]; the NPU's hardware is not tested")
    from rtl.npu import Npu
    from rtl.simulate import Simulated

    depths = {name: getattr(design, name) for name in ("words", "activations", "weights", "shifts", "sums")}
    return Simulated(Npu(design.rows, design.columns, **depths))


@dataclass
class Case:
    """x [channels, h, w]; weight, low_weight [O, I, taps]; weight_shift [O, groups]; low [ratios, groups]."""

    geometry: Geometry
    signed: bool
    x: np.ndarray
    weight: np.ndarray
    low_weight: np.ndarray
    bounds: np.ndarray
    shift: np.ndarray
    weight_shift: np.ndarray
    low: np.ndarray

    def plan(self, design: Design, pad_groups: bool = True) -> LayerPlan:
        chunks = dense_chunks("layer", self.bounds, self.low, self.shift, design.rows, pad_groups)
        return plan_layer("layer", self.geometry, chunks, design, len(self.low))

    def expected(self, ratio: int) -> np.ndarray:
        """int64 [O, out_h, out_w]."""
        g = self.geometry
        kernel, stride, padding, dilation = g.window.pairs
        group = np.repeat(np.arange(len(self.shift)), np.diff(self.bounds))
        out_h, out_w = g.out_size
        padded = np.pad(self.x.astype(np.int64), ((0, 0), (padding[0],) * 2, (padding[1],) * 2))
        top = 7 if self.signed else 15
        result = np.zeros((g.outputs, out_h, out_w), np.int64)
        local, per_out = self.weight.shape[1], g.outputs // g.conv_groups
        for o in range(g.outputs):
            for c in range(local):
                channel = o // per_out * local + c
                at = group[channel]
                is_low = bool(self.low[ratio, at])
                plane = padded[channel]
                if is_low:
                    halves = np.rint(plane / 2.0 ** int(self.shift[at])).astype(np.int64)
                    plane = np.clip(halves, -top, top) << int(self.shift[at])
                for t in range(g.taps):
                    dy, dx = t // kernel[1] * dilation[0], t % kernel[1] * dilation[1]
                    rows, columns = slice(dy, dy + (out_h - 1) * stride[0] + 1, stride[0]), slice(
                        dx, dx + (out_w - 1) * stride[1] + 1, stride[1]
                    )
                    w = int(self.low_weight[o, c, t]) << int(self.weight_shift[o, at]) if is_low else int(self.weight[o, c, t])
                    result[o] += plane[rows, columns] * w
        return result


def random_case(
    rng: np.random.Generator, geometry: Geometry, signed: bool, group: int, ratios: int = 3, lowered: bool = True
) -> Case:
    """extremes are as likely as anything between."""
    channels, local = geometry.channels, geometry.channels // geometry.conv_groups
    bounds = np.array([*range(0, channels, group), channels], np.int32)
    n = len(bounds) - 1
    order = rng.permutation(n)
    low = np.zeros((ratios, n), bool)
    for r in range(ratios):
        low[r, order[: round(r / (ratios - 1) * n)] if lowered else []] = True
    lo, hi = (-127, 127) if signed else (0, 255)

    def values(low_end: int, high_end: int, shape: tuple[int, ...]) -> np.ndarray:
        inner = rng.integers(low_end, high_end + 1, shape)
        return np.where(rng.random(shape) < 0.3, rng.choice([low_end, high_end], shape), inner)

    shape = (geometry.outputs, local, geometry.taps)
    return Case(
        geometry, signed, values(lo, hi, (channels, *geometry.size)), values(-127, 127, shape), values(-7, 7, shape), bounds,
        rng.integers(0, 8, n).astype(np.uint8), rng.integers(0, 8, (geometry.outputs, n)).astype(np.uint8), low,
    )  # fmt: skip


def run_case(simulated: Any, case: Case, plan: LayerPlan, design: Design, ratio: int) -> tuple[np.ndarray, list[int]]:
    """(sums [O, out_h, out_w], cycles of each job) from the simulated unit."""
    g = case.geometry
    sums = np.zeros((g.outputs, *g.out_size), np.int32)
    cycles = []
    for job in plan.jobs:
        words = encode(job_instructions(plan, job, case.signed, plan.low[ratio]))
        done = simulated.run(
            words, activation_image(plan, job, case.x, design), weight_image(plan, job, case.weight, case.low_weight, design),
            shift_image(job, case.weight_shift, design), plan.pixels(job) * (job.tiles[1] - job.tiles[0]),
        )  # fmt: skip
        assert done.status == 2, f"status {done.status:#x}"
        cycles.append(done.cycles)
        place_sums(plan, job, done.sums, sums, design)
    return sums, cycles
