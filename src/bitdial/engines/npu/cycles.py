"""Cycles of the unit, equal to the hardware's counter (the tests hold the two against each other). NumPy only.

With R rows, C columns and jobs of P passes of M pixels each, l(p) being the cycle in which the first row of pass p's weights is
asked for and k(p) that in which the feeder takes the pass:

    k(p) = max(l(p) + 1, k(p - 1) + M)        the array is free, the load has begun
    l(p + 1) = max(l(p) + R, k(p) + 1)        the bus is free, the waiting registers are
    run = max(k(P - 1) + M + 2, l(P - 1) + R + 1)      l(0) = 0

so that a pass takes max(M, R) cycles. Every word costs FETCH_EXECUTE, and END waits until the last sums are written.
"""

from __future__ import annotations

from bitdial.engines.npu.plan import Design, Job, LayerPlan

FETCH_EXECUTE = 2
SETTINGS = 24  # SET words of a job, LOW left out


def run_cycles(rows: int, passes: int, pixels: int) -> int:
    """Cycles between RUN and the next word: the recurrence above in closed form."""
    return 1 + (passes - 1) * max(pixels, rows) + max(pixels + 2, rows)


def drain_cycles(rows: int, columns: int) -> int:
    """Of END, after its own fetch and execution."""
    return rows + columns + 4


def job_cycles(plan: LayerPlan, job: Job, design: Design, low: int, with_low: bool) -> int:
    """From the start to `done`. low: chunks that are low. with_low: the job's words begin with SET LOW."""
    words = SETTINGS + with_low + len(job.chunks) + 2
    run = run_cycles(design.rows, job.passes(plan.geometry.taps, low), plan.pixels(job))
    return words * FETCH_EXECUTE + run + drain_cycles(design.rows, design.columns)


def layer_cycles(plan: LayerPlan, design: Design, low: int) -> int:
    """Of one sample through all jobs of a layer; loading of buffers not counted."""
    return sum(job_cycles(plan, job, design, low, i == 0) for i, job in enumerate(plan.jobs))
