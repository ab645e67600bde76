"""Small transformers: the reference engine's bits at every ratio, on every instruction set, all of it in the extension."""

from __future__ import annotations

from typing import Any

import pytest
from cpu_networks import outputs_of, same_bits
from transformer_networks import NETWORKS, Inputs, transformer

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
        elsewhere = {program.instruction(step).operation for step in engine.compiled.reasons}
        assert elsewhere <= {"matmul", "softmax", "aten._safe_softmax.default"}
        for ratio in program.ratios:
            for n in (1, 5):
                want = outputs_of(reference.run(batch_of(inputs, n), ratio))
                for got, exact in zip(outputs_of(engine.run(batch_of(inputs, n), ratio)), want, strict=True):
                    assert same_bits(got, exact), f"{name}, {isa}, ratio {ratio}, batch {n}"
