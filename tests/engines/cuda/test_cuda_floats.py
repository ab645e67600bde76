"""Float operators, integers, masks and look-ups on the emulated device: the cases of the CPU engine's tests, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_cpu_floats as cases
from cpu_networks import outputs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_floats import Array, Floats, numbers, of, same

from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import InputError
from bitdial.graph.ir import TensorType
from bitdial.quantization.program import Program

CASES = [
    "arithmetic_broadcasts", "moved_operands_are_read_where_they_lie", "limits_keep_nan_and_negative_zero_multiplies",
    "chains_of_moves", "layer_norm", "sums_means_and_norms", "long_sums_on_every_axis", "masks", "class_token_and_positions",
    "values_of_any_type_and_order_cross_the_border",
]  # fmt: skip
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def device(make_device: Any) -> EmulatedDevice:
    made: EmulatedDevice = make_device(False)
    return made


@pytest.mark.parametrize("case", CASES)
def test_cases_of_the_cpu_engine(monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice, case: str) -> None:
    def check(program: Program, *inputs: Array, threads: int = 1, elsewhere: int = 0) -> list[Array]:
        batch: Any = list(inputs) if len(inputs) > 1 else inputs[0]
        want = outputs_of(ReferenceEngine(program, check_finite=False).run(batch))
        engine = CudaEngine(program, device=device, check_finite=False)
        assert len(engine.compiled.reasons) == elsewhere, engine.compiled.reasons
        for got, exact in zip(outputs_of(engine.run(batch)), want, strict=True):
            assert same(got, exact), f"{int((got != exact).sum())} of {exact.size} values differ"
        engine.close()
        return want

    monkeypatch.setattr(cases, "check", check)
    getattr(cases, f"test_{case}")()


@few
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 12), st.sampled_from(["int64", "int32"]), st.booleans(),
       st.integers(0, 10**6))  # fmt: skip
def test_look_ups(
    device: EmulatedDevice, rows: int, width: int, length: int, dtype: str, computed: bool, seed: int
) -> None:
    """By numbers of the batch, moved, and by numbers made of it: what lies outside of the table is refused, by name."""
    kind = of((1, length), 0, dtype)
    b = Floats(ids=kind)
    table = b.constant(numbers(seed, TensorType((rows, width))))
    places = b.constant(numbers(seed + 1, TensorType((length, width))))
    ids = b.op("roll", ["ids"], shifts=[1], axes=[1])
    if computed:
        wide = b.aten("to.dtype", kind.shape, ids, {"dtype": "int64"})
        ids = b.aten("sub.Scalar", kind.shape, b.aten("add.Scalar", kind.shape, wide, 3), 3)
    y = b.aten("embedding.default", (*kind.shape, width), table, ids)
    program = b.done(b.op("add", [y, places]))
    engine, reference = CudaEngine(program, device=device), ReferenceEngine(program)
    x = np.random.default_rng(seed).integers(0, rows, (3, length)).astype(dtype)
    assert same(engine.run(x), reference.run(x))
    for wrong in (-1, rows, 2**31 - 5):
        bad = x.copy()
        bad[-1, -1] = wrong
        for own in (engine, reference):
            with pytest.raises(InputError, match=f"'{y}' looks up row {wrong} of {rows}"):
                own.run(bad)
        assert same(engine.run(x), reference.run(x))
    engine.close()


def test_integers_wrap_and_choices_keep_nan(device: EmulatedDevice) -> None:
    """What the network's own arithmetic does at the ends: sums beyond 64 bits, the greatest of numbers that are none."""
    kind, real = of((1, 6), 0, "int64"), of((1, 6))
    b = Floats(i=kind, x=real, y=real)
    outs = [
        b.aten("add.Tensor", kind.shape, "i", "i"), b.aten("mul.Tensor", kind.shape, "i", "i"),
        b.aten("maximum.default", real.shape, "x", "y"), b.aten("minimum.default", real.shape, "x", "y"),
        b.aten("maximum.default", kind.shape, "i", b.aten("sub.Scalar", kind.shape, "i", 2)),
        b.aten("where.self", real.shape, b.aten("ge.Scalar", kind.shape, "i", 0), "x", "y"),
        b.aten("to.dtype", kind.shape, "x", {"dtype": "bool"}), b.aten("bitwise_not.default", kind.shape, b.aten(
            "logical_xor.default", kind.shape, "i", "x")),
    ]  # fmt: skip
    program = b.done(*outs)
    i = np.array([[2**63 - 1, -(2**63), 0, 1, -1, 2**40]])
    x = np.array([[np.nan, 1, -np.inf, 0, 3, np.nan]], np.float32)
    y = np.array([[1, np.nan, np.inf, -0.0, 2, np.nan]], np.float32)
    engine = CudaEngine(program, device=device, check_finite=False)
    want = outputs_of(ReferenceEngine(program, check_finite=False).run([i, x, y]))
    for k, (got, exact) in enumerate(zip(outputs_of(engine.run([i, x, y])), want, strict=True)):
        assert same(got, exact), (k, got, exact)
