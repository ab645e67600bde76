"""C export: bit-identical to the reference engine at every ratio, natively and under emulators; memory; error paths."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from bitdial.errors import CalibrationError, ExportError, OutputError
from bitdial.export.c import CExport, export_c, write_folder
from bitdial.graph.ir import Graph
from bitdial.quantization.instructions import Contract, Float, MatMul, Move
from bitdial.quantization.program import Program
from bitdial.quantization.weights import read_back_weights

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "engines" / "cpu")]
import cpu_networks as nets  # noqa: E402
from export_c_targets import CORTEX, QEMU_ARM, need, need_cortex_m, self_tester  # noqa: E402

Run = Callable[..., str]


@pytest.fixture
def self_test(tmp_path: Path) -> Run:
    return self_tester(tmp_path)


@pytest.fixture(scope="session")
def programs() -> dict[str, Program]:
    """The networks of the CPU engine's tests, quantized."""
    return {name: nets.quantized(build()) for name, build in nets.NETWORKS.items()}


def library(exported: CExport, folder: Path) -> ctypes.CDLL:
    """The export as a shared library."""
    write_folder(exported, folder)
    path = folder / "net.so"
    command = [
        os.environ.get("CC", "cc"),
        "-std=c99",
        "-O1",
        "-shared",
        "-fPIC",
        str(folder / f"{exported.name}.c"),
        "-o",
        str(path),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[:3000]
    return ctypes.CDLL(str(path))


def run_library(lib: ctypes.CDLL, x: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    """One sample through net_run."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    x = np.ascontiguousarray(x, np.float32)
    lib.net_run(*(ctypes.c_void_p(a.ctypes.data) for a in (x, *outputs)))
    return outputs


def check_all(program: Program, exported: CExport, folder: Path, seed: int = 0) -> None:
    """Every ratio, on normal, zero, saturating and huge samples, one after another in one process and one arena."""
    lib = library(exported, folder)
    x = nets.samples(program.graph, 5, seed)
    x[3] *= np.float32(1e30)
    x[4] = np.where(x[4] > 0, np.float32(3e38), np.float32(-3e38))
    expected = nets.reference_outputs(program, x)
    for index, ratio in enumerate(exported.ratios):
        assert lib.net_set_ratio(index) == 0 and lib.net_ratio() == index
        want = expected[program.ratios.index(ratio)]
        for n in range(len(x)):
            got = run_library(lib, x[n], [w.shape[1:] for w in want])
            for own, wanted in zip(got, want, strict=True):
                assert nets.same_bits(own, wanted[n]), (
                    f"ratio {ratio}, sample {n}: {(own != wanted[n]).sum()} values differ"
                )
    assert lib.net_set_ratio(len(exported.ratios)) == -1 and lib.net_set_ratio(-1) == -1
    assert lib.net_ratio() == len(exported.ratios) - 1, "a refused ratio changes nothing"


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_export_c_native_every_ratio(name: str, programs: dict[str, Program], tmp_path: Path) -> None:
    program = programs[name]
    check_all(program, export_c(program), tmp_path / "all")
    check_all(program, export_c(program, ratios=[len(program.ratios) - 1]), tmp_path / "low")


@pytest.mark.parametrize("name", ["residual", "grouped", "plain"])
def test_export_c_stored_low_weights(
    name: str, programs: dict[str, Program], tmp_path: Path, self_test: Run
) -> None:
    """Low weights of their own, unlike the 8-bit ones: beside them for the dial, in their place for a fixed ratio."""
    derived = copy.deepcopy(programs[name])
    for layer in derived.layers.values():
        layer.low_weight = None
    program = nets.with_low_plane(derived)
    exported, before = export_c(program), export_c(derived)
    check_all(program, exported, tmp_path / "all")
    self_test(exported, "gcc", ["-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all"])
    last = [len(program.ratios) - 1]
    check_all(program, export_c(program, ratios=last), tmp_path / "low")
    assert export_c(program, ratios=last).constants == export_c(derived, ratios=last).constants
    assert export_c(program, ratios=[0]).files == export_c(derived, ratios=[0]).files
    low = [v for v in program.layers.values() if v.weight is not None and v.low.any()]
    ever = sum(int((v.low.any(axis=0) * v.group_macs).sum() * v.weight.size // v.macs) for v in low)  # type: ignore[union-attr]
    assert ever // 2 <= exported.weights - before.weights <= ever * 0.75  # half a byte each; runs are filled up to fours
    first = low[0]
    first.low_weight[0].flat[0] = first.wmax + 1  # type: ignore[index]
    with pytest.raises(ExportError, match="a low weight is larger than 7"):
        export_c(program)


def test_export_c_some_layers_store_low_weights(programs: dict[str, Program], tmp_path: Path) -> None:
    """Layers with and without low weights of their own in one file, and low weights beyond four bits."""
    program = nets.with_low_plane(nets.quantized(nets.residual_net(), nets.QUICK.updated(low_bits=5), seed=1))
    layers = [v for v in program.layers.values() if v.low_weight is not None]
    assert len(layers) > 2 and layers[0].wmax > 7
    for layer in layers[::2]:
        layer.low_weight = None
    check_all(program, export_c(program), tmp_path / "all")
    check_all(program, export_c(program, ratios=[2]), tmp_path / "fixed")


def test_export_c_repeats_values(tmp_path: Path) -> None:
    b = nets.Network(3, 8, 8)
    one = b.pool("max_pool", b.conv("x", 8, 3), 8, 8)
    wide = b.node("expand", [one], {"shape": [["N", 1], 8, 5, 4]})
    program = nets.quantized(b.done(b.head(b.conv(wide, 8, 3))))
    assert any(isinstance(step, Move) and step.operation == "expand" for step in program.instructions)
    check_all(program, export_c(program), tmp_path)


@pytest.mark.parametrize("target", ["avx512vnni", "avx2"])
def test_export_c_widths_per_layer(target: str, tmp_path: Path) -> None:
    """What a target chooses: limits that differ by layer and are no powers of two, up to 127 and 63."""
    config = nets.QUICK.updated(target=target, group_size=16, low_weights="derived", ratios=(0.0, 0.5, 1.0))
    derived = nets.quantized(nets.wide_net(), config, seed=1)
    assert len({(v.amax, v.wmax) for v in derived.layers.values() if v.eligible}) >= 2
    program = nets.with_low_plane(derived)
    check_all(program, export_c(program), tmp_path / "all")
    check_all(program, export_c(program, ratios=[2]), tmp_path / "fixed")
    check_all(derived, export_c(derived), tmp_path / "derived")


def check_random(graph: Graph, data: st.DataObject, folder: Path) -> None:
    config = nets.QUICK.updated(
        weight_granularity=data.draw(st.sampled_from(["group", "output", "block"])), bias_correction=False,
        low_weights="derived", low_bits=data.draw(st.sampled_from([4, 4, 5, 6, 2])), sort_channels=False,
        lower_first_last=data.draw(st.booleans()), group_size=data.draw(st.sampled_from([4, 8, 16])),
    )  # fmt: skip
    try:
        program = nets.quantized(graph, config, seed=1)
        exported = export_c(program)
    except (CalibrationError, ExportError) as error:
        assert any(t in str(error) for t in ("calibrated", "runs in float", "reads", "leave int32")), error
        assume(False)
    if data.draw(st.booleans()):
        program = nets.with_low_plane(program)
        exported = export_c(program)
    check_all(program, exported, folder / "all")
    check_all(program, export_c(program, ratios=[data.draw(st.integers(0, 4))]), folder / "fixed")


@settings(max_examples=4, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(graph=nets.networks(), data=st.data())
def test_export_c_random_networks(graph: Graph, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_random(graph, data, tmp_path_factory.mktemp("random"))


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(graph=nets.networks(), data=st.data())
def test_export_c_random_networks_at_length(
    graph: Graph, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_random(graph, data, tmp_path_factory.mktemp("random"))


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("cc", ["-O2", "-ffreestanding"]),
        ("gcc", ["-std=gnu99", "-O3", "-march=native"]),  # GNU mode would fuse multiplications and additions
        ("clang", ["-O2", "-march=native"]),
        ("gcc", ["-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all"]),
        ("g++", ["-std=c++17", "-O1", "-Wno-pedantic", "-x", "c++", "-fsyntax-only", "-DSKIP"]),
    ],
    ids=["freestanding", "gnu99-native", "clang", "sanitizers", "header-in-c++"],
)
def test_export_c_compilers(
    compiler: str, flags: list[str], programs: dict[str, Program], self_test: Run, tmp_path: Path
) -> None:
    need(compiler)
    exported = export_c(programs["mobile"])
    if "-DSKIP" in flags:
        write_folder(exported, tmp_path / "h")
        header = f'#include "{tmp_path / "h" / "net.h"}"\nint main() {{ return net_ratio(); }}\n'
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c++", "-"]
        assert subprocess.run(command, input=header, text=True, check=False).returncode == 0
        return
    said = self_test(exported, compiler, flags)
    assert said.strip() == ("" if "-ffreestanding" in flags else "net: ok")


def test_export_c_self_test_finds_a_wrong_weight(programs: dict[str, Program], self_test: Run) -> None:
    exported = export_c(programs["dense"])
    source = exported.files["net.c"]
    at = source.index("_weight[")
    start = source.index("{", at)
    first = source[start + 1 :].split(",", 1)[0].strip()
    other = str((int(first) + 200) % 255 - 127)
    exported.files["net.c"] = source[: start + 1] + source[start + 1 :].replace(first, other, 1)
    with pytest.raises(AssertionError, match="differ"):
        self_test(exported)


@pytest.mark.parametrize("flags", [[], ["-march=armv8.2-a+dotprod"]], ids=["neon", "dotprod"])
def test_export_c_aarch64(flags: list[str], programs: dict[str, Program], self_test: Run) -> None:
    need("aarch64-linux-gnu-gcc", "qemu-aarch64")
    for name in ("residual",):
        self_test(
            export_c(programs[name]),
            "aarch64-linux-gnu-gcc",
            ["-O2", "-static", *flags],
            ["qemu-aarch64", "-cpu", "max"],
        )


@pytest.mark.parametrize(
    ("machine", "flags"),
    [
        ("mps2-an386", ["-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"]),
        ("mps2-an386", ["-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-DBITDIAL_PLAIN", "-std=gnu99"]),
        ("mps3-an547", ["-mcpu=cortex-m55"]),
    ],
    ids=["m4-dsp", "m4-plain-gnu99", "m55-helium"],
)
def test_export_c_cortex_m(machine: str, flags: list[str], programs: dict[str, Program], self_test: Run) -> None:
    need_cortex_m("qemu-system-arm")
    emulator = [*QEMU_ARM, "-M", machine, "-kernel"]
    for name in ("residual", "grouped", "plain"):  # plain: signed activations, groups of odd width
        self_test(export_c(programs[name]), "arm-none-eabi-gcc", ["-O2", *flags, *CORTEX], emulator)
    self_test(export_c(nets.with_low_plane(programs["plain"])), "arm-none-eabi-gcc", ["-O2", *flags, *CORTEX], emulator)
    low = export_c(programs["mobile"], ratios=[len(programs["mobile"].ratios) - 1])
    self_test(low, "arm-none-eabi-gcc", ["-O2", *flags, *CORTEX], emulator)


def test_export_c_cortex_m_uses_simd(programs: dict[str, Program], tmp_path: Path) -> None:
    need("arm-none-eabi-gcc")
    write_folder(export_c(programs["residual"]), tmp_path / "c")
    for cpu, instruction in (
        ("cortex-m4+", "smuad"),
        ("cortex-m4+", "smlad"),
        ("cortex-m55", "vmladava"),
        ("cortex-m3", "mla"),
    ):
        flags = ["-mthumb", f"-mcpu={cpu.rstrip('+')}", "-O2", "-std=c99", "-S", "-o", "-"]
        if cpu == "cortex-m55":
            flags.append("-mfloat-abi=hard")
        text = subprocess.run(
            ["arm-none-eabi-gcc", *flags, str(tmp_path / "c" / "net.c")], capture_output=True, text=True, check=True
        ).stdout
        assert instruction in text
        assert cpu != "cortex-m3" or "smlad" not in text


def extreme_program(oracle_signed: bool, programs: dict[str, Program]) -> Program:
    """A program whose weights, biases and shifts lie at their limits."""
    program = nets.quantized(nets.residual_net(), seed=3)
    rng = np.random.default_rng(1)
    for layer in program.layers.values():
        assert layer.weight is not None
        layer.weight[...] = rng.choice([-127, 127, 0, 120, -8], layer.weight.shape).astype(np.int8)
        top = np.abs(layer.weight.astype(np.int64)).reshape(len(layer.weight), -1).sum(axis=1).max() * 255
        room = 2**31 - 1 - int(top)
        layer.bias[...] = rng.choice([-room, room, 0, 12345], layer.bias.shape).astype(np.int32)
        layer.multiplier[...] = np.float32(1e-7)
        if layer.eligible:
            layer.weight_shift[...] = rng.integers(0, 5, layer.weight_shift.shape)
            layer.activation_shift[...] = rng.integers(0, 5, layer.activation_shift.shape)
            layer.weight_granularity = "output"
        assert np.abs(read_back_weights(layer)).max() <= 127
    return program


def test_export_c_extreme_values(programs: dict[str, Program], tmp_path: Path, self_test: Run) -> None:
    program = extreme_program(False, programs)
    exported = export_c(program)
    check_all(program, exported, tmp_path / "extreme")
    self_test(exported, "gcc", ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"])


def test_export_c_quantized_input(programs: dict[str, Program], tmp_path: Path) -> None:
    program = programs["plain"]
    lib = library(export_c(program), tmp_path / "q")
    node = program.graph.node("x_q8")
    q = program.qparams[node.name]
    values = np.random.default_rng(0).integers(q.qmin, q.qmax + 1, (1, 3, 9, 9))
    x = (values * np.float32(q.scale)).astype(np.float32)
    want = nets.reference_outputs(program, x)[2][0]
    stored = values.astype(np.int8 if q.signed else np.uint8)
    out = np.zeros(want.shape[1:], np.float32)
    assert lib.net_set_ratio(2) == 0
    lib.net_run_quantized(ctypes.c_void_p(stored.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    assert nets.same_bits(out, want[0])


def test_export_c_fixed_ratio_is_smaller(programs: dict[str, Program]) -> None:
    program = programs["plain"]
    every, low = export_c(program), export_c(program, ratios=[len(program.ratios) - 1])
    assert low.weights < 0.65 * every.weights, "most groups are low: two weights a byte"
    assert low.constants < every.constants and low.ratios == [1.0]


def test_export_c_deterministic(programs: dict[str, Program]) -> None:
    assert export_c(programs["dense"]).files == export_c(programs["dense"]).files


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_export_c_names_missing_operators(helpers: Any, transformer: Any) -> None:
    from bitdial.pipeline import prepare, quantize_prepared

    program = quantize_prepared(prepare(transformer, [helpers.images(12)], nets.QUICK), nets.QUICK)
    with pytest.raises(ExportError) as caught:
        export_c(program)
    message = str(caught.value)
    assert "softmax" in message and "layer_norm" in message and "module 'blocks.0" in message
    assert "product of two activations" in message


def test_export_c_dynamic_extraction(programs: dict[str, Program]) -> None:
    program = nets.quantized(nets.plain_net(), nets.QUICK.model_copy(update={"extraction": "dynamic"}))
    with pytest.raises(ExportError, match="dynamic extraction"):
        export_c(program)
    assert export_c(program, ratios=[0]).ratios == [0.0]


@pytest.mark.parametrize(
    "name", ["", "1net", "a-b", "int", "stdint", "fq_conv", "nét", "a b", "x" * 41, "../net", "net\n"]
)
def test_export_c_refuses_names(name: str, programs: dict[str, Program]) -> None:
    with pytest.raises(ExportError, match="--name"):
        export_c(programs["plain"], name)


def test_export_c_hostile_names_stay_in_comments(self_test: Run) -> None:
    program = nets.quantized(nets.plain_net())
    hostile = '*/ int system(const char *); /* "; ??/ \\\n#error x {x} %n \u202e'
    renamed = {step.name: f"{hostile}{i}" for i, step in enumerate(program.instructions)}
    steps = []
    for step in program.instructions:
        inputs = tuple(renamed.get(v, v) for v in step.inputs)
        changes: dict[str, Any] = {"name": renamed[step.name], "inputs": inputs, "source": hostile}
        if isinstance(step, Contract):
            changes["residual"] = renamed.get(step.residual or "", step.residual)
        if isinstance(step, (Contract, MatMul)):
            step.layer.name = changes["name"]
        if isinstance(step, (Move, Float)):
            changes["node"] = dataclasses.replace(step.node, name=changes["name"], inputs=list(inputs), source=hostile)
        steps.append(dataclasses.replace(step, **changes))
    program.instructions = steps
    program.outputs = [renamed.get(v, v) for v in program.outputs]
    program.types = {renamed.get(k, k): v for k, v in program.types.items()}
    program.qparams = {renamed.get(k, k): v for k, v in program.qparams.items()}
    exported = export_c(program, "odd_Name9")
    assert all(
        "system" not in line or line.lstrip().startswith("/*") for line in exported.files["odd_Name9.c"].splitlines()
    )
    assert self_test(exported).strip() == "odd_Name9: ok"


def test_export_c_refuses_shifts_out_of_range() -> None:
    program = nets.quantized(nets.plain_net())
    layer = next(v for v in program.layers.values() if v.eligible)
    layer.weight_shift[...] = 7
    with pytest.raises(ExportError, match="out of eight bits"):
        export_c(program)


def test_export_c_refuses_wrong_ratios(programs: dict[str, Program]) -> None:
    for ratios in ([], [9], [1, 0], [-1], [0, 0]):
        with pytest.raises(ExportError, match="indices"):
            export_c(programs["plain"], ratios=ratios)


def test_export_c_folder(programs: dict[str, Program], tmp_path: Path) -> None:
    exported = export_c(programs["plain"])
    folder = tmp_path / "out"
    assert sorted(f.name for f in write_folder(exported, folder)) == ["net.c", "net.h", "net_test.c"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "no temporary folder is left"
    with pytest.raises(OutputError, match="--force"):
        write_folder(exported, folder)
    (folder / "net.c").write_text("old")
    (folder / "mine.c").write_text("kept")
    write_folder(exported, folder, force=True)
    assert (folder / "net.c").read_text() == exported.files["net.c"] and (folder / "mine.c").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    write_folder(exported, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write_folder(exported, tmp_path / "file")
    with pytest.raises(OutputError, match="does not exist"):
        write_folder(exported, tmp_path / "no" / "such")


def test_export_c_failure_leaves_nothing(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitdial.export import folder as module

    exported = export_c(programs["plain"])
    real, calls = module.write_atomically, 0

    def failing(path: Any, data: bytes, what: str = "") -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OutputError("disk full")
        real(path, data, what)

    monkeypatch.setattr(module, "write_atomically", failing)
    with pytest.raises(OutputError, match="disk full"):
        write_folder(exported, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
