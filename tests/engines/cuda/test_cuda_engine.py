"""Whole networks on the emulated device: bit for bit the reference engine's outputs at every ratio."""

from __future__ import annotations

import dataclasses
import gc
import sys
from typing import Any

import numpy as np
import pytest
from cpu_networks import (
    NETWORKS,
    QUICK,
    Network,
    networks,
    outputs_of,
    quantized,
    reference_outputs,
    same_bits,
    samples,
    with_low_plane,
)
from fake_cuda import FakeCuda, Status
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from bitdial.engines import base
from bitdial.engines.cuda import driver as cuda_driver
from bitdial.engines.cuda.device import ALIGNMENT, DeviceLostError, DeviceMemoryError
from bitdial.engines.cuda.driver import Driver, architecture_for, open_device
from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.engine import MOST_BATCHES, CudaEngine
from bitdial.engines.cuda.plan import Plan, place
from bitdial.errors import CalibrationError, EngineError, InputError, RatioError
from bitdial.graph.ir import Graph
from bitdial.quantization.program import Program


def check(program: Program, device: EmulatedDevice, n: int = 2) -> CudaEngine:
    x = samples(program.graph, n)
    engine = CudaEngine(program, device=device)
    for ratio, expected in zip(program.ratios, reference_outputs(program, x), strict=True):
        got = outputs_of(engine.run(x, ratio))
        for name, own, want in zip(program.outputs, got, expected, strict=True):
            assert same_bits(own, want), (ratio, name, int((own != want).sum()), own.size)
    return engine


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_are_bit_identical_to_the_reference(programs: dict[str, Program], name: str, device: EmulatedDevice) -> None:
    if name not in programs:
        programs[name] = quantized(NETWORKS[name]())
    engine = check(programs[name], device)
    said = engine.describe()["engine"]
    assert said["low_products"].startswith("native" if device.native_int4 else "4-bit weights unpacked")


@pytest.mark.parametrize("native", [True, False])
def test_stored_low_weights_and_ratios_without_nesting(make_device: Any, programs: dict[str, Program], native: bool) -> None:
    program = with_low_plane(programs.setdefault("residual", quantized(NETWORKS["residual"]())))
    rng = np.random.default_rng(5)
    for layer in program.layers.values():
        if layer.eligible:
            layer.low = rng.random(layer.low.shape) < 0.5
            layer.low[0] = False
    check(program, make_device(native))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=networks(), granularity=st.sampled_from(["group", "output", "block"]), bits=st.sampled_from([4, 4, 5, 6]))
def test_random_networks_are_bit_identical(device: EmulatedDevice, graph: Graph, granularity: Any, bits: int) -> None:
    try:
        program = quantized(graph, QUICK.updated(weight_granularity=granularity, low_bits=bits, bias_correction=False))
    except (CalibrationError, IndexError):
        reject()  # networks that the quantizer cannot do are not this engine's matter
    check(program, device, 3)


# ---- memory ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_values_that_live_at_the_same_time_share_no_byte(values: list[tuple[int, int, int]]) -> None:
    sizes, lives = [v[0] for v in values], [(min(v[1:]), max(v[1:])) for v in values]
    offsets, total = place(sizes, lives)
    for i, at in enumerate(offsets):
        assert at % ALIGNMENT == 0 and at + sizes[i] <= total
        for j in range(i):
            apart = at + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= at
            assert apart or lives[i][1] < lives[j][0] or lives[j][1] < lives[i][0]


def test_a_batch_too_large_is_refused_and_the_engine_lives(make_device: Any, programs: dict[str, Program]) -> None:
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    x = samples(program.graph, 40)
    probe = CudaEngine(program, device=make_device(True))
    expected = probe.run(x[:3])
    used = probe.compiled.pool.size + Plan(probe.compiled, make_device(True), 3).size
    engine = CudaEngine(program, device=make_device(True, memory=used + 100))
    for _ in range(2):
        assert same_bits(engine.run(x[:3]), expected)
        with pytest.raises(DeviceMemoryError, match="a batch of 40 needs .* MiB .* smaller batch"):
            engine.run(x)
        assert same_bits(engine.run(x[:2]), expected[:2])  # the memory of the batch of 3 gives way


# ---- the driver ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(make_device: Any) -> FakeCuda:
    return FakeCuda(make_device(True), (8, 6))


def driver(fake: FakeCuda, gpu: int = 0) -> Driver:
    return open_device(gpu, fake, lambda architecture: architecture.encode())


def test_the_driver_runs_one_graph_per_ratio_and_batch(fake: FakeCuda, programs: dict[str, Program]) -> None:
    program = programs.setdefault("residual", quantized(NETWORKS["residual"]()))
    engine = CudaEngine(program, device=driver(fake))
    x = samples(program.graph, 2)
    for _ in range(2):
        for ratio, expected in zip(program.ratios, reference_outputs(program, x), strict=True):
            assert engine.set_ratio(ratio) == engine.ratio == ratio
            assert same_bits(engine.run(x), expected[0])
    assert fake.graphs == len(program.ratios)
    fake.calls.clear()
    engine.run(x)
    assert [c for c in fake.calls if c not in ("cuCtxSetCurrent", "cuStreamSynchronize")] == [
        "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync"
    ]  # fmt: skip
    for n in range(3, 3 + MOST_BATCHES):  # the batch of 2 goes, and its graphs with it
        engine.run(np.repeat(x[:1], n, axis=0), 0.0)
    assert fake.graphs == MOST_BATCHES
    said = engine.describe()["engine"]
    assert (said["device"], said["architecture"]) == ("Imaginary GPU", "sm_86")


def test_engines_give_back_what_they_hold(
    fake: FakeCuda, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    monkeypatch.setattr(cuda_driver, "open_device", lambda gpu: driver(fake, gpu))
    before = fake.device.left
    x = samples(program.graph, 2)
    for explicit in (False, True):
        engine = CudaEngine(program, gpu=0)
        engine.run(x)
        assert fake.device.left < before and fake.graphs == 1
        if explicit:
            engine.close()
            engine.close()
            with pytest.raises(DeviceLostError, match="the engine is closed"):
                engine.run(x)
        del engine
        gc.collect()
        assert fake.device.left == before and fake.graphs == 0
        assert fake.calls[-3:] == ["cuModuleUnload", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"]


def test_errors_of_the_driver(fake: FakeCuda, programs: dict[str, Program]) -> None:
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    x = samples(program.graph, 2)
    fake.failing["cuInit"] = Status.CUDA_ERROR_NO_DEVICE
    with pytest.raises(EngineError, match="cuInit failed with CUDA_ERROR_NO_DEVICE"):
        driver(fake)
    fake.failing.clear()
    with pytest.raises(EngineError, match="there is no GPU 3: the driver counts 1"):
        driver(fake, 3)
    with pytest.raises(EngineError, match=r"Imaginary GPU is of compute capability 7\.5, which has no kernels"):
        driver(FakeCuda(fake.device, (7, 5)))
    fake.failing["cuModuleLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(EngineError, match="does not take the kernels .* version 580"):
        driver(fake)
    fake.failing.clear()
    engine = CudaEngine(program, device=driver(fake))
    expected = engine.run(x)
    fake.failing["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceMemoryError, match="smaller batch"):
        engine.run(x[:1])
    fake.failing.clear()
    fake.failing["cuLaunchKernel"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(EngineError, match="cuLaunchKernel failed"):
        engine.run(x[:1])
    assert fake.captured is None  # the stream is usable again
    fake.failing.clear()
    assert same_bits(engine.run(x), expected)
    fake.failing["cuGraphLaunch"] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceLostError, match="is lost .*CUDA_ERROR_ILLEGAL_ADDRESS.*start the process anew"):
        engine.run(x)
    fake.failing.clear()
    with pytest.raises(DeviceLostError, match="start the process anew"):
        engine.run(x)


def test_architectures_and_what_runs_on_them() -> None:
    found = {c: architecture_for(*divmod(c, 10)) for c in (70, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121, 125, 130)}
    assert [found[c] for c in (70, 75, 130)] == [None] * 3
    assert (found[88], found[89], found[125]) == ("sm_87", "sm_89", "sm_121")
    assert all(found[c] == f"sm_{c}" for c in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121))


# ---- which engine is taken -------------------------------------------------------------------------------------------------


def test_no_machine_picks_this_engine_unasked(monkeypatch: pytest.MonkeyPatch, programs: dict[str, Program]) -> None:
    """Neither without a GPU nor, as long as it has run on none, with one; whatever else is missing."""
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    monkeypatch.setattr(cuda_driver, "NODES", ("no such node",))
    assert base.available_engines()["cuda"]
    with pytest.raises(EngineError, match="engine 'cuda' cannot run: "):
        base.create_engine(program, "cuda")
    specs = dict(base.engine_specs())
    specs["cpu"] = dataclasses.replace(specs["cpu"], missing=lambda: "not compiled")
    monkeypatch.setattr(base, "engine_specs", lambda: specs)
    for problem in (specs["cuda"].missing(), ""):
        specs["cuda"] = dataclasses.replace(specs["cuda"], missing=lambda problem=problem: problem)
        for options in ([], ["gpu"], ["check_finite"]):
            assert base.default_engine(program, options) == "reference"
        assert type(base.defining_engine(program)).__name__ == "ReferenceEngine"


@pytest.mark.parametrize("lack", ["cuda-bindings is not installed", ""])
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, lack: str) -> None:
    monkeypatch.setattr(cuda_driver.compilation, "missing", lambda: lack)
    monkeypatch.setattr(cuda_driver, "bindings_missing", lambda: "")
    monkeypatch.setattr(cuda_driver, "NODES", ("no such node",))
    assert cuda_driver.missing() == (lack or "no NVIDIA GPU is here")
    if not lack:
        monkeypatch.setattr(cuda_driver, "NODES", ("null",))  # a node that every machine has
        monkeypatch.setattr(cuda_driver.ctypes, "CDLL", refuse)
        assert "NVIDIA's driver does not load (no such library)" in cuda_driver.missing()
        monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: None)
        assert cuda_driver.missing() == ""


def refuse(name: str) -> None:
    raise OSError("no such library")


def test_time_on_the_device_is_without_transfers(fake: FakeCuda, programs: dict[str, Program]) -> None:
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    engine = CudaEngine(program, device=driver(fake))
    fake.calls.clear()
    assert engine.seconds_per_run(2, 1.0, repeats=3) > 0
    assert fake.calls.count("cuGraphLaunch") == 4 and "cuMemcpyHtoDAsync" not in fake.calls


def test_time_of_every_step(fake: FakeCuda, programs: dict[str, Program]) -> None:
    """Between events, which are given back, also where a launch fails."""
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    engine = CudaEngine(program, device=driver(fake))
    found = engine.seconds_per_step(2, 1.0, repeats=2)
    assert [(name, kernel) for name, kernel, _ in found] == [
        (step.name, launch.kernel) for step, (_, launch) in zip(engine.compiled.steps, engine._plan(2).launches(0), strict=True)
    ]
    assert all(t > 0 for _, _, t in found) and fake.events == 0
    x = samples(program.graph, 2)
    assert same_bits(engine.run(x, 1.0), reference_outputs(program, x)[-1][0])
    fake.failing["cuLaunchKernel"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(EngineError, match="cuLaunchKernel failed"):
        engine.seconds_per_step(2, 1.0)
    assert fake.events == 0


def elsewhere_net() -> Graph:
    """Operators without kernels between layers: first, in the middle, behind one another, and last."""
    net = Network(3, 7, 7)
    x = net.elsewhere(net.conv(net.elsewhere("x"), 16))
    x = net.conv(net.elsewhere(x), 24)
    return net.done(net.elsewhere(net.head(x)))


def test_what_has_no_kernel_is_computed_by_the_reference_engine(
    fake: FakeCuda, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = quantized(elsewhere_net())
    assert base.engine_spec("cuda").can_run(program) == ""
    said = check(program, device, 3).describe()["engine"]["reference_engine"]
    assert len(said) == 4 and all("erf" in program.instruction(name).operation for name in said)
    engine = CudaEngine(program, device=driver(fake))
    x = samples(program.graph, 2)
    for _ in range(2):
        assert same_bits(engine.run(x, 1.0), reference_outputs(program, x)[-1][0])
    assert fake.graphs == 2 and engine.seconds_per_run(2, 1.0, repeats=1) > 0  # what lies between three and two of them
    engine.close()
    assert fake.graphs == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"no compiled form of '.*' \(aten.erf.default: .*which needs torch"):
        CudaEngine(program, device=driver(fake))


def test_graphs_that_fail_in_part_are_given_back(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantized(elsewhere_net())
    engine = CudaEngine(program, device=driver(fake))
    real = FakeCuda.do_cuGraphInstantiate

    def only_one(own: FakeCuda, graph: list[Any], flags: int) -> list[Any]:
        if own.graphs:
            raise DeviceMemoryError("no room")
        return real(own, graph, flags)

    x = samples(program.graph, 2)
    with monkeypatch.context() as patch:
        patch.setattr(FakeCuda, "do_cuGraphInstantiate", only_one)
        with pytest.raises(DeviceMemoryError):
            engine.run(x)
        assert fake.graphs == 0
    assert same_bits(engine.run(x), reference_outputs(program, x)[0][0])


@pytest.mark.parametrize("name", ["plain", "residual", "grouped"])
def test_dynamic_extraction(programs: dict[str, Program], name: str, device: EmulatedDevice) -> None:
    """The shifts of each sample, at every ratio; the 8-bit end reads the input itself."""
    static = programs.setdefault(name, quantized(NETWORKS[name]()))
    engine = check(dataclasses.replace(static, extraction="dynamic"), device, 3)
    assert "nothing is saved" in engine.describe()["engine"]["low_products"]
    device.launches.clear()
    engine.run(samples(static.graph, 2), 0.0)
    assert "lower_kernel" not in device.launches
    engine.run(samples(static.graph, 2), 1.0)
    assert device.launches.count("lower_kernel") == device.launches.count("shift_kernel") > 0


def test_bad_batches_are_refused(make_device: Any, programs: dict[str, Program]) -> None:
    program = programs.setdefault("plain", quantized(NETWORKS["plain"]()))
    engine = CudaEngine(program, device=make_device(True))
    x = samples(program.graph, 2)
    with pytest.raises(InputError, match="shape"):
        engine.run(x[:, :1])
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 NaN or infinite"):
        engine.run(x)
    with pytest.raises(RatioError):
        engine.set_ratio(1.5)
