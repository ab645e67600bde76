"""Small transformers whole on the emulated device: the reference engine's bits at every ratio."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cpu_networks import outputs_of, same_bits
from transformer_networks import transformer

from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.engines.reference.engine import ReferenceEngine


@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow), "convnext", "rotary", "encoder",
                                  "character"])  # fmt: skip
def test_transformers_are_bit_identical_to_the_reference(device: EmulatedDevice, name: str) -> None:
    program, inputs = transformer(name)
    reference, engine = ReferenceEngine(program), CudaEngine(program, device=device)
    own = [a[:2] for a in inputs]
    x: Any = own if len(own) > 1 else own[0]
    for ratio in program.ratios:
        for got, want in zip(outputs_of(engine.run(x, ratio)), outputs_of(reference.run(x, ratio)), strict=True):
            assert same_bits(got, want), ratio


@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_dynamic_extraction(make_device: Any, name: str) -> None:
    """Windows folded into the batch belong to one sample."""
    static, inputs = transformer(name)
    program = dataclasses.replace(static, extraction="dynamic")
    engine, x = CudaEngine(program, device=make_device(True)), inputs[0][:2]
    assert same_bits(engine.run(x, 1.0), ReferenceEngine(program).run(x, 1.0))
