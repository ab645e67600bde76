"""benchmarks/gpu_model.py: its counts against what a block's shape asks for, and against what the emulated kernels do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_model
from bitdial.artifact import save_program
from bitdial.engines.cuda import compilation
from bitdial.engines.cuda.arguments import AttentionArgs, Launch, Span
from bitdial.engines.cuda.compiler import Compiler
from bitdial.engines.cuda.emulated import EmulatedDevice, build, find_compiler
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.quantization.program import Program

ROOT = Path(__file__).parents[2]
ROWS, DEPTH = 64, 64  # of a block and of its step; each warp makes 32 by 32
CARD = gpu_model.Card("card", "sm_86", sms=10, ghz=1.0, int8=1024, gb_per_s=1e9, shared=100 << 10)
LOOP = gpu_model.Loop({0: 100.0, 1: 150.0, 2: 150.0}, border=80.0, end=(1000.0, 400.0), registers=100)


@pytest.fixture(scope="module")
def program() -> Program:
    sys.path.insert(0, str(ROOT / "tests" / "engines" / "cpu"))
    try:
        from cpu_networks import Network, quantized
    finally:
        sys.path.pop(0)
    net = Network(3, 9, 9)
    return quantized(net.done(net.head(net.conv(net.conv(net.conv("x", 16), 48), 72))))


@pytest.mark.parametrize(("kernel", "columns"), [("conv_unsigned", 64), ("conv_wide_unsigned", 128)])
@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_a_step_does_what_the_shape_of_a_block_asks_for(architecture: str, kernel: str, columns: int) -> None:
    """Each as often as it runs: products, fragments, copies of 16 bytes, extraction of two values at once."""
    if compilation.compiler_missing():
        pytest.skip(f"THE CUDA KERNELS ARE NOT COMPILED: {compilation.compiler_missing()}")
    try:
        gpu_model.disassembler()
    except StopIteration:
        pytest.skip("NO NVDISASM: the instructions are not looked at; pip install nvidia-cuda-nvdisasm")
    native, threads = architecture == "sm_86", 2 * columns
    for kind, borders, fours in ((0, 0, 0), (1, 0, 1), (1, 1, 1)):
        found, end = gpu_model.counted(architecture, kind, borders, fours, kernel)
        nibbles = kind == 1 and native  # activations in half bytes
        assert found["IMMA"] == 32 * 32 * DEPTH // (16 * 8 * (64 if nibbles else 32))
        assert found["LDSM"] == 32 * DEPTH // (512 * (2 if nibbles else 1))
        assert found["LDGSTS"] == columns * DEPTH // (16 * threads * (2 if kind else 1))
        assert found["STS"] == (1 if nibbles else 128 // columns)  # of two chunks of half bytes, one store
        assert found["HFMA2"] == (ROWS * DEPTH // (2 * threads) if kind else 0)
        assert found["BAR"] == 1 and end > 32 * 10 / (2 if fours else 1)
    with_border, without = (gpu_model.counted(architecture, 1, borders, 1, kernel)[0].total() for borders in (1, 0))
    border = with_border - without
    assert border > 2 * 32 * 32 // 32  # a shift and a sum for each accumulator of a lane


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_the_loops_of_attention_are_found(architecture: str) -> None:
    if compilation.compiler_missing():
        pytest.skip(f"THE CUDA KERNELS ARE NOT COMPILED: {compilation.compiler_missing()}")
    try:
        gpu_model.disassembler()
    except StopIteration:
        pytest.skip("NO NVDISASM: the instructions are not looked at; pip install nvidia-cuda-nvdisasm")
    found = gpu_model.attention(architecture)
    assert found.tile > 8 + 8 + 4 * 2  # products, words and fragments of the two halves
    assert found.score > 8 + 9 + 6 and found.term > 1 and found.write > 6  # the exponential's products and sums, and more
    taken = gpu_model.kernels(architecture)
    assert taken["conv_wide_unsigned"]["registers"] <= 128 and taken["conv_wide_unsigned"]["threads"] == 256
    assert {own["stack_bytes"] for own in taken.values()} == {0}


def test_the_time_of_attention() -> None:
    """By hand: 20 blocks on 10 multiprocessors, 197 keys in four tiles and 13 rounds of 16 lanes, one term."""
    counts = gpu_model.Attention(tile=200.0, score=50.0, term=60.0, write=30.0)
    args = AttentionArgs(padded=256, keys=197, depth=64, width=80, n_terms=1)
    cycles = 4 * (1 + 2) * 200 + 2 * 16 * 30 + 4 * 13 * (50 + 60)
    launch = Launch("attention_rows32", (5, 1, 4), args)
    assert gpu_model._attention(launch, counts, CARD) == pytest.approx(2 * cycles / 1e9)


def test_modelled_steps_are_those_that_run(program: Program) -> None:
    """Blocks times steps times products of a step, from the tables that the model reads: as many as the emulator counts."""
    if find_compiler() is None:
        pytest.skip("NO C++ COMPILER: the kernels of the CUDA engine are not emulated")
    device = EmulatedDevice(build(ROOT / "build" / "emulation", True), True)
    engine = CudaEngine(program, device=device)
    compiled = Compiler(program, True).run()
    compiled.pool.span = Span(4096, compiled.pool.size)
    for index, ratio in enumerate(program.ratios):
        modelled = 0
        for step in compiled.steps:
            launch = step.launch(gpu_model.Frame(compiled, 3, index, device.multiprocessors))  # type: ignore[arg-type]
            assert launch is not None and launch.kernel.startswith(("conv", "pool", "pointwise"))
            if launch.kernel.startswith("conv"):
                table = compiled.pool.arrays[gpu_model._table(compiled, launch.arguments.steps.data)]
                per_step = np.where(table[:, 0] == 1, 8, 8 * table[:, 1])  # a half step of nibbles has smaller products
                modelled += int(np.prod(launch.grid)) * (launch.threads // 32) * int(per_step.sum())
        before = device.products
        engine.run(np.zeros((3, 3, 9, 9), np.float32), ratio)
        assert device.products - before == modelled > 0, ratio


def test_the_time_of_a_layer() -> None:
    """By hand: 25 blocks on 10 multiprocessors; four fit each, of which three are there, so loads cost a third of LATENCY."""
    assert gpu_model.LATENCY == 600.0
    steps = np.array([[0, 2, 0, -1], [1, 2, 0, -1], [1, 1, 0, 5]])
    # tensor cores: 256, 128, 64 cycles; CUDA cores: 100, 150, 150 + 80; loads: 200 each
    cycles = 1000 + 256 + 200 + 230
    assert gpu_model._layer(steps, LOOP, CARD, 25, 1, 0) == pytest.approx(3 * cycles / 1e9)
    many = 1000 + 256 + 150 + 230  # 60 blocks: four are resident, by registers; loads cost 150
    assert gpu_model._layer(steps, LOOP, CARD, 60, 1, 0) == pytest.approx(6 * many / 1e9)
    assert gpu_model._layer(steps, LOOP, CARD, 60, 1, 1) == pytest.approx(6 * (many - 600) / 1e9)  # results four at a time
    unpacked = gpu_model.Card("card", "sm_90", 10, 1.0, 1024, 1e9, 100 << 10)  # 4 bits are no faster there
    assert gpu_model._layer(steps, LOOP, unpacked, 60, 1, 0) == pytest.approx(6 * (1000 + 256 + 256 + 230) / 1e9)


def test_it_says_model_and_whose_figures_stand_beside(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(compilation, "compiler_missing", lambda: "")
    monkeypatch.setattr(gpu_model, "loops", lambda architecture, kernel: LOOP)
    save_program(program, gpu_model.prepared("small", tmp_path)[0])
    monkeypatch.setattr(gpu_model, "kernels", lambda architecture: {"conv": dict.fromkeys(
        ("threads", "registers", "shared_bytes", "stack_bytes"), 0)})  # fmt: skip
    gpu_model.main(["--networks", "small,none", "--batch", "2", "--cache", str(tmp_path), "--results", str(tmp_path)])
    printed = capsys.readouterr()
    assert "none: left out: not prepared" in printed.err
    flat = " ".join(printed.out.split())
    assert "MODELLED, NOT MEASURED" in flat and "A6000 (sm_86)" in flat
    assert "the paper's own kernels, measured by its authors on an A6000, batch 16: 12.24 / 10.17 / 8.67 ms" in flat
    written = (tmp_path / "gpu_model.json").read_text()
    assert "nothing was measured" in written and "12.24 / 10.17 / 8.67" in written and written.count('"card"') == 4
