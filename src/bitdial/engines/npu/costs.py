"""Cycles, traffic and energy of layers, from their plans. NumPy only.

Array cycles are the hardware's (see `cycles`). Memory is a model: each job loads the tiles it uses, its shifts and its input
rows once and stores 8-bit outputs once, at `dram_bytes_per_cycle`, beside the array's work of the job (buffers are taken to be
filled ahead), so that a layer takes the larger of both. A reorder of channels that the layout left is a copy through memory:
every byte is read and written once, and nothing else runs meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bitdial.engines.npu.cycles import job_cycles
from bitdial.engines.npu.plan import Design, LayerPlan
from bitdial.errors import ConfigError


@dataclass(frozen=True)
class Energy:
    """pJ of one of each, after M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9
    (45 nm, 0.9 V). Clock tree, registers, extraction and shifters are not in it.

    multiply8    8-bit integer multiply: 0.2, as given there
    multiply4    4 bits: a quarter of it, as multipliers grow with the square of their width (there 32 bits cost 15.5 times 8)
    add          32-bit integer add: 0.1, as given; one for every multiply, though partial sums are narrower, and none for the
                 sums at the columns' feet
    buffer_byte  an eighth of a 64-bit access of a 32 KB memory: 20 / 8 (8 KB: 10 / 8). The banks here are smaller, but narrow
    dram_byte    an eighth of a 64-bit access of 1.3 to 2.6 nJ, the lower end: 1300 / 8
    """

    multiply8: float = 0.2
    multiply4: float = 0.05
    add: float = 0.1
    buffer_byte: float = 2.5
    dram_byte: float = 162.5

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str = "npu: energy") -> Energy:
        """The defaults with some entries replaced. Raises ConfigError that names the entry."""
        names = [f.name for f in fields(cls)]
        for name, value in given.items():
            if name not in names:
                raise ConfigError(f"{where}: '{name:.40}' is no entry of the table; it has {', '.join(names)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{where}: {name} is {value!r:.40}; give pJ, 0 or more")
        return cls(**{name: float(value) for name, value in given.items()})


@dataclass(frozen=True)
class Machine:
    """megahertz: of the array. dram_bytes_per_cycle: to and from memory."""

    design: Design = field(default_factory=Design)
    megahertz: float = 1000.0
    dram_bytes_per_cycle: float = 32.0
    energy: Energy = field(default_factory=Energy)


@dataclass(frozen=True)
class Cost:
    """array_cycles: of the unit; cycles: memory included. macs: all; low_macs: those at 4 bits. useful / possible: utilisation,
    products done over products that the elements could have done in the array's cycles, two for one where they are low."""

    array_cycles: int
    cycles: int
    macs: int
    low_macs: int
    dram_bytes: int
    buffer_bytes: int
    picojoules: float
    slots: float  # multiplier slots that macs took: a half for each low one
    possible: float

    @property
    def utilisation(self) -> float:
        return self.slots / self.possible if self.possible else 0.0

    def as_json(self) -> dict[str, float]:
        """JSON-able."""
        return {**asdict(self), "utilisation": self.utilisation}


def layer_cost(plan: LayerPlan, machine: Machine, ratio: int, samples: int = 1) -> Cost:
    """Of so many samples at a ratio index, one after the other."""
    design, g, low = machine.design, plan.geometry, plan.low[ratio]
    array = dram = buffer = 0
    total_cycles = 0.0
    energy = machine.energy
    for i, job in enumerate(plan.jobs):
        pixels, tiles = plan.pixels(job), job.tiles[1] - job.tiles[0]
        passes = job.passes(g.taps, low)
        low_passes = tiles * g.taps * sum(c.has_low for c in job.chunks[:low])
        loads = passes * design.rows * design.columns + tiles * len(job.chunks) * design.columns // 2
        rows = job.in_rows[1] - job.in_rows[0]
        channels = sum(c.channels[1] - c.channels[0] for c in job.chunks)
        outputs = min(g.outputs, job.tiles[1] * design.columns) - job.tiles[0] * design.columns
        moved = loads + rows * g.size[1] * channels + pixels * outputs
        own = job_cycles(plan, job, design, low, i == 0)
        array += own
        total_cycles += max(own, moved / machine.dram_bytes_per_cycle)
        dram += moved
        reads = (passes + low_passes) * pixels * design.rows  # a byte a row, two where it is low
        buffer += loads + reads + passes * pixels * design.columns * 8
    low_channels = sum(c.channels[1] - c.channels[0] for c in plan.jobs[0].chunks[:low])
    low_macs = g.macs * low_channels // g.channels
    used = energy.multiply8 * (g.macs - low_macs) + energy.multiply4 * low_macs + energy.add * g.macs
    used += energy.buffer_byte * buffer + energy.dram_byte * dram
    return Cost(
        samples * array, round(samples * total_cycles), samples * g.macs, samples * low_macs, samples * dram, samples * buffer,
        samples * used, samples * (g.macs - low_macs / 2), samples * float(array) * design.rows * design.columns,
    )  # fmt: skip


def reorder_cost(size: int, machine: Machine, samples: int = 1) -> Cost:
    """Of a reorder of so many bytes a sample."""
    moved = 2 * size * samples
    return Cost(0, math.ceil(moved / machine.dram_bytes_per_cycle), 0, 0, moved, 0, machine.energy.dram_byte * moved, 0.0, 0.0)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum over layers; zeros for none."""
    rows = list(costs)
    return Cost(*(sum(getattr(c, f.name) for c in rows) for f in fields(Cost)))


def switch_cycles(layers: int) -> int:
    """Of turning the dial: ADDRESS and DATA of one LOW word a layer."""
    return 2 * layers
