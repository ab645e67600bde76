"""The arena: placements never overlap, bounds are bounds, and what can be minimal is."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.export.c.arena import Buffer, Layout, align, lower_bound, overlaps, place
from bitdial.export.c.lowering import lower_program
from bitdial.export.c.planning import plan_memory

sys.path.insert(0, str(Path(__file__).parent.parent / "engines" / "cpu"))
import cpu_networks as nets


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Buffer], dict[str, list[str]]]:
    """Values with lifetimes; outputs that may begin where a dying input begins."""
    count = draw(st.integers(1, 14))
    buffers = []
    for i in range(count):
        first = draw(st.integers(0, 10))
        buffers.append(Buffer(f"v{i}", draw(st.integers(1, 40)), first, draw(st.integers(first, 11))))
    overlays: dict[str, list[str]] = {}
    for out in buffers:
        dying = [b.name for b in buffers if b.last == out.first and b.first < out.first and b.size >= out.size]
        if dying and draw(st.booleans()):
            overlays[out.name] = dying[:2]
    return buffers, overlays


@settings(max_examples=120)
@given(schedules())
def test_export_c_arena_never_overlaps(case: tuple[list[Buffer], dict[str, list[str]]]) -> None:
    buffers, overlays = case
    layout = place(buffers, overlays)
    assert overlaps(buffers, layout, overlays) == []
    assert layout.size >= layout.bound == lower_bound(buffers, overlays)
    for step, a, b in ((s, a, b) for s in range(12) for a, b in itertools.combinations(buffers, 2)):
        if a.first <= step <= a.last and b.first <= step <= b.last:  # byte by byte, as memory is
            own = set(range(layout.offsets[a.name], layout.offsets[a.name] + a.size))
            other = set(range(layout.offsets[b.name], layout.offsets[b.name] + b.size))
            allowed = b.name in overlays.get(a.name, ()) or a.name in overlays.get(b.name, ())
            assert not own & other or allowed


@settings(max_examples=60)
@given(schedules())
def test_export_c_lower_bound_without_reuse_is_the_fullest_step(
    case: tuple[list[Buffer], dict[str, list[str]]],
) -> None:
    buffers, _ = case
    fullest = max(sum(align(b.size) for b in buffers if b.first <= s <= b.last) for s in range(12))
    assert lower_bound(buffers, {}) == fullest


def test_export_c_checker_finds_overlaps() -> None:
    a, b, c = Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 1), Buffer("c", 8, 2, 3)
    good = Layout({"a": 0, "b": 8, "c": 0}, 16, 16)
    assert overlaps([a, b, c], good, {"c": ["a"]}) == []
    assert overlaps([a, b, c], good, {}) == ["step 2: 'a' and 'c' overlap"]
    assert overlaps([a, b, c], Layout({"a": 0, "b": 4, "c": 0}, 16, 16), {"c": ["a"]}) != []
    assert overlaps([a, b, c], Layout({"a": 0, "b": 8, "c": 4}, 16, 16), {"c": ["a"]}) != []
    assert "leaves" in overlaps([a], Layout({"a": 12}, 16, 16), {})[0]


def test_export_c_chain_in_place_is_one_buffer() -> None:
    chain = [Buffer(f"v{i}", 100, i, i + 1) for i in range(6)]
    overlays = {f"v{i}": [f"v{i - 1}"] for i in range(1, 6)}
    layout = place(chain, overlays)
    assert layout.minimal and layout.size == 100
    assert place(chain, {}).size == 200


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_export_c_networks_near_the_bound(name: str) -> None:
    program = nets.quantized(nets.NETWORKS[name]())
    for ratios in (list(range(len(program.ratios))), [0], [len(program.ratios) - 1]):
        lowered = lower_program(program, ratios)
        plan = plan_memory(lowered)
        assert overlaps(plan.buffers, plan.layout, plan.overlays) == []
        assert plan.layout.size <= 1.02 * plan.layout.bound
