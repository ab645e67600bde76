"""Where each value lies in the static arena: liveness, in-place reuse, placement, and a checker that shares no code with it.

The order of operators is the graph's. At every step the buffers in use must not overlap; the sum of their sizes, taken at
its largest, is a lower bound that no placement in that order can beat. Placement by first fit in several orders of buffers,
then in random ones, until the bound is met or the tries are used up; the result says which.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ALIGNMENT = 4
TRIES = 100
RANDOM_WORK = 100_000  # buffer pairs looked at by random orders, which bounds the time on large graphs


@dataclass(frozen=True)
class Buffer:
    """A value, or a step's scratch memory. size: bytes. first, last: steps that write it and read it last, inclusive."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass
class Layout:
    """offsets: bytes from the arena's start. size: bytes. bound: what no placement of this schedule can go below."""

    offsets: dict[str, int]
    size: int
    bound: int
    shared: list[tuple[str, str]] = field(default_factory=list)

    @property
    def minimal(self) -> bool:
        return self.size == self.bound


Pairs = Mapping[str, Iterable[str]]


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lower_bound(buffers: list[Buffer], overlays: Pairs) -> int:
    """Largest number of live bytes over the steps, aligned. An output that may start where a dying input starts counts
    once with the input that saves most."""
    best = 0
    for step in range(max((b.last for b in buffers), default=-1) + 1):
        live = {b.name: b for b in buffers if b.first <= step <= b.last}
        total = sum(align(b.size) for b in live.values())
        for name, partners in overlays.items():
            if name in live and live[name].first == step:
                saved = [align(min(live[name].size, live[p].size)) for p in partners if p in live]
                total -= max(saved, default=0)
        best = max(best, total)
    return best


def place(buffers: list[Buffer], overlays: Pairs, seed: int = 0) -> Layout:
    """Offsets of all buffers.

    overlays: output -> inputs that die as it is written and at whose very start it may begin (the operator writes a byte
    only after it has read it for the last time).
    """
    bound = lower_bound(buffers, overlays)
    if not buffers:
        return Layout({}, 0, 0)
    orders = [
        sorted(buffers, key=lambda b: (-align(b.size), b.first)),
        sorted(buffers, key=lambda b: (b.first, -b.size)),
        sorted(buffers, key=lambda b: (-(b.last - b.first), -b.size)),
        sorted(buffers, key=lambda b: (-align(b.size) * (b.last - b.first + 1), b.first)),
        sorted(buffers, key=lambda b: (-_pressure(b, buffers), -b.size)),
    ]
    rng = random.Random(seed)
    best: dict[str, int] = {}
    size = -1
    tries = max(len(orders), min(TRIES, RANDOM_WORK // len(buffers) ** 2))
    for number in range(tries):
        if number < len(orders):
            order = orders[number]
        else:  # a good order with a few buffers moved
            order = list(orders[number % len(orders)])
            for _ in range(rng.randint(1, max(1, len(order) // 3))):
                order.insert(rng.randrange(len(order)), order.pop(rng.randrange(len(order))))
        offsets = _first_fit(order, overlays)
        top = max(offsets[b.name] + align(b.size) for b in buffers)
        if size < 0 or top < size:
            best, size = offsets, top
        if size == bound:
            break
    shared = [(o, p) for o, ps in overlays.items() for p in ps if best.get(o) == best.get(p, -1)]
    return Layout(best, size, bound, shared)


def _pressure(buffer: Buffer, buffers: list[Buffer]) -> int:
    """Live bytes at the fullest step of the buffer's life."""
    return max(
        sum(b.size for b in buffers if b.first <= step <= b.last) for step in range(buffer.first, buffer.last + 1)
    )


def _first_fit(order: list[Buffer], overlays: Pairs) -> dict[str, int]:
    offsets: dict[str, int] = {}
    placed: list[Buffer] = []
    for buffer in order:
        conflicts = [b for b in placed if b.meets(buffer)]
        friends = {b.name for b in conflicts if _may_share(buffer.name, b.name, overlays)}
        candidates = {0, *(offsets[b.name] + align(b.size) for b in conflicts), *(offsets[f] for f in friends)}
        for start in sorted(candidates):
            end = start + align(buffer.size)
            if all(
                offsets[b.name] >= end
                or offsets[b.name] + align(b.size) <= start
                or (b.name in friends and offsets[b.name] == start)
                for b in conflicts
            ):
                offsets[buffer.name] = start
                break
        placed.append(buffer)
    return offsets


def _may_share(a: str, b: str, overlays: Pairs) -> bool:
    return b in overlays.get(a, ()) or a in overlays.get(b, ())


def overlaps(buffers: list[Buffer], layout: Layout, overlays: Pairs) -> list[str]:
    """What is wrong with a layout: every pair of buffers that are live at one step and share bytes, except outputs that
    begin just where an input that dies there begins. Steps are gone through byte range by byte range."""
    found = []
    for step in range(max((b.last for b in buffers), default=-1) + 1):
        live = sorted((b for b in buffers if b.first <= step <= b.last), key=lambda b: layout.offsets[b.name])
        for i, a in enumerate(live):
            for b in live[i + 1 :]:
                if layout.offsets[b.name] >= layout.offsets[a.name] + a.size:
                    continue
                same = layout.offsets[a.name] == layout.offsets[b.name]
                out, source = (a, b) if a.first == step else (b, a)
                if same and source.name in overlays.get(out.name, ()) and source.last == step and out.first == step:
                    continue
                found.append(f"step {step}: '{a.name}' and '{b.name}' overlap")
    found += [f"'{b.name}' leaves the arena" for b in buffers if layout.offsets[b.name] + b.size > layout.size]
    return found
