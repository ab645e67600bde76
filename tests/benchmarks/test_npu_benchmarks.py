"""The NPU's benchmarks: the cycle model beside SCALE-Sim's convention, and beside SCALE-Sim itself where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitdial.engines.npu.plan import Design, Geometry
from bitdial.quantization.instructions import Window

MODULES = ("npu_networks", "npu_scalesim", "npu_reorders", "npu_accuracy")
SMALL = Design(8, 8)
SHAPES = [
    (Geometry.linear(32, 256, 64), Design()),  # 1,263 cycles, as published with SCALE-Sim
    (Geometry.linear(50, 20, 7), SMALL),
    (Geometry(16, 24, (9, 7), Window((3, 3), (2, 2), (1, 1), (1, 1))), SMALL),
    (Geometry(5, 9, (6, 6), Window((1, 1), (2, 2), (0, 0), (1, 1))), SMALL),
    (Geometry(3, 8, (12, 12), Window((5, 5), (2, 2), (2, 2), (1, 1))), SMALL),  # packs its taps
]


def test_the_convention_is_the_published_one(bench: dict[str, ModuleType]) -> None:
    scalesim = bench["npu_scalesim"]
    assert scalesim.convention_cycles(*SHAPES[0]) == 8 * (2 * 32 + 32 + 64 - 2) - 1 == 1263


def test_both_models_fold_alike_unless_taps_are_packed(bench: dict[str, ModuleType]) -> None:
    """The plan's own tiles under SCALE-Sim's schedule; jobs that slice rows read the same tiles again, which is no fold."""
    networks, scalesim = bench["npu_networks"], bench["npu_scalesim"]
    packed = 0
    for name in ("resnet18", "mobilenet_v2", "vit_small"):
        layers = networks.NETWORKS[name]()
        assert any(len({job.out_rows for job in plan.jobs}) > 1 for plan in networks.plans(layers, 64)) or name == "vit_small"
        for row in networks.scale_sim_rows(layers, 64, False):
            if row["packs_taps"]:
                packed += 1
                assert row["convention"] < row["own_tiles_in_its_schedule"]
            else:
                assert row["convention"] == row["own_tiles_in_its_schedule"]
    assert packed == 3  # the first layers alone
    assert not scalesim.packs_taps(*SHAPES[3]) and scalesim.packs_taps(*SHAPES[4])


def test_scale_sim_counts_what_its_convention_says(bench: dict[str, ModuleType]) -> None:
    scalesim = bench["npu_scalesim"]
    if why := scalesim.missing():
        pytest.skip(why)
    for geometry, design in SHAPES:
        assert scalesim.package_cycles(geometry, design) == scalesim.convention_cycles(geometry, design), geometry


def test_reorders_are_shares_of_all_cycles(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    networks = bench["npu_networks"]
    layers = [("a", Geometry.linear(8, 8, 4)), ("b", Geometry.linear(64, 32, 16)), ("c", Geometry.linear(32, 8, 1))]
    monkeypatch.setattr(networks.npu_reorders, "missing", lambda name: "")
    monkeypatch.setattr(networks.npu_reorders, "left_by_layout", lambda name, group: {"count": 1, "bytes": 320})
    found = networks.reorders("resnet18", layers, [{"cycles": 180}, {"cycles": 60}])
    assert found["left"]["cycles"] == 20 and found["left"]["share"] == [0.1, 0.25]
    every = found["of_every_layer"]  # of the middle one, 64 channels of 16 rows, read and written at 32 bytes a cycle
    assert every["count"] == 1 and every["cycles"] == 64 and every["share"] == [64 / 244, 64 / 124]
    monkeypatch.setattr(networks.npu_reorders, "missing", lambda name: "torchvision is not installed")
    assert networks.reorders("resnet18", layers, [{"cycles": 1}])["skipped"] == "torchvision is not installed"


@pytest.mark.slow
def test_layout_leaves_no_reorder_on_a_resnet(bench: dict[str, ModuleType]) -> None:
    reorders = bench["npu_reorders"]
    if why := reorders.missing("resnet18"):
        pytest.skip(why)
    found = reorders.left_by_layout("resnet18", 64)
    assert found["count"] == 0 and found["permuted"] > 5


def test_the_picture_is_drawn_from_stored_rows(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    accuracy = bench["npu_accuracy"]

    def row(cycles: int) -> dict[str, Any]:
        points = [
            {"ratio": r, "accuracy": 0.9 - 0.01 * r, "cycles": round(cycles * (1 - r / 2)), "utilisation": 0.5, "picojoules": 1e6}
            for r in (0.0, 1.0)
        ]
        return {"float": 0.9, "ratios": points}

    file = accuracy.ResultFile(tmp_path / f"npu_accuracy.{accuracy.describe_machine()['kind']}.json", "npu_accuracy", {})
    for name, cycles in (("resnet20/32x32", 1000), ("resnet20/8x8", 9000), ("vit/32x32", 500)):
        file.put(name, {}, row(cycles))
    accuracy.main(["--networks", "", "--results", str(tmp_path), "--plot", str(tmp_path / "a.svg")])
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert "vit/32x32: 90.00 % at 500 cycles, 89.00 % at 250 cycles" in accuracy.chart(file.rows).told
