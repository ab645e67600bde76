"""What is saved comes back, in fixed bytes, within the promised size, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import bitdial
from bitdial.artifact import from_bytes, inspect_file, load_program, save_program, to_bytes, verify_file
from bitdial.errors import ArtifactError, OutputError
from bitdial.graph.ir import Graph, Node, TensorType
from bitdial.quantization.program import QParams
from hand_built import program_of


@pytest.mark.parametrize("granularity", ["output", "block", "group"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_program_comes_back_equal(make_program, assert_same, tmp_path, granularity, nested):
    program = make_program(3, granularity, nested)
    summary = save_program(program, tmp_path / "m.bitdial")
    loaded = load_program(tmp_path / "m.bitdial")
    assert_same(program, loaded)
    loaded.graph.consumers()  # every operand exists
    for layer in loaded.layers.values():  # the arrays are the caller's own
        layer.low[...] = False
    assert verify_file(tmp_path / "m.bitdial") == []
    assert summary.total == os.path.getsize(tmp_path / "m.bitdial")
    assert summary.total == summary.weights + summary.tables + summary.float_leftovers + summary.manifest
    assert (
        summary.weights
        == summary.int8_weights
        == sum(layer.weight.size for layer in program.layers.values() if layer.weight is not None)
    )


def test_a_file_of_the_former_name_loads(make_program, assert_same):
    program = make_program()
    data = to_bytes(program)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"format":"bitdial"', b'"format":"flexiq"').rstrip(b" ")
    assert_same(from_bytes(data[:8] + header.ljust(length) + data[8 + length :]), program)


def test_equal_programs_give_equal_bytes(make_program):
    program = make_program(1)
    shuffled = replace(program, qparams=dict(reversed(program.qparams.items())))
    shuffled.constants = dict(reversed(program.constants.items()))
    data = to_bytes(program)
    assert data == to_bytes(make_program(1)) == to_bytes(shuffled) == to_bytes(from_bytes(data))
    assert data != to_bytes(make_program(2))


def test_constants_that_nothing_reads_are_left_out(make_program, assert_same):
    program = make_program()
    program.constants["conv2.weight"] = np.ones((12, 10, 3, 3), np.float32)
    assert_same(make_program(), from_bytes(to_bytes(program)))


def test_the_safetensors_library_reads_the_file(make_program, tmp_path):
    program = make_program()
    save_program(program, tmp_path / "m.bitdial")
    with safe_open(tmp_path / "m.bitdial", "np") as file:
        assert file.metadata()["format"] == "bitdial"
        assert json.loads(file.metadata()["manifest"])["ratios"] == program.ratios
        assert (file.get_tensor("layers/conv2/weight") == program.layers["conv2"].weight).all()
        assert (file.get_tensor("constants/picks") == [1, 3]).all()


def test_loading_needs_no_torch(make_program, tmp_path):
    save_program(make_program(), tmp_path / "m.bitdial")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it fails
        "from bitdial.artifact import load_program, save_program, verify_file, inspect_file\n"
        "program = load_program(sys.argv[1])\n"
        "save_program(program, sys.argv[1] + '.2', band=(0.5, 1.0))\n"
        "assert not verify_file(sys.argv[1]) and inspect_file(sys.argv[1])['hashes_ok']\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch' and sys.modules[m]), len(program.layers))\n"
    )
    source = str(Path(next(iter(bitdial.__path__))).parent)
    environment = os.environ | {"PYTHONPATH": source}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.bitdial")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]", "6"]


def _large(make_layer, granularity):
    """1x1 convs of 256 to 768 channels in groups of 16: the shapes for which tables weigh most."""
    rng = np.random.default_rng(0)
    sizes = [(512, 512), (768, 512), (512, 768), (768, 768), (2048, 768), (768, 2048), (512, 768)]
    layers = {}
    nodes = [Node("q", "quantize", ["x"])]
    types = {"x": TensorType((64, 2048)), "q": TensorType((64, 2048), "int8")}
    for i, (outputs, inputs) in enumerate(sizes):
        name = f"fc{i}"
        layers[name] = make_layer(rng, name, (outputs, inputs), group=16, granularity=granularity)
        slices = Node(f"cut{i}", "slice", ["q"], {"axis": 1, "start": 0, "stop": inputs, "step": 1})
        nodes += [slices, Node(name, "linear", [slices.name])]
        types |= {slices.name: TensorType((64, inputs), "int8"), name: TensorType((64, outputs), "int8")}
    graph = Graph(["x"], list(layers), nodes, {}, types)
    qparams = {n: QParams(0.1, True) for n in types if n != "x"}
    return program_of(graph, [0.0, 0.25, 0.5, 0.75, 1.0], qparams, layers, factors={"q": np.ones(1, np.float32)})


@pytest.mark.parametrize("granularity", ["output", "block", "group"])
def test_size_is_within_five_percent_from_five_megabytes_on(make_layer, tmp_path, granularity):
    program = _large(make_layer, granularity)
    summary = save_program(program, tmp_path / "m.bitdial")
    assert summary.int8_weights >= 5_000_000
    assert summary.overhead <= 1.05, (summary, inspect_file(tmp_path / "m.bitdial")["tables"])


def test_inspect_counts_every_byte_and_reports_damage(make_program, tmp_path):
    path = tmp_path / "m.bitdial"
    save_program(make_program(), path)
    report = inspect_file(path)
    json.dumps(report)
    sizes = report["sizes"]
    assert report["version"] == 2 and report["hashes_ok"] and report["layers"] == 6 and report["band"] is None
    assert sizes["total"] == path.stat().st_size == sum(v for k, v in sizes.items() if k != "total")
    assert sizes["float_leftovers"] == 4 * 10 + 8 * 2 + 4 * 10 + 4 * 60 + 4 * 6
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not inspect_file(path)["hashes_ok"]
    findings = verify_file(path)
    assert len(findings) == 1 and str(path) in findings[0] and "sha256" in findings[0]


def test_ratios_may_be_integers_and_attributes_tuples(make_program):
    program = make_program()
    program.ratios = [0, 0.25, 0.5, 0.75, 1]
    program.instruction("heads").node.attrs["shape"] = (("N", 1), 4, 5)
    loaded = from_bytes(to_bytes(program))
    assert loaded.ratios == program.ratios and loaded.instruction("heads").node.attrs["shape"] == [["N", 1], 4, 5]


# -- writing ---------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_and_links_are_followed(make_program, tmp_path):
    path = tmp_path / "m.bitdial"
    save_program(make_program(1), path)
    (tmp_path / "link").symlink_to(path)
    save_program(make_program(2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == to_bytes(make_program(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m.bitdial"]


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(make_program, tmp_path, monkeypatch, step):
    path = tmp_path / "m.bitdial"
    save_program(make_program(1), path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{step}", fail)
        with pytest.raises(OutputError, match=r"m\.bitdial.*No space left"):
            save_program(make_program(2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.bitdial"]


@pytest.mark.parametrize("place", ["missing/m.bitdial", ".", "file/m.bitdial", "nul\0"])
def test_an_unwritable_place_is_an_output_error(make_program, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_program(make_program(), tmp_path / place)


@pytest.mark.parametrize("place", ["missing.bitdial", ".", "nul\0", "fifo"])
def test_an_unreadable_place_is_an_artifact_error(tmp_path, place):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ArtifactError, match=r"check the path|regular file"):
        load_program(tmp_path / place)
    assert len(verify_file(tmp_path / place)) == 1
