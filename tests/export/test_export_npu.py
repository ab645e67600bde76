"""bitdial export-npu: what the folder holds, and that damage to it is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bitdial.artifact import save_program
from bitdial.cli import main
from bitdial.engines.npu.lowering import lower
from bitdial.engines.npu.plan import Design
from bitdial.engines.npu.words import Operation, Setting, decode
from bitdial.errors import ExportError
from bitdial.export.npu import read_folder

sys.path[:0] = [str(Path(__file__).parent.parent / "engines" / "cpu")]
import cpu_networks as nets  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu")
    save_program(nets.quantized(nets.grouped_net()), folder / "net.bitdial")
    command = ["export-npu", str(folder / "net.bitdial"), "-o", str(folder / "out"), "--rows", "4", "--columns", "4", "--quiet"]
    assert main(command) == 0
    return folder / "out"


def test_the_folder_holds_a_program_whose_dial_is_one_word_a_layer(exported: Path) -> None:
    read = read_folder(exported)
    plans = lower(nets.quantized(nets.grouped_net()), Design(4, 4)).plans
    assert list(read.layers) == list(plans)
    manifest = json.loads((exported / "manifest.json").read_bytes())
    assert set(manifest["host"]) == {"conv_1", "conv_6"}
    assert {s["name"] for s in manifest["schedule"] if s["runs"] == "npu"} == set(plans)
    base, turned = read.at_ratio(0), read.at_ratio(len(read.ratios) - 1)
    np.testing.assert_array_equal(base, read.words)
    changed = np.flatnonzero(base != turned)
    assert len(changed) == sum(plan.low[0] != plan.low[-1] for plan in plans.values()) > 0
    for at in changed:
        assert decode(np.array([turned[at], 0xF0000000], np.uint32))[0].setting is Setting.LOW
    for name, layer in read.layers.items():
        kinds = [decode(read.words[slice(*job["words"])])[-2].operation for job in layer["jobs"]]
        assert kinds == [Operation.RUN] * len(plans[name].jobs)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("instructions.bin", -4, "is no whole number of 0 to|without END"),
        ("instructions.bin", -1, "instructions.bin is cut short"),
        ("weights.bin", -2, "weights.bin is cut short"),
        ("weights.bin", 8, "no whole number of 0 to 2"),
        ("shifts.bin", 4, "no whole number of 0 to 1"),
        ("manifest.json", -30, "the manifest is damaged"),
    ],
)
def test_damage_is_refused_by_name(exported: Path, tmp_path: Path, name: str, keep: int, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    with pytest.raises(ExportError, match=message):
        read_folder(folder)


def test_groups_too_small_are_refused_and_nothing_is_written(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-npu", str(exported.parent / "net.bitdial"), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "groups of 8 channels on 32 rows are slower than 8 bits" in told and "group_size=64" in told
    assert not list(tmp_path.iterdir())
    assert main([*command, "--pad-groups", "--quiet"]) == 0


def test_inspect_shows_the_modelled_array(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(exported.parent / "net.bitdial")
    assert main(["inspect", file, "--engine", "npu", "--pad-groups"]) == 0
    told = capsys.readouterr().out
    assert "32 x 32 array" in told and "modelled, not measured" in told and "grouped convolution with low channels" in told
    assert main(["inspect", file, "--engine", "npu", "--json", "--pad-groups"]) == 0
    engine = json.loads(capsys.readouterr().out)["engine"]["description"]["engine"]
    assert engine["totals"][0]["cycles"] > 0 and engine["array"] == [32, 32]
    other = ["--engine", "npu", "--isa", "avx2"]
    for wrong, message in ((other, "belongs to the 'cpu'"), (["--pad-groups"], "add --engine npu")):
        assert main(["inspect", file, *wrong]) == 2
        assert message in capsys.readouterr().err
