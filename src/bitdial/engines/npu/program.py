"""The words of a job. NumPy only."""

from __future__ import annotations

from bitdial.engines.npu.plan import Job, LayerPlan
from bitdial.engines.npu.words import Instruction, Operation, Setting


def job_instructions(plan: LayerPlan, job: Job, signed: bool, low: int | None) -> list[Instruction]:
    """Settings, table, RUN, END. low: the LOW word comes first where it is not None; jobs after the first of a layer keep it.

    Buffers are filled from their address 0: the job's input rows, its weight tiles, its shifts.
    """
    g = plan.geometry
    kernel, stride, padding, dilation = g.window.pairs
    width = g.size[1]
    x_first = -padding[1]
    y_first = job.out_rows[0] * stride[0] - padding[0] - job.in_rows[0]
    out_rows, out_width = job.out_rows[1] - job.out_rows[0], g.out_size[1]
    values = {
        Setting.SIGNED: int(signed),
        Setting.ORIGIN: (y_first * width + x_first) * plan.words,
        Setting.X_STEP: stride[1] * plan.words,
        Setting.Y_STEP: stride[0] * width * plan.words,
        Setting.X_TAP: dilation[1] * plan.words,
        Setting.Y_TAP: dilation[0] * width * plan.words,
        Setting.X_FIRST: x_first,
        Setting.Y_FIRST: y_first,
        Setting.WIDTH: width,
        Setting.HEIGHT: job.in_rows[1] - job.in_rows[0],
        Setting.OUT_WIDTH: out_width,
        Setting.OUT_HEIGHT: out_rows,
        Setting.KERNEL_WIDTH: kernel[1],
        Setting.KERNEL_HEIGHT: kernel[0],
        Setting.X_STRIDE: stride[1],
        Setting.Y_STRIDE: stride[0],
        Setting.X_DILATION: dilation[1],
        Setting.Y_DILATION: dilation[0],
        Setting.TILES: job.tiles[1] - job.tiles[0],
        Setting.PIXELS: out_rows * out_width,
        Setting.WEIGHTS: 0,
        Setting.SHIFTS: 0,
        Setting.SUMS: 0,
        Setting.COUNT: 0,
    }
    result = [] if low is None else [Instruction(Operation.SET, Setting.LOW, low)]
    result += [Instruction(Operation.SET, setting, value) for setting, value in values.items()]
    result += [Instruction(Operation.CHUNK, None, c.word, c.has_low, c.halves, c.second, c.shift) for c in job.chunks]
    return [*result, Instruction(Operation.RUN), Instruction(Operation.END)]
