"""Memory of the exported function: which buffers live when, and how many rows of weights are made at a time.

Rows made at run time need scratch memory. Every layer first gets the least that runs well; then each gets as many rows as
fit without making the arena larger, so that the arena stays that of the least scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitdial.export.c import weights
from bitdial.export.c.arena import Buffer, Layout, align, overlaps, place
from bitdial.export.c.steps import Lowered, Step

MIN_BLOCK = 8


@dataclass
class Plan:
    """layout: of the arena. offsets are by root value, scratch memory is "scratch of <step>". blocks: step -> rows made at
    a time. buffers, overlays: what the layout was made for."""

    layout: Layout
    blocks: dict[str, int]
    buffers: list[Buffer]
    overlays: dict[str, list[str]]

    def offset(self, lowered: Lowered, value: str) -> int:
        return self.layout.offsets[lowered.root(value)]

    def scratch(self, step: Step) -> int:
        return self.layout.offsets.get(scratch_name(step), 0)


def scratch_name(step: Step) -> str:
    return f"scratch of {step.name}"


def scratch_bytes(step: Step, block: int, rows: int) -> int:
    """Two columns, sums of the rows, rows made at run time, and sums per row and group."""
    packed = step.layer
    if packed is None or packed.depthwise:
        return 0
    makes = packed.kind != weights.DIRECT
    total = 4 * packed.row + 4 * rows + (block * packed.row if makes else 0)
    if packed.fours:
        groups = len(packed.group_offset) // packed.conv_groups
        total += 4 * groups * (2 + block)
    return align(total)


def plan_memory(lowered: Lowered, ram: int = 0) -> Plan:
    """Place all values and scratch memory.

    ram: bytes that the arena may grow to so that more rows are made at a time. 0: as small as it can be.
    """
    external = set(lowered.inputs) | set(lowered.outputs)
    live = _lifetimes(lowered, external)
    overlays = _overlays(lowered, live)
    rows = {s.name: _rows(s) for s in lowered.steps if s.layer is not None}
    blocks = {name: min(count, MIN_BLOCK) for name, count in rows.items()}

    def attempt(chosen: dict[str, int]) -> Plan:
        buffers = [Buffer(name, *span) for name, span in live.items()]
        for index, step in enumerate(lowered.steps):
            size = scratch_bytes(step, chosen.get(step.name, 0), rows.get(step.name, 0))
            if size:
                buffers.append(Buffer(scratch_name(step), size, index, index))
        return Plan(place(buffers, overlays), chosen, buffers, overlays)

    best = attempt(blocks)
    limit = max(best.layout.size, ram)
    wanted = dict(blocks)
    makers = [s for s in lowered.steps if s.layer is not None and s.layer.kind != weights.DIRECT]
    for step in makers:
        index = lowered.steps.index(step)
        others = sum(align(b.size) for b in best.buffers if b.first <= index <= b.last and b.name != scratch_name(step))
        wanted[step.name] = _block(step, limit - others, rows[step.name], blocks[step.name])
    if wanted != blocks:
        more = attempt(wanted)
        if more.layout.size <= limit:
            best = more
        else:  # the room is there but in pieces: what fits beside the present placement of the other values
            for step in makers:
                wanted[step.name] = _fitting(best, step, lowered, rows[step.name], wanted[step.name], limit)
            more = attempt(wanted)
            best = more if more.layout.size <= limit else best
    problems = overlaps(best.buffers, best.layout, best.overlays)
    assert not problems, problems
    return best


def _fitting(plan: Plan, step: Step, lowered: Lowered, rows: int, wanted: int, limit: int) -> int:
    """Rows that fit into the largest gap beside what is live at a step."""
    index = lowered.steps.index(step)
    name = scratch_name(step)
    live = sorted(
        (plan.layout.offsets[b.name], align(b.size))
        for b in plan.buffers
        if b.first <= index <= b.last and b.name != name
    )
    gap, top = 0, 0
    for start, size in [*live, (limit, 0)]:
        gap, top = max(gap, start - top), max(top, start + size)
    return _block(step, gap, min(rows, wanted), plan.blocks[step.name])


def _block(step: Step, room: int, rows: int, least: int) -> int:
    """Rows that can be made at a time in `room` bytes of scratch memory."""
    all_rows = _rows(step)
    one = scratch_bytes(step, 1, all_rows) - scratch_bytes(step, 0, all_rows)
    fit = (room - scratch_bytes(step, 0, all_rows)) // max(1, one)
    return _even(max(least, min(rows, fit)), all_rows)


def _even(block: int, rows: int) -> int:
    """Inner loops take two rows at a time."""
    return block if block >= rows else max(2, block - block % 2)


def _rows(step: Step) -> int:
    """Outputs of one convolution group."""
    packed = step.layer
    assert packed is not None
    return int(packed.bias.shape[1]) // packed.conv_groups


def _lifetimes(lowered: Lowered, external: set[str]) -> dict[str, tuple[int, int, int]]:
    """Root value in the arena -> (bytes, step that writes it, last step that reads it)."""
    live: dict[str, tuple[int, int, int]] = {}
    for index, step in enumerate(lowered.steps):
        if step.output not in external:
            live[step.output] = (lowered.buffers[step.output].size, index, index)
        for value in step.reads:
            root = lowered.root(value)
            if root in live:
                size, first, _ = live[root]
                live[root] = (size, first, index)
    return live


def _overlays(lowered: Lowered, live: dict[str, tuple[int, int, int]]) -> dict[str, list[str]]:
    """Output -> dying inputs that it may begin in. An input that is also read in another way does not count."""
    result: dict[str, list[str]] = {}
    for index, step in enumerate(lowered.steps):
        if step.output not in live:
            continue
        otherwise = {lowered.root(v) for v in step.reads if v not in step.overlays}
        for value in step.overlays:
            root = lowered.root(value)
            fits = root in live and live[root][2] == index and live[root][0] >= live[step.output][0]
            if fits and root not in otherwise and root not in result.get(step.output, []):
                result.setdefault(step.output, []).append(root)
    return result
