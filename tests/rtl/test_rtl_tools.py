"""The Verilog in Verilator, and proofs by Yosys. Skipped, loudly, where the tools are missing."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from npu_cases import random_case, run_case

pytest.importorskip("amaranth", reason="NO AMARANTH: pip install bitdial[npu]; the NPU's hardware is not tested")
from rtl.tools import verilator, yosys
from rtl.verilate import Verilated, build

from bitdial.engines.npu.cycles import job_cycles
from bitdial.engines.npu.plan import Design, Geometry
from bitdial.quantization.instructions import Window
from rtl import formal

needs_yosys = pytest.mark.skipif(not yosys(), reason="NO YOSYS: pip install bitdial[npu]; nothing is proved")
needs_verilator = pytest.mark.skipif(
    not (verilator() and yosys()), reason="NO VERILATOR (with perl, make, c++) or no Yosys: pip install bitdial[npu]"
)


@needs_yosys
@pytest.mark.parametrize("part", ["foot", "extract"])
def test_proved_for_all_inputs(part: str) -> None:
    assert formal.prove(part)


@needs_yosys
def test_a_wrong_specification_is_not_proved() -> None:
    assert not formal.prove("foot", formal.FOOT.replace("low ?", "!low ?"))
    assert not formal.prove("extract", formal.EXTRACT.replace("&& floor[0]", ""))


@needs_yosys
def test_the_element_with_its_registers_is_proved() -> None:
    """From any state; not with a weight that is in use as soon as it is there."""
    assert formal.prove_element()
    assert not formal.prove_element(formal.ELEMENT.replace("weight <= waiting", "weight <= w_i"))


@needs_yosys
@pytest.mark.slow
def test_the_product_is_proved_for_all_inputs() -> None:
    """Some 74 s: two different 8x8 multipliers are compared."""
    assert formal.prove("product")


def test_registers_are_printed_from_the_source() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rtl", "registers"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    docs = (Path(__file__).parent.parent.parent / "docs" / "npu.md").read_text()
    assert done.stdout.strip() in docs, "docs/npu.md: put the output of python -m rtl registers into it"


def test_without_yosys_there_is_no_verilog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rtl.verilog.yosys", lambda: "")
    monkeypatch.setattr(sys, "argv", ["rtl", "verilog", "-o", str(tmp_path / "npu.v"), "--rows", "4", "--columns", "4"])
    with pytest.raises(SystemExit, match=r"error: no Yosys here.*pip install bitdial\[npu\]"):
        runpy.run_module("rtl", run_name="__main__")
    assert not (tmp_path / "npu.v").exists()


@needs_verilator
@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 16])
def test_layers_in_verilator(size: int, tmp_path: Path) -> None:
    """Over the register bus; sums and cycles, as in Amaranth's simulator."""
    design = Design(size, size, words=256, activations=1024, weights=4096, shifts=64, sums=1024)
    shapes = [
        Geometry(37, 11, (5, 4), Window((3, 1), (1, 1), (1, 0), (1, 1))),
        Geometry(40, 35, (7, 6), Window((3, 3), (2, 1), (1, 2), (1, 2))),
        Geometry.linear(70, 20, 3),
    ]
    with Verilated(build(design, tmp_path, verilator()), design) as unit:
        for seed, geometry in enumerate(shapes):
            for signed in (False, True):
                case = random_case(np.random.default_rng(seed), geometry, signed, 2 * size)
                plan = case.plan(design)
                for ratio in range(3):
                    sums, cycles = run_case(unit, case, plan, design, ratio)
                    np.testing.assert_array_equal(sums, case.expected(ratio))
                    assert cycles == [job_cycles(plan, job, design, plan.low[ratio], True) for job in plan.jobs]


@needs_verilator
@pytest.mark.slow
def test_trained_resnet20_as_a_whole_in_verilator(data_folder: Path, tmp_path: Path) -> None:
    """A test image through all layers of the trained network at 0, 50 and 100 %: the reference engine's accumulators, the model's
    cycles."""
    from test_rtl_artifact import simulate_layer

    from bitdial.engines.base import create_engine
    from bitdial.engines.npu.cycles import layer_cycles
    from bitdial.engines.npu.engine import NpuEngine, accumulators
    from bitdial.engines.npu.lowering import lower
    from bitdial.graph.capture import capture
    from bitdial.pipeline import prepare, quantize_prepared
    from bitdial.quantization.config import QuantizeConfig
    from bitdial.zoo.datasets import load_dataset
    from bitdial.zoo.registry import build_model

    weights = data_folder / "weights" / "resnet20_cifar10_jpeg.safetensors"
    if not weights.is_file():
        pytest.skip(f"TRAINED WEIGHTS MISSING: {weights} does not exist; complete the data folder (BITDIAL_DATA)")
    images = torch.from_numpy(load_dataset(data_folder / "cifar10", "train").calibration_subset(64, 0).array())
    shown = load_dataset(data_folder / "cifar10", "test").shuffled(0).head(1).array()
    config = QuantizeConfig(
        target="npu", ratios=(0.0, 0.5, 1.0), selector="greedy", calibration_images=64, search_images=64, group_size=32
    )
    network = capture(build_model("zoo:resnet20", weights).eval(), (images[:2],))
    program = quantize_prepared(prepare(network, [images], config), config)
    engine = create_engine(program, "npu", rows=16, columns=16)
    assert isinstance(engine, NpuEngine)
    design = dataclasses.replace(engine.machine.design, words=256, weights=8192)
    engine.machine, engine.lowered = dataclasses.replace(engine.machine, design=design), lower(program, design)
    layers = 0
    with Verilated(build(design, tmp_path, verilator()), design) as unit:
        for index, ratio in enumerate(program.ratios):
            for name, (x, expected) in accumulators(engine, shown, ratio).items():
                plan = engine.lowered.plans[name]
                sums, cycles = simulate_layer(unit, engine, name, x[0], index)
                want = expected[0] if expected.ndim == 4 else expected[0][:, None, None]
                np.testing.assert_array_equal(sums, want, err_msg=f"{name} at {ratio}")
                assert cycles == layer_cycles(plan, design, plan.low[index])
                layers += 1
    assert layers == 3 * len(program.layers) >= 60 and not engine.lowered.host
