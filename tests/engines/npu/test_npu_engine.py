"""The engine on the cycle model: results, time by ratio, what it refuses. Needs no Amaranth."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.benchmarking.latency import measure_latency
from bitdial.benchmarking.timing import Plan
from bitdial.engines.base import create_engine, default_engine, defining_engine, engine_specs
from bitdial.engines.npu.costs import Energy, Machine, layer_cost, reorder_cost, total
from bitdial.engines.npu.cycles import run_cycles
from bitdial.engines.npu.lowering import lower
from bitdial.engines.npu.plan import Design, Geometry, dense_chunks, plan_layer
from bitdial.errors import ConfigError, EngineError
from bitdial.quantization.instructions import Window
from bitdial.quantization.program import Program

sys.path[:0] = [str(Path(__file__).parent.parent / "cpu")]
import cpu_networks as nets  # noqa: E402


@pytest.fixture(scope="module")
def program() -> Program:
    return nets.quantized(nets.residual_net())


def test_it_is_never_a_default(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name comes before "reference", but a model of a machine defines nothing and is not what runs here."""
    assert list(engine_specs())[-1] == "npu"
    specs = {name: spec for name, spec in engine_specs().items() if name != "cpu"}
    monkeypatch.setattr("bitdial.engines.base.engine_specs", lambda: specs)
    assert default_engine(program, ["rows"]) == "reference"
    assert defining_engine(program).describe()["engine"]["name"] == "reference"


def test_results_are_the_reference_engines_and_time_falls_with_the_ratio(program: Program) -> None:
    engine: Any = create_engine(program, "npu", rows=4, columns=4)
    x = nets.samples(program.graph, 2)
    for want, ratio in zip(nets.reference_outputs(program, x), program.ratios, strict=True):
        np.testing.assert_array_equal(engine.run(x, ratio), want[0])
    times = [engine.modelled_seconds(1, r) for r in program.ratios]
    assert times == sorted(times, reverse=True) and times[-1] < 0.8 * times[0]
    assert engine.modelled_seconds(3, 0.5) == pytest.approx(3 * times[2])
    assert engine.set_ratio(0.6) == 0.5 and engine.modelled_seconds(1) == times[2]
    described = engine.describe()
    assert described["engine"]["totals"][0]["low_macs"] == 0 < described["engine"]["totals"][-1]["low_macs"]
    assert all("npu" in layer or "host" in layer for layer in described["layers"])


def test_benchmark_reports_the_modelled_time(program: Program) -> None:
    engine: Any = create_engine(program, "npu", rows=4, columns=4)
    options = {"rows": 4, "columns": 4}
    rows = measure_latency(program, "npu", ratios=[0.0, 1.0], batches=[2], plan=Plan(repeats=1), options=options)
    assert [row.milliseconds for row in rows] == [pytest.approx(1e3 * engine.modelled_seconds(2, r)) for r in (0.0, 1.0)]


def test_groups_that_gain_nothing_are_refused_with_the_remedy(program: Program) -> None:
    """Groups of 8 on 8 rows fill half the lanes of a low pass."""
    with pytest.raises(EngineError, match=r"layer 'conv_2': groups of 8 channels on 8 rows gain nothing.*group_size=16.*4 rows"):
        create_engine(program, "npu", rows=8, columns=8)
    with pytest.raises(EngineError, match="groups of 8 channels on 32 rows are slower than 8 bits"):
        create_engine(program, "npu")
    create_engine(program, "npu", pad_groups=True)


def test_layers_outside_are_named(program: Program) -> None:
    assert not lower(program, Design(4, 4)).host
    grouped = nets.quantized(nets.grouped_net())
    assert "grouped convolution with low channels" in lower(grouped, Design(4, 4)).host["conv_1"]
    moving = dataclasses.replace(program, extraction="dynamic")
    host = lower(moving, Design(4, 4)).host
    assert "conv_0" not in host and "dynamic extraction" in host["conv_2"]  # the first layer is never low


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"activations": 8}, "the input of one row of its outputs needs 60 entries a bank, the NPU has 8"),
        ({"weights": 8}, "one column tile of its weights needs 36"),
        ({"sums": 3}, "one row of its outputs needs 10"),
        ({"shifts": 1}, "its table of 2 chunks needs 2"),
    ],
)
def test_a_layer_too_large_for_the_buffers_is_refused(design: dict[str, int], message: str) -> None:
    geometry = Geometry(12, 4, (10, 10), Window((3, 1), (1, 1), (1, 0), (1, 1)))
    chunks = dense_chunks("big", np.array([0, 12], np.int32), np.zeros((2, 1), bool), np.zeros(1, np.uint8), 4, False)
    with pytest.raises(EngineError, match=f"layer 'big': {message}"):
        plan_layer("big", geometry, chunks, dataclasses.replace(Design(4, 4), **design), 2)


def test_bad_figures_are_refused(program: Program) -> None:
    for options, message in (({"rows": 2}, "at least 4 rows"), ({"megahertz": 0.0}, "megahertz is 0.0")):
        with pytest.raises(EngineError, match=message):
            create_engine(program, "npu", **options)


def test_closed_form_is_the_recurrence() -> None:
    for rows in (4, 5, 8):
        for pixels in (1, 2, 3, 4, 5, 7, 9, 20):
            for passes in (1, 2, 3, 7):
                load, take = 0, 1
                for _ in range(passes - 1):
                    load = max(load + rows, take + 1)
                    take = max(load + 1, take + pixels)
                assert run_cycles(rows, passes, pixels) == max(take + pixels + 2, load + rows + 1)


def test_depthwise_starves_the_array() -> None:
    """Of 32 x 32 elements a depthwise layer uses the diagonal."""
    plan = plan_layer("dw", Geometry(64, 64, (14, 14), Window((3, 3), (1, 1), (1, 1), (1, 1)), 64), [], Design(), 1)
    cost = layer_cost(plan, Machine(), 0)
    assert cost.macs == 64 * 196 * 9 and 0.02 < cost.utilisation < 1 / 32


def test_reorders_that_layout_left_are_copies_through_memory() -> None:
    """A value whose first order someone else reads: every byte read and written once, at every ratio, beside the layers."""
    b = nets.Network(3, 8, 8)
    y = b.conv(b.conv("x", 16), 32)
    program = nets.quantized(b.done(b.head(b.conv(y, 16)), y))
    engine: Any = create_engine(program, "npu", rows=4, columns=4, dram_bytes_per_cycle=16.0)
    (name, size), = engine.lowered.reorders.items()
    assert program.instruction(name).operation == "gather" and size in (32 * 64, 4 * 32 * 64)  # 8-bit values, or floats
    for ratio in program.ratios:
        costs = engine.costs(ratio, samples=3)
        assert costs[name] == reorder_cost(size, engine.machine, 3) and costs[name].cycles == 3 * 2 * size // 16
        assert costs[name].macs == costs[name].array_cycles == 0 and costs[name].dram_bytes == 6 * size
        layers = total(cost for own, cost in costs.items() if own != name)
        assert engine.modelled_seconds(3, ratio) == pytest.approx((layers.cycles + costs[name].cycles) / 1e9)
    described = engine.describe()
    assert described["engine"]["reorders"] == {name: size} and described["reorders"] == [name]
    assert described["engine"]["reorder_cycles"] == [2 * size // 16] * len(program.ratios)
    assert create_engine(nets.quantized(nets.residual_net()), "npu", rows=4, columns=4).lowered.reorders == {}


def test_energies_are_the_published_ones_and_can_be_replaced(program: Program) -> None:
    """Horowitz, ISSCC 2014, 45 nm: 0.2 pJ an 8-bit multiply, 0.1 a 32-bit add, 20 for 64 bits of 32 KB, 1.3 nJ for 64 bits of
    DRAM. A multiplier of half the width costs a quarter."""
    energy = Energy()
    assert (energy.multiply8, energy.multiply4, energy.add) == (0.2, 0.2 / 4, 0.1)
    assert (energy.buffer_byte, energy.dram_byte) == (20 / 8, 1300 / 8)
    engine: Any = create_engine(program, "npu", rows=4, columns=4, energy={"dram_byte": 0.0, "buffer_byte": 0.0})
    cost = total(engine.costs(1.0).values())
    assert cost.picojoules == pytest.approx(0.2 * (cost.macs - cost.low_macs) + 0.05 * cost.low_macs + 0.1 * cost.macs)
    assert engine.describe()["engine"]["energy_pj"]["dram_byte"] == 0.0
    for wrong, told in (({"dram": 1.0}, "'dram' is no entry"), ({"add": -1.0}, "add is -1.0"), ({"add": "x"}, "add is 'x'")):
        with pytest.raises(ConfigError, match=told):
            create_engine(program, "npu", rows=4, columns=4, energy=wrong)
