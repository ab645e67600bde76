"""Bad requests to the CPU engine get typed errors that name the thing and the remedy, and leave the engine usable."""

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
import torch
from cpu_networks import QUICK, Floats, Network, quantized, samples

import bitdial
from bitdial.engines.base import available_engines, create_engine
from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.errors import EngineError, InputError, RatioError
from bitdial.quantization.program import Program

CHEAP = QUICK.updated(bias_correction=False, low_weights="derived")


@pytest.fixture(scope="module")
def program() -> Program:
    b = Network(3, 6, 5, seed=1)
    return quantized(b.done(b.head(b.conv(b.conv("x", 16), 16))), CHEAP)


@pytest.fixture(scope="module")
def crossing() -> Program:
    """With a float operator between compiled steps."""
    b = Network(3, 6, 5, seed=2)
    x = b.elsewhere(b.conv("x", 16))
    return quantized(b.done(b.head(b.conv(x, 16))), CHEAP)


@pytest.fixture
def engine(program: Program) -> CpuEngine:
    return CpuEngine(program, kernels="fixed")


@pytest.fixture
def x(program: Program) -> Floats:
    return samples(program.graph, 2)


# ---- loading ---------------------------------------------------------------------------------------------------------------


def test_instruction_sets(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    known = native.isas()
    with pytest.raises(EngineError, match=r"instruction set 'avx9' does not run here: choose one of \[.*'portable'"):
        CpuEngine(program, isa="avx9")
    monkeypatch.setenv("BITDIAL_CPU_ISA", "neon9")
    with pytest.raises(EngineError, match=r"'neon9' \(from BITDIAL_CPU_ISA\) does not run here"):
        CpuEngine(program)
    assert CpuEngine(program, isa=known[-1]).isa == known[-1]  # an argument goes before the environment
    monkeypatch.setenv("BITDIAL_CPU_ISA", "portable")
    assert CpuEngine(program).isa == "portable"
    monkeypatch.setenv("BITDIAL_CPU_ISA", "")
    assert CpuEngine(program).isa == known[0]
    with pytest.raises(ValueError, match="'avx9' is not supported here"):
        native.extension().Program("avx9", 1, [0.0])


def test_options(program: Program) -> None:
    with pytest.raises(EngineError, match=r"the cpu engine has no option \['turbo'\]; it takes .*'threads'"):
        create_engine(program, "cpu", turbo=True)
    with pytest.raises(EngineError, match=r"unknown engine 'gpu': choose one of \['cpu'"):
        create_engine(program, "gpu")


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", True, None])
def test_threads(program: Program, threads: Any) -> None:
    with pytest.raises(EngineError, match=r"threads must be a whole number in 1\.\.1024, got "):
        CpuEngine(program, threads=threads)


@pytest.mark.parametrize("hint", [0, -3, 2.0, True, "1"])
def test_batch_hint(program: Program, hint: Any) -> None:
    with pytest.raises(EngineError, match="batch_hint must be a positive whole number"):
        CpuEngine(program, batch_hint=hint)


@pytest.mark.parametrize("kernels", ["fast", "", "Direct", None, 3])
def test_kernels(program: Program, kernels: Any) -> None:
    with pytest.raises(EngineError, match=r"kernels '.*' is unknown: choose one of \['auto', 'fixed', 'direct', 'fip'"):
        CpuEngine(program, kernels=kernels)


@pytest.mark.parametrize("memory", ["tiny", "", None])
def test_memory(program: Program, memory: Any) -> None:
    with pytest.raises(EngineError, match=r"memory '.*' is unknown: choose one of \['fast', 'small'\]"):
        CpuEngine(program, memory=memory)


# ---- without the extension -------------------------------------------------------------------------------------------------


def test_engines_without_the_extension(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.missing() != "" or available_engines()["cpu"] == ""
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_problem", "No module named '_native'", raising=False)
    why = available_engines()["cpu"]
    assert "compiled extension is not there" in why and "install a C++ compiler" in why and "No module named" in why
    with pytest.raises(EngineError, match=r"engine 'cpu' cannot run: the compiled extension is not there"):
        create_engine(program, "cpu")
    with pytest.raises(EngineError, match="install a C\\+\\+ compiler"):
        CpuEngine(program)
    with pytest.raises(EngineError, match="cannot run"):
        native.isas()


def test_importing_without_the_extension(tmp_path: Path) -> None:
    """The package imports, says what is missing, and the reference engine still runs."""
    script = tmp_path / "missing.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            sys.modules["bitdial.engines.cpu._native"] = None
            import bitdial
            from bitdial.engines.base import available_engines
            engines = available_engines()
            assert engines["reference"] == "", engines
            print(engines["cpu"])
        """)
    )
    paths = [
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        str(Path(bitdial.__file__).parent.parent),
    ]
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compiled extension is not there" in done.stdout and "C++ compiler" in done.stdout


# ---- running ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 5), (2, 4, 6, 5), (2, 3, 5, 6), (0, 3, 6, 5), (2, 3, 6, 5, 1), ()])
def test_shapes(engine: CpuEngine, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"input 'x' has shape \[.*\], the model takes float32\[N, 3, 6, 5\].*resize or crop"
    ):
        engine.run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int64, np.bool_, np.complex64])
def test_dtypes(engine: CpuEngine, dtype: Any) -> None:
    with pytest.raises(InputError, match=r"input 'x' is \w+, the model takes float32: convert it first"):
        engine.run(np.zeros((1, 3, 6, 5), dtype))
    if dtype not in (np.bool_,):
        with pytest.raises(InputError, match="the model takes float32"):
            engine.run(torch.from_numpy(np.zeros((1, 3, 6, 5), dtype)))


def test_things_that_are_no_arrays(engine: CpuEngine, x: Floats) -> None:
    for thing in (x.tolist(), "x", None, 3.0):
        with pytest.raises(InputError, match="pass a torch tensor or a NumPy array"):
            engine.run(thing)
    with pytest.raises(InputError, match=r"a dict without \['x'\]"):
        engine.run({"y": x})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["compiled", "crossing"])
def test_values_that_are_not_finite(program: Program, crossing: Program, x: Floats, value: float, where: str) -> None:
    own = program if where == "compiled" else crossing
    engine = CpuEngine(own, kernels="fixed", threads=2)
    good = engine.run(x, 0.5)
    bad = x.copy()
    bad[1, 2, 3, 4] = value
    with pytest.raises(InputError, match="NaN or infinite values"):
        engine.run(bad)
    assert (engine.run(x, 0.5) == good).all()  # nothing is left behind
    trusting = CpuEngine(own, kernels="fixed", check_finite=False)
    result = trusting.run(bad, 0.5)
    assert result.shape == good.shape
    if where == "compiled":  # the other sample is not touched by it
        assert (result[0] == good[0]).all()


def test_the_number_of_bad_values_is_told(engine: CpuEngine, x: Floats) -> None:
    bad = x.copy()
    bad[0, 0, 0, :3] = np.nan
    bad[1, 1, 1, 1] = -np.inf
    with pytest.raises(InputError, match="the batch holds 4 NaN or infinite values"):
        engine.run(bad)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), "half", True, False, None, [0.5], 1 + 0j])
def test_ratios(engine: CpuEngine, x: Floats, ratio: Any) -> None:
    engine.set_ratio(0.5)
    with pytest.raises(RatioError, match=r"ratio|0\.\.1"):
        engine.set_ratio(ratio)
    if ratio is not None:
        with pytest.raises(RatioError, match=r"ratio|0\.\.1"):
            engine.run(x, ratio)
    assert engine.ratio == 0.5


def test_ratios_below_a_band(program: Program) -> None:
    """A model saved for a band of ratios has no smaller ones."""
    layers = {n: dataclasses.replace(v, low=v.low[2:], bias=v.bias[2:]) for n, v in program.layers.items()}
    band = dataclasses.replace(program.with_layers(layers), ratios=program.ratios[2:])
    engine = CpuEngine(band, kernels="fixed")
    assert engine.ratio == 0.5 and engine.set_ratio(0.8) == 0.75
    with pytest.raises(RatioError, match=r"0\.25 is below this model's smallest, 0\.5: it was saved for a band"):
        engine.set_ratio(0.25)
    whole = CpuEngine(program, kernels="fixed")
    x = samples(program.graph, 2)
    for ratio in band.ratios:
        assert (engine.run(x, ratio) == whole.run(x, ratio)).all()


def test_several_inputs() -> None:
    """A network with two inputs takes a sequence or a dict, and says which one is wrong."""
    b = Network(3, 4, 4, seed=3)
    b.graph.inputs.append("z")
    b.graph.types["z"] = b.graph.types["x"]
    graph = b.done(b.head(b.node("add", [b.conv("x", 8), b.conv("z", 8)])))
    from bitdial.pipeline import prepare, quantize_prepared

    data = [torch.from_numpy(samples(graph, 12, s)) for s in (0, 1)]
    program = quantize_prepared(prepare(graph, data, CHEAP), CHEAP)
    engine = CpuEngine(program, kernels="fixed")
    a, c = samples(graph, 3, 2), samples(graph, 3, 3)
    want = create_engine(program, "reference").run([a, c], 1.0)
    for batch in ([a, c], (a, c), {"z": c, "x": a}):
        assert (engine.run(batch, 1.0) == np.asarray(want)).all()
    with pytest.raises(InputError, match=r"takes 2 inputs \['x', 'z'\]"):
        engine.run(a)
    with pytest.raises(InputError, match=r"takes 2 inputs"):
        engine.run([a])
    with pytest.raises(InputError, match=r"a dict without \['z'\]"):
        engine.run({"x": a})
    with pytest.raises(InputError, match="input 'z' has shape"):
        engine.run([a, c[:2]])  # batch sizes differ


# ---- the extension itself --------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
def test_the_extension_checks_sizes(engine: CpuEngine, x: Floats) -> None:
    """Nothing that Python hands over can make the compiled code write outside of an array."""
    own = engine.native
    tensor = engine.compiled.buffers["x"].tensor
    out = engine.compiled.buffers[engine.program.graph.outputs[0]].tensor
    y = np.empty(engine.shape(engine.program.graph.outputs[0], 2), np.float32)
    assert own.run([(tensor, x), (out, y)], 2, 0) == 0
    for arrays in (
        [(tensor, x[:1]), (out, y)],
        [(tensor, x), (out, y[:1])],
        [(tensor, x), (out, np.empty(0, np.float32))],
    ):
        with pytest.raises(ValueError, match="an array has not the size of its tensor"):
            own.run(arrays, 2, 0)
    with pytest.raises(ValueError, match="no compiled layer is named 'nothing'"):
        own.methods("nothing")
    with pytest.raises(ValueError, match="no such method"):
        own.choose(engine.compiled_layers()[0], 0, 17, 0)
    with pytest.raises(ValueError, match="no such ratio"):
        own.choose(engine.compiled_layers()[0], 99, 0, 0)
