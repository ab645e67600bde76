"""Whole networks on the CPU engine: bit for bit the reference engine's outputs, whatever the kernels, threads and batch."""

from __future__ import annotations

import copy
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
from cpu_networks import (
    NETWORKS,
    QUICK,
    Floats,
    Network,
    check_engine,
    networks,
    outputs_of,
    quantized,
    reference_outputs,
    regnet,
    same_bits,
    samples,
    with_low_plane,
)
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import bitdial
from bitdial.artifact import load_program, save_program
from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import CalibrationError
from bitdial.graph.ir import Graph
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.program import Program

ISAS = native.isas() if not native.missing() else []
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)
METHODS = ["direct", "fip", "winograd", "winograd_fip", "narrow"]
Quantized = tuple[Program, Floats, list[list[Floats]]]


@pytest.fixture(scope="module")
def known() -> dict[Any, Quantized]:
    """Networks quantized so far: name -> (program, five samples, reference outputs per ratio)."""
    return {}


def network(known: dict[Any, Quantized], name: str) -> Quantized:
    if name not in known:
        program = quantized(NETWORKS[name]())
        x = samples(program.graph, 5)
        known[name] = program, x, reference_outputs(program, x)
    return known[name]


# ---- bit for bit -----------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("name", list(NETWORKS))
def test_dynamic_extraction(known: dict[str, Quantized], name: str, isa: str) -> None:
    static, x, unlike = network(known, name)
    program = dataclasses.replace(static, extraction="dynamic")
    if (name, "dynamic") not in known:
        known[name, "dynamic"] = program, x, reference_outputs(program, x)
    expected = known[name, "dynamic"][2]
    assert not same_bits(expected[-1][0], unlike[-1][0])
    for kernels in ("fixed", "direct"):
        engine = CpuEngine(program, isa=isa, threads=2 if kernels == "fixed" else 1, kernels=kernels)
        assert engine.compiled.reasons == {}
        check_engine(engine, expected, x, (1, 5))


@pytest.mark.sanitize
@EVERY_ISA
@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_are_bit_identical_to_the_reference(known: dict[str, Quantized], name: str, isa: str) -> None:
    program, x, expected = network(known, name)
    # the dial moves these networks, and with them the test
    assert not same_bits(expected[0][0], expected[-1][0])
    if isa == "portable" or "BITDIAL_SANITIZED_NATIVE" in os.environ:
        # plain C++ (the same bodies), or every step checked: a tenth of the speed
        for kernels, threads, memory in [
            *((m, 1, "fast") for m in METHODS),
            ("fixed", 2, "fast"),
            ("fixed", 1, "small"),
        ]:
            engine = CpuEngine(program, isa=isa, threads=threads, kernels=kernels, memory=memory)
            check_engine(engine, expected, x, (2,))
        return
    for kernels in ("fixed", "auto", *METHODS):
        for threads in (1, 2):
            engine = CpuEngine(program, isa=isa, threads=threads, kernels=kernels)
            assert engine.compiled.reasons == {}
            check_engine(engine, expected, x)
    for kernels in ("fixed", "direct"):
        check_engine(CpuEngine(program, isa=isa, kernels=kernels, memory="small", batch_hint=3), expected, x)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(graph=networks(), granularity=st.sampled_from(["group", "group", "output", "block"]), data=st.data())
def test_random_networks_are_bit_identical(graph: Graph, granularity: Any, data: st.DataObject) -> None:
    run_random_network(graph, granularity, data)


@pytest.mark.slow
@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(graph=networks(), granularity=st.sampled_from(["group", "output", "block"]), data=st.data())
def test_random_networks_are_bit_identical_at_length(graph: Graph, granularity: Any, data: st.DataObject) -> None:
    run_random_network(graph, granularity, data)


def run_random_network(graph: Graph, granularity: Any, data: st.DataObject) -> None:
    config = QUICK.updated(
        weight_granularity=granularity, bias_correction=False, low_weights="derived",
        low_bits=data.draw(st.sampled_from([4, 4, 5, 6, 2])), lower_first_last=data.draw(st.booleans()),
        sort_channels=data.draw(st.booleans()),
        group_size=data.draw(st.sampled_from([4, 8, 16])),
    )  # fmt: skip
    try:
        program = quantized(graph, config)
    except (CalibrationError, IndexError):
        reject()  # networks that the quantizer cannot do are not this engine's matter
    if data.draw(st.booleans()):
        program = with_low_plane(program)
    x = samples(graph, 4)
    expected = reference_outputs(program, x)
    kernels = data.draw(st.sampled_from(["fixed", *METHODS]))
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, threads=data.draw(st.integers(1, 2)), kernels=kernels)
        check_engine(engine, expected, x, (1, 4))


@EVERY_ISA
@pytest.mark.parametrize("name", ["residual", "plain", "grouped"])
def test_stored_low_weights_are_bit_identical_to_the_reference(
    known: dict[str, Quantized], name: str, isa: str
) -> None:
    derived, x, before = network(known, name)
    program = with_low_plane(derived)
    expected = reference_outputs(program, x)
    assert same_bits(expected[0][0], before[0][0]) and not same_bits(expected[-1][0], before[-1][0])
    for kernels in ("fixed", *METHODS):
        check_engine(CpuEngine(program, isa=isa, kernels=kernels), expected, x, (2,))
    for kernels in ("fixed", "fip", "narrow"):
        engine = CpuEngine(program, isa=isa, kernels=kernels, memory="small")
        check_engine(engine, expected, x, (2,))
        assert engine.describe()["engine"]["weight_bytes"]["stored low"] > 0


@pytest.mark.sanitize
@pytest.mark.parametrize("first", [False, True])
def test_convolution_groups_of_a_regnet_go_low_one_by_one(first: bool) -> None:
    """Any subset of the convolution groups is low, the first of them never or always."""
    program = quantized(regnet())
    rng = np.random.default_rng(first)
    grouped = [layer for layer in program.layers.values() if layer.conv_groups > 1]
    assert [layer.conv_groups for layer in grouped] == [7, 32]
    for layer in grouped:
        assert layer.eligible
        layer.low = rng.random(layer.low.shape) < 0.5
        layer.low[:, 0], layer.low[:, -1], layer.low[0] = first, True, False
    x = samples(program.graph, 2)
    expected = reference_outputs(program, x)
    for isa in ISAS:
        for kernels in ("fixed", "winograd", "winograd_fip", "narrow"):
            check_engine(CpuEngine(program, isa=isa, threads=2, kernels=kernels), expected, x, (2,))
        check_engine(CpuEngine(program, isa=isa, kernels="fixed", memory="small"), expected, x, (1,))


def test_more_threads_than_work(known: dict[str, Quantized]) -> None:
    program, x, expected = network(known, "plain")
    check_engine(CpuEngine(program, threads=7, kernels="fixed"), expected, x)


def test_inputs_that_do_not_lie_in_order(known: dict[str, Quantized]) -> None:
    """Strided, transposed and torch inputs give what their contiguous copies give; torch in, torch out."""
    program, x, expected = network(known, "residual")
    engine = CpuEngine(program, kernels="fixed")
    twice = np.repeat(x, 2, axis=0)
    strange = [twice[::2], np.ascontiguousarray(x.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)]
    for own in strange:
        assert not own.flags.c_contiguous and same_bits(engine.run(own, 0.5), expected[2][0])
    tensor = torch.from_numpy(x).to(memory_format=torch.channels_last).requires_grad_()
    result = engine.run(tensor, 0.5)
    assert isinstance(result, torch.Tensor) and same_bits(result.numpy(), expected[2][0])
    assert same_bits(engine.run({"x": x}, 0.5), expected[2][0])
    frozen = x.copy()
    frozen.flags.writeable = False
    assert same_bits(engine.run(frozen, 0.5), expected[2][0]) and same_bits(x, frozen)


def test_linear_layers_over_tokens() -> None:
    """Linear layers contract the last of three axes; widths that are no multiple of anything."""
    b = Network(7, 24, seed=9)
    y = b.linear(b.linear(b.unary("silu", b.linear("x", 43, activation=None)), 33), 5, activation=None)
    program = quantized(b.done(y))
    x = samples(program.graph, 5)
    expected = reference_outputs(program, x)
    for isa in ISAS:
        for kernels in ("fixed", "direct", "fip", "narrow"):
            engine = CpuEngine(program, isa=isa, threads=2, kernels=kernels)
            assert engine.compiled.reasons == {}
            check_engine(engine, expected, x)


def test_unusual_outputs() -> None:
    """One value given out twice, and an input given out as it came: each output is an array of its own."""
    for inputs in (False, True):
        b = Network(3, 6, 6, seed=1)
        y = b.head(b.conv(b.conv("x", 16), 16))
        program = quantized(b.done(y, "x" if inputs else y), QUICK.updated(sort_channels=False))
        x = samples(program.graph, 3)
        engine = CpuEngine(program)
        check_engine(engine, reference_outputs(program, x), x, (1, 3))
        first, second = engine.run(x)
        assert not np.shares_memory(first, second)


def test_outputs_are_the_callers_own(known: dict[str, Quantized]) -> None:
    """What one run returns is not overwritten by the next."""
    program, x, expected = network(known, "grouped")
    engine = CpuEngine(program, kernels="fixed")
    first = engine.run(x, 0.0)
    engine.run(x[::-1], 1.0)
    assert all(same_bits(a, b) for a, b in zip(first, expected[0], strict=True))


def test_a_saved_model_runs_the_same(known: dict[str, Quantized], tmp_path: Path) -> None:
    program, x, expected = network(known, "mobile")
    path = tmp_path / "mobile.bitdial"
    save_program(program, path)
    check_engine(CpuEngine(load_program(path), kernels="fixed"), expected, x)
    model = bitdial.load(path, engine="cpu", kernels="fixed")
    assert same_bits(np.asarray(model(x, ratio=1.0)), expected[-1][0])


def test_the_dial(known: dict[str, Quantized]) -> None:
    program, x, expected = network(known, "residual")
    engine = CpuEngine(program, kernels="fixed")
    assert engine.ratio == 0.0 and engine.ratios == program.ratios
    for asked, given_ in ((1.0, 1.0), (0.3, 0.25), (0.7499, 0.5), (0, 0.0), (np.float64(0.5), 0.5), (True * 1, 1.0)):
        assert engine.set_ratio(asked) == given_ == engine.ratio
        out, ratio = engine.run_with_ratio(x)
        assert ratio == given_ and same_bits(out, expected[program.ratios.index(given_)][0])
    engine.run(x, 0.25)
    assert engine.ratio == 1.0  # a ratio of one call leaves the dial alone


def test_the_small_network_of_the_other_tests(conv_net: Any, helpers: Any) -> None:
    """A torch network with BatchNorm, captured and quantized by the public pipeline."""
    images = helpers.images(16, seed=3)
    config = QUICK.updated(selector="greedy", calibration_images=16, bias_correction=False, low_weights="derived")
    program = quantize_prepared(prepare(conv_net, [images], config), config)
    x = helpers.images(5, seed=4).numpy()
    expected = reference_outputs(program, x)
    for isa in ISAS:
        check_engine(CpuEngine(program, isa=isa, threads=2), expected, x)


# ---- trained networks ------------------------------------------------------------------------------------------------------


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "file"), [("resnet20", "resnet20_cifar10_published"), ("vgg", "vgg_cifar10_jpeg")]
)  # fmt: skip
def test_trained_networks_are_bit_identical_on_real_images(
    data_folder: Path, name: str, file: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from bitdial.zoo.datasets import load_dataset
    from bitdial.zoo.registry import build_model

    weights = data_folder / "weights" / f"{file}.safetensors"
    if not weights.exists():
        pytest.skip(f"DATA MISSING: {weights} does not exist")
    cache = Path(os.environ["BITDIAL_CACHE_DIR"]) / "images"
    images = torch.from_numpy(
        load_dataset(data_folder / "cifar10", "test", cache_dir=cache).shuffled(0).head(64).array()
    )
    config = QUICK.updated(
        group_size=16, calibration_images=8, shift_choice="plain", bias_correction=False, low_weights="derived"
    )  # fmt: skip
    program = quantize_prepared(prepare(build_model(f"zoo:{name}", weights), [images[:8]], config), config)
    x = images.numpy()
    reference = ReferenceEngine(program)
    expected = {r: np.asarray(reference.run(x, r)) for r in program.ratios}
    assert len(set(expected[0.0].argmax(axis=1).tolist())) == 10  # a trained network that still tells classes apart
    for isa in ISAS:
        for kernels in ("fixed", "direct", "fip", "narrow") if isa != "portable" else ("fixed",):
            n = 2 if isa == "portable" else 64 if kernels == "fixed" else 8
            engine = CpuEngine(program, isa=isa, threads=2, kernels=kernels)
            for ratio in program.ratios:
                assert same_bits(engine.run(x[:n], ratio), expected[ratio][:n]), (isa, kernels, ratio)


# ---- what is not compiled --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer_program(transformer: Any, helpers: Any) -> Program:
    config = QUICK.updated(calibration_images=16)
    return quantize_prepared(prepare(transformer, [helpers.images(16, seed=5)], config), config)


def test_a_transformer_runs_and_agrees(transformer_program: Program, helpers: Any) -> None:
    """Float operators in the reference engine's order of additions: the outputs are the same to the last bit."""
    program, x = transformer_program, helpers.images(5, seed=6).numpy()
    expected = reference_outputs(program, x)
    assert not same_bits(expected[0][0], expected[-1][0])
    for isa in ISAS:
        for threads in (1, 2):
            engine = CpuEngine(program, isa=isa, threads=threads)
            check_engine(engine, expected, x)
    described = engine.describe()
    assert described["engine"]["reference_engine"] == {}
    kinds = {node.name: node.op for node in program.graph.nodes}
    kernels = {layer["name"]: layer.get("kernels", layer.get("kernel")) for layer in described["layers"]}
    matmuls = [n for n in program.layers if kinds[n] == "matmul"]
    assert matmuls and all(kernels[n] == "attention" for n in matmuls)
    assert {row["layer"] for row in engine.counters()} == set(program.layers)


def crossing_net() -> Graph:
    """Float operators in the middle of a conv net: values that cross the border wait while compiled steps run on."""
    b = Network(3, 8, 8, seed=8)
    first = b.conv("x", 16)
    early = b.elsewhere(first)  # made elsewhere long before it is read
    x = b.conv(b.conv(b.conv(b.conv(first, 16), 24), 24), 16)
    late = b.elsewhere(first)  # reads a value that compiled steps finished with long ago
    y = b.conv(b.conv(b.conv(x, 16), 16), 16)
    y = b.conv(b.conv(early, 16), 16, residual=y)
    y = b.conv(late, 16, residual=y)
    return b.done(b.head(b.conv(y, 16)), x, b.unary("gelu", b.elsewhere(y)))


def test_values_that_cross_the_border_are_kept() -> None:
    """Memory is shared between values, but never with one that an operator elsewhere has still to read, or wrote already."""
    program = quantized(crossing_net())
    x = samples(program.graph, 3)
    expected = reference_outputs(program, x)
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, kernels="fixed")
        ops = [program.graph.node(n).op for n in engine.compiled.reasons]
        assert ops.count("aten.erf.default") == 3
        check_engine(engine, expected, x, (3, 3))


def test_describe_and_the_layer_table(known: dict[str, Quantized]) -> None:
    program, _, _ = network(known, "mobile")
    for kernels in ("fixed", "direct"):
        engine = CpuEngine(program, kernels=kernels, batch_hint=2)
        described = engine.describe()
        own = described["engine"]
        assert (own["name"], own["isa"], own["threads"], own["kernels"]) == ("cpu", ISAS[0], 1, kernels)
        assert own["reference_engine"] == {} and own["kernel_choice"] == {"fixed": "rule", "direct": "forced"}[kernels]
        assert own["cpu"] == native.cpu_name() and set(own["arena_bytes"]) == {"1", "2"}
        assert own["arena_bytes"]["2"] > own["arena_bytes"]["1"] > 0
        depthwise = 0
        for layer in described["layers"]:
            if layer.get("kernel") == "depthwise":
                depthwise += 1
                continue
            assert len(layer["kernels"]) == len(program.ratios) and set(layer["kernels"]) <= set(METHODS)
            assert layer["kernels"][0] == "direct"
            if kernels == "direct":
                assert set(layer["kernels"]) == {"direct"}
            stored = layer["weight_bytes"]
            assert stored["8-bit"] >= program.layers[layer["name"]].weight.size  # type: ignore[union-attr]
            assert (stored["read back"] > 0) == any(
                k == "direct" and program.layers[layer["name"]].low[i].any() for i, k in enumerate(layer["kernels"])
            )
            for method in METHODS[1:]:
                assert (stored[method] > 0) == (method in layer["kernels"])
        assert depthwise == 3
        table = engine.layer_table(batch=2, repeats=2)
        assert [row["layer"] for row in table] == list(program.layers)
        for row in table:
            assert len(row["milliseconds"]) == len(row["gmacs_per_s"]) == len(program.ratios)
            assert min(row["milliseconds"]) > 0
            assert np.allclose(
                row["gmacs_per_s"], np.divide(program.layers[row["layer"]].macs * 2 / 1e6, row["milliseconds"])
            )


def test_small_memory_keeps_one_copy(known: dict[str, Quantized]) -> None:
    program = copy.deepcopy(network(known, "residual")[0])
    for layer in program.layers.values():
        layer.low_weight = None  # low weights of their own are held beside them
    totals = {}
    for memory in ("fast", "small"):
        totals[memory] = CpuEngine(program, memory=memory, kernels="fixed").describe()["engine"]["weight_bytes"]
    assert totals["small"]["8-bit"] == totals["fast"]["8-bit"]
    assert sum(totals["small"].values()) == totals["small"]["8-bit"] < sum(totals["fast"].values())


# ---- without torch ---------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
    import sys

    sys.modules["torch"] = None  # as if it were not installed: imports fail, and it cannot be found
    import numpy as np
    import bitdial
    from bitdial.errors import EngineError

    model = bitdial.load(sys.argv[1], engine="cpu", kernels="fixed", threads=2)
    x, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
    for ratio, want in zip(model.ratios, expected, strict=True):
        model.set_ratio(ratio)
        assert (model(x) == want).all()
    assert sys.modules["torch"] is None
    try:
        bitdial.load(sys.argv[4], engine="cpu")
    except EngineError as error:
        print(error)
    else:
        raise SystemExit("a program with operators elsewhere loaded without torch")
    assert sys.modules["torch"] is None
"""


def test_without_torch(known: dict[str, Quantized], tmp_path: Path) -> None:
    """A conv net runs; operators without a compiled form are refused with an error that names them and the remedy."""
    program, x, expected = network(known, "mobile")
    save_program(program, tmp_path / "conv.bitdial")
    save_program(quantized(crossing_net()), tmp_path / "crossing.bitdial")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.stack([e[0] for e in expected]))
    files = [str(tmp_path / n) for n in ("conv.bitdial", "x.npy", "y.npy", "crossing.bitdial")]
    script = tmp_path / "without_torch.py"
    script.write_text(textwrap.dedent(WITHOUT_TORCH))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(package_paths())}
    done = subprocess.run(
        [sys.executable, str(script), *files], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no compiled form of" in done.stdout and "needs torch" in done.stdout
    assert "aten.erf.default (" in done.stdout and "pip install bitdial[quantize]" in done.stdout


def package_paths() -> list[str]:
    """Where a child process finds this very bitdial, behind whatever PYTHONPATH says already."""
    return [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path(bitdial.__file__).parent.parent)]


def test_results_are_lists_of_arrays(known: dict[str, Quantized]) -> None:
    """One output is an array, several a tuple, as with the reference engine."""
    for name in ("grouped", "plain"):
        program, x, _ = network(known, name)
        ours, theirs = CpuEngine(program, kernels="fixed").run(x[:1]), ReferenceEngine(program).run(x[:1])
        assert type(ours) is type(theirs) and len(outputs_of(ours)) == len(program.graph.outputs)
        assert all(isinstance(o, np.ndarray) for o in outputs_of(ours))
