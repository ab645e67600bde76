"""The NPU on the command line: what its options change, and a fleet of it under a load, in the cycle model's seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitdial.artifact import load_program
from bitdial.engines.base import create_engine

NPU = ["--engine", "npu", "--npu-array", "8x8"]


def modelled(artifact: Path, **options: Any) -> list[float]:
    program = load_program(artifact)
    engine: Any = create_engine(program, "npu", rows=8, columns=8, **options)
    return [engine.modelled_seconds(1, r) for r in program.ratios]


def test_simulate_takes_service_times_of_the_cycle_model(bitdial, artifact: Path) -> None:
    """A load between what 8 bits and the full dial carry: the same figures every time, and the dial keeps what 8 bits lose."""
    seconds = modelled(artifact, megahertz=50.0)
    assert seconds[-1] < 0.75 * seconds[0]
    rate = 1.15 / seconds[0]
    load = ["--step", f"{rate:.6g}:{1000 / rate:.6g}s", "--slo-ms", f"{20e3 * seconds[0]:.6g}", "--max-ratio", "1", "--json"]
    found = {}
    for policy in ("planned", "fixed:0", "planned"):
        result = bitdial("simulate", artifact, *NPU, "--npu-mhz", "50", *load, "--policy", policy)
        assert result.code == 0, result.err
        content = result.json
        assert content["capacity_per_replica"]["smallest_ratio"] == pytest.approx(1 / seconds[0])
        assert content["capacity_per_replica"]["largest_ratio"] == pytest.approx(1 / seconds[-1])
        row = content["rows"][0]
        assert found.setdefault(policy, row) == row
    assert found["planned"]["attainment"] > found["fixed:0"]["attainment"] + 0.05


def test_options_of_the_npu_reach_inspect_and_benchmark(bitdial, artifact: Path, tmp_path: Path) -> None:
    table = tmp_path / "pj.json"
    table.write_text(json.dumps({"dram_byte": 0, "buffer_byte": 0, "add": 0, "multiply8": 1, "multiply4": 0.5}))
    asked = [*NPU, "--npu-mhz", "200", "--npu-bandwidth", "8", "--npu-energy", table]
    engine = bitdial("inspect", artifact, *asked, "--json").json["engine"]["description"]["engine"]
    assert engine["array"] == [8, 8] and engine["megahertz"] == 200 and engine["dram_bytes_per_cycle"] == 8
    for total in engine["totals"]:  # pJ are as given: one a product, half a one where it is low
        assert total["picojoules"] == pytest.approx(total["macs"] - total["low_macs"] / 2)
    rows = bitdial("benchmark", artifact, *NPU, "--npu-mhz", "200", "--repeats", "1", "--json").json["rows"]
    assert [row["median_ms"] for row in rows] == pytest.approx([1e3 * s for s in modelled(artifact, megahertz=200.0)])
    text = bitdial("inspect", artifact, *NPU).out
    assert "8 x 8 array at 1000 MHz" in text and "reorders of channels that the layout left" in text


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["inspect", "--npu-mhz", "5"], "--npu-mhz: belongs to an engine; add --engine npu"),
        (["inspect", "--engine", "cpu", "--pad-groups"], "--pad-groups: belongs to the 'npu' engine"),
        (["inspect", "--engine", "npu", "--npu-mhz", "0"], "--npu-mhz: Input should be greater than 0"),
        (["inspect", "--engine", "npu", "--npu-array", "2x8"], "at least 4 rows"),
        (["benchmark", "--engine", "cpu", "--npu-array", "8x8"], "--npu-array: belongs to the 'npu' engine"),
        (["simulate", "--poisson", "5", "--npu-mhz", "5"], "--npu-mhz: belongs to the 'npu' engine; add --engine npu"),
    ],
)
def test_options_that_do_not_fit_are_refused(bitdial, artifact: Path, command: list[str], told: str) -> None:
    result = bitdial(command[0], artifact, *command[1:])
    assert result.code == 2 and told in result.err, result.err


def test_a_table_of_times_has_no_engine(bitdial, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text("{}")
    result = bitdial("simulate", table, "--poisson", "5", "--engine", "npu")
    assert result.code == 2 and "holds service times already" in result.err
