"""Small transformers: the reference engine's bits at every ratio, on every instruction set, all of it in the extension."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_networks import outputs_of, same_bits
from transformer_networks import NETWORKS, Inputs, transformer

import bitdial
from bitdial.artifact import save_program
from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.quantization.program import Program

ISAS = native.isas() if not native.missing() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled extension is not built")


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[str, Program, Inputs]:
    return (request.param, *transformer(request.param))


def batch_of(inputs: Inputs, n: int) -> Any:
    own = [a[:n] for a in inputs]
    return own if len(own) > 1 else own[0]


def test_every_instruction_set_gives_the_reference_engines_bits(network: tuple[str, Program, Inputs]) -> None:
    name, program, inputs = network
    reference = ReferenceEngine(program)
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, threads=2 if isa == ISAS[0] else 1, kernels="fixed")
        assert not engine.compiled.reasons
        for ratio in program.ratios:
            for n in (1, 5):
                want = outputs_of(reference.run(batch_of(inputs, n), ratio))
                for got, exact in zip(outputs_of(engine.run(batch_of(inputs, n), ratio)), want, strict=True):
                    assert same_bits(got, exact), f"{name}, {isa}, ratio {ratio}, batch {n}"


def test_dynamic_extraction(network: tuple[str, Program, Inputs]) -> None:
    """Shifts by sample, wherever the batch lies in a value and however many windows of it there are."""
    name, static, inputs = network
    program = dataclasses.replace(static, extraction="dynamic")
    reference, batch = ReferenceEngine(program), batch_of(inputs, 3)
    want = outputs_of(reference.run(batch, 1.0))
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, kernels="fixed")
        assert not engine.compiled.reasons
        for got, exact in zip(outputs_of(engine.run(batch, 1.0)), want, strict=True):
            assert same_bits(got, exact), f"{name}, {isa}"


WITHOUT_TORCH = """
    import sys

    sys.modules["torch"] = None
    import numpy as np
    import bitdial

    arrays = np.load(sys.argv[2])
    model = bitdial.load(sys.argv[1], engine="cpu", kernels="fixed")
    inputs = [arrays[f"x{i}"] for i in range(len(arrays.files) - 1)]
    assert (model(inputs if len(inputs) > 1 else inputs[0]) == arrays["y"]).all()
    assert sys.modules["torch"] is None
"""


@pytest.mark.parametrize("network", ["swin", "encoder"], indirect=True)  # they have all operators
def test_without_torch(network: tuple[str, Program, Inputs], tmp_path: Path) -> None:
    """The artifact loads and runs where torch is not installed."""
    _, program, inputs = network
    save_program(program, tmp_path / "net.bitdial")
    want = outputs_of(ReferenceEngine(program).run(batch_of(inputs, 5)))[0]
    np.savez(tmp_path / "arrays.npz", y=want, **{f"x{i}": a for i, a in enumerate(inputs)})
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(bitdial.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), str(tmp_path / "net.bitdial"), str(tmp_path / "arrays.npz")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
