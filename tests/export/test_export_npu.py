"""bitdial export-npu: what the folder holds, and that damage to it is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.artifact import save_program
from bitdial.cli import main
from bitdial.engines.npu.lowering import lower
from bitdial.engines.npu.plan import Design
from bitdial.engines.npu.words import Operation, Setting, decode
from bitdial.errors import EngineError, ExportError
from bitdial.export.npu import export_npu, read_folder
from bitdial.quantization.program import Program

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


def test_an_illegal_word_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    words = np.fromfile(folder / "instructions.bin", "<u4")
    words[2] = 0x70000000
    words.tofile(folder / "instructions.bin")
    with pytest.raises(ExportError, match=r"word 2 is 0x70000000, no instruction; compile the artifact again"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["instructions.bin", "weights.bin", "shifts.bin", "manifest.json"])
def test_a_missing_file_is_named(exported: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / name).unlink()
    with pytest.raises(ExportError, match=f"is no NPU export: .*{name}"):
        read_folder(folder)


def test_a_manifest_with_any_value_exchanged_is_refused_or_read(exported: Path, tmp_path: Path) -> None:
    """Every value that the host model goes by, one at a time, by what does not belong there: ExportError, or a program that can
    still be turned to every ratio."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    manifest = json.loads((exported / "manifest.json").read_bytes())
    name, layer = next(iter(manifest["layers"].items()))
    manifest["layers"] = {name: layer}
    layer["jobs"] = layer["jobs"][:1]
    refused = 0
    for path in [*leaves(manifest["design"], "design"), *leaves(manifest["ratios"], "ratios"),
                 *(p for p in leaves(layer, "layers", name) if p[2] in ("low", "low_word", "jobs")),
                 ("design",), ("ratios",), ("layers", name), ("layers", name, "low"), ("layers", name, "jobs")]:  # fmt: skip
        for value in (None, -1, "x", [], {}, 1 << 40, True, float("nan")):
            changed = json.loads(json.dumps(manifest))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (folder / "manifest.json").write_text(json.dumps(changed))
            try:
                read = read_folder(folder)
            except ExportError:
                refused += 1
                continue
            for index, ratio in enumerate(read.ratios):
                turned = read.at_ratio(index)
                assert 0 <= ratio <= 1
                assert all(decode(turned[slice(*job["words"])]) for own in read.layers.values() for job in own["jobs"])
    assert refused > 150


def leaves(value: Any, *path: Any) -> list[tuple[Any, ...]]:
    """Paths of all numbers and words."""
    if isinstance(value, dict):
        return [p for key, part in value.items() for p in leaves(part, *path, key)]
    if isinstance(value, list):
        return [p for key, part in enumerate(value) for p in leaves(part, *path, key)]
    return [path]


@pytest.fixture(scope="module")
def residual() -> Program:
    return nets.quantized(nets.residual_net())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"words": 8}, r"layer '\w+': a job needs \d+ instruction words, the NPU has 8; use a larger Design"),
        ({"activations": 4}, r"layer '\w+': the input of one row of its outputs needs \d+ entries a bank, the NPU has 4"),
        ({"weights": 4}, r"layer '\w+': one column tile of its weights needs \d+ entries a bank, the NPU has 4"),
        ({"shifts": 1}, r"layer '\w+': its table of \d+ chunks needs"),
        ({"sums": 2}, r"layer '\w+': one row of its outputs needs"),
    ],
    ids=["words", "activations", "weights", "shifts", "sums"],
)
def test_an_artifact_too_large_for_a_buffer_is_refused(residual: Program, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        export_npu(residual, Design(4, 4, **sizes))


def test_groups_that_no_single_number_says_are_refused(residual: Program) -> None:
    name, layer = next((n, v) for n, v in residual.layers.items() if (v.low[-1] != v.low[-2]).any())
    low = layer.low.copy()
    low[[-1, -2]] = low[[-2, -1]]
    with pytest.raises(EngineError, match=f"layer '{name}': its low groups are not nested.*quantize it nested"):
        export_npu(residual.with_layers({**residual.layers, name: replace(layer, low=low)}), Design(4, 4))


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
