"""benchmarks/gpu_check.py: skips loudly without a GPU, and finds a difference on the emulated one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import gpu_check
import gpu_peers
from bitdial.artifact import save_program
from bitdial.engines.cuda import driver
from bitdial.engines.cuda.emulated import EmulatedDevice, build, find_compiler
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.quantization.program import Program

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "missing", lambda: "no NVIDIA GPU is here")
    gpu_check.main(["--results", str(tmp_path)])
    assert "SKIPPED: THE CUDA ENGINE WAS NOT RUN: no NVIDIA GPU is here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def program() -> Program:
    sys.path.insert(0, str(ROOT / "tests" / "engines" / "cpu"))
    try:
        from cpu_networks import Network, quantized
    finally:
        sys.path.pop(0)
    net = Network(3, 5, 5)
    return quantized(net.done(net.head(net.conv(net.conv("x", 16), 16))))


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    if find_compiler() is None:
        pytest.skip("NO C++ COMPILER: the kernels of the CUDA engine are not emulated")
    return EmulatedDevice(build(ROOT / "build" / "emulation", True), True)


def test_it_compares_and_measures(program: Program, device: EmulatedDevice, tmp_path: Path) -> None:
    engine = CudaEngine(program, device=device)
    gpu_check.save_outputs(tmp_path / "outputs.npz", program, [batch(3)])
    save_program(program, tmp_path / "program.bitdial")
    _, inputs, expected = gpu_check.load((tmp_path / "program.bitdial", tmp_path / "outputs.npz"))
    assert gpu_check.unequal(engine, inputs, expected) == []
    rows = gpu_check.measure(engine, inputs, [1], repeats=1)
    assert [r["ratio"] for r in rows] == [0.0, 0.5, 1.0] and all(r["device_ms"] > 0 for r in rows)
    layers = gpu_check.layers(engine, 2)
    assert {r["layer"] for r in layers} == {step.name for step in engine.compiled.steps}
    assert all(r["first_ms"] > 0 and r["last_ms"] > 0 for r in layers)
    expected[2] = np.nextafter(expected[2], np.float32(9))
    assert gpu_check.unequal(engine, inputs, expected) == [program.ratios[2]]


def batch(n: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, (n, 3, 5, 5)).astype(np.float32)


@pytest.fixture
def with_gpu(
    program: Program, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Runs the whole command on a stand-in for the driver and returns what it wrote."""
    sys.path.insert(0, str(ROOT / "tests" / "engines" / "cuda"))
    try:
        from fake_cuda import FakeCuda
    finally:
        sys.path.pop(0)
    fake, opened = FakeCuda(device, (8, 6)), driver.open_device
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "missing", lambda: "")
    monkeypatch.setattr(driver, "open_device", lambda gpu: opened(gpu, fake, lambda architecture: b"code"))
    files = gpu_check.prepared("small", tmp_path)
    save_program(program, files[0])
    gpu_check.save_outputs(files[1], program, [batch(3)])

    def run(*more: str) -> dict[str, Any]:
        folders = ["--cache", str(tmp_path), "--results", str(tmp_path)]
        gpu_check.main(["--networks", "small,none", "--batches", "1,2", "--repeats", "1", *folders, *more])
        written: dict[str, Any] = json.loads((tmp_path / "gpu_check.imaginary-gpu.json").read_text())
        return written

    return run


def test_the_whole_check_on_a_stand_in_for_the_driver(
    with_gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equality, times, layers, and peers with their reasons; another library's failure ends nothing."""

    def broken(task: gpu_peers.Task) -> Any:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(gpu_peers, "PEERS", {
        "runs": (lambda: "", lambda task: lambda: None), "breaks": (lambda: "", broken),
        "lacks": (lambda: "lacks is not installed", broken), **gpu_peers.PEERS,
    })  # fmt: skip
    written = with_gpu()
    small = written["networks"]["small"]
    assert small["differing"] == [] and len(small["rows"]) == 6 and all(r["switch_ms"] is not None for r in small["rows"])
    assert {r["kernel"] for r in small["layers"]} >= {"conv_unsigned", "pointwise_kernel"}
    peers = {p["peer"]: p for p in written["peers"]}
    assert peers["runs"]["ms"] >= 0 and (peers["runs"]["network"], peers["runs"]["batch"]) == ("small", 2)
    assert peers["breaks"]["skipped"] == "RuntimeError: no such"
    assert peers["lacks"]["skipped"] == "lacks is not installed"
    said = capsys.readouterr()
    assert "small: EQUAL at all ratios" in said.err and "none: left out: not prepared" in said.err
    flat = " ".join(said.out.split())
    assert "Others on the same device" in flat and "longest layers" in flat and "Imaginary GPU" in flat


def test_nothing_is_begun_out_of_time(
    with_gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Peers are left out first, for they need most; then nothing is measured, and last, nothing compared."""
    monkeypatch.setattr(gpu_peers, "PEERS", {"runs": (lambda: "", lambda task: lambda: None)})
    written = with_gpu("--seconds", str(gpu_peers.LEAST_SECONDS - 1))
    assert written["networks"]["small"]["rows"] and written["peers"][0]["skipped"] == "out of time"
    assert with_gpu("--no-peers")["peers"] == []
    left = iter([1.0])  # the network is compared; no time is left behind it
    monkeypatch.setattr(gpu_check.Budget, "left", lambda self: next(left, -1.0))
    assert with_gpu()["networks"]["small"] == {"differing": [], "rows": [], "layers": []}
    (tmp_path / "gpu_check.imaginary-gpu.json").unlink()
    with pytest.raises(FileNotFoundError):  # nothing is written where nothing was found
        with_gpu()
    assert "small: left out: out of time" in capsys.readouterr().err


def test_token_numbers_and_masks(device: EmulatedDevice, tmp_path: Path) -> None:
    """A network of two inputs of integers is prepared, stored and compared."""
    sys.path.insert(0, str(ROOT / "tests" / "engines" / "cpu"))
    try:
        from transformer_networks import transformer
    finally:
        sys.path.pop(0)
    program, inputs = transformer("encoder")
    files = gpu_check.prepared("encoder", tmp_path)
    save_program(program, files[0])
    gpu_check.save_outputs(files[1], program, [x[:2] for x in inputs])
    program, stored, expected = gpu_check.load(files)
    assert [x.dtype.name for x in stored] == ["int64", "int64"]
    engine = CudaEngine(program, device=device)
    assert gpu_check.unequal(engine, stored, expected) == []
    assert len(gpu_check.measure(engine, stored, [3], repeats=1)) == 3


def test_a_difference_is_an_error(with_gpu: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = gpu_check.prepared("small", tmp_path)[1]
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["ratio1"] = np.nextafter(arrays["ratio1"], np.float32(9))
    np.savez(path, **arrays)
    with pytest.raises(SystemExit):
        with_gpu()
    small = json.loads((tmp_path / "gpu_check.imaginary-gpu.json").read_text())["networks"]["small"]
    assert len(small["differing"]) == 1 and small["rows"] == []  # no times of wrong results


# ---- peers -----------------------------------------------------------------------------------------------------------------


def test_reasons_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_peers.missing("numpy", "no_such_package") == "no_such_package is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_peers.torch_missing() == "this build of torch sees no GPU"
    assert [lacks() != "" for lacks, _ in gpu_peers.PEERS.values()] == [True] * len(gpu_peers.PEERS)
    if not gpu_peers.missing("onnxruntime"):
        assert gpu_peers.provider_missing("CPUExecutionProvider") == ""
        assert "no NoSuchProvider" in gpu_peers.provider_missing("NoSuchProvider")


def test_torch_runs_its_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the processor, not compiled: what is handed to torch and torchao."""
    from peers import networks

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 2))
    quantized: list[Any] = []
    fake = SimpleNamespace(quantize_=lambda model, config: quantized.append(config), Int8DynamicActivationInt8WeightConfig=str)
    monkeypatch.setattr(networks, "float_network", lambda name, data: model)
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: model)
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    task = gpu_peers.Task("small", [batch(2)], tmp_path, "cpu")
    for prepare in (gpu_peers.torch_bfloat16, gpu_peers.torchao_int8):
        y = prepare(task)()
        assert y.shape == (2, 2) and y.dtype == torch.bfloat16
    assert quantized == [""]


def test_onnx_runtime_runs_what_was_prepared(tmp_path: Path) -> None:
    """Through the provider that every build has."""
    if gpu_peers.missing("onnx", "onnxruntime"):
        pytest.skip("NO ONNX RUNTIME")
    import onnx

    task = gpu_peers.Task("small", [batch(2)], tmp_path, "cpu")
    prepare = gpu_peers.onnxruntime_int8("CPUExecutionProvider")
    with pytest.raises(FileNotFoundError, match="was not prepared"):
        prepare(task)
    made = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 3, 5, 5]) for n in ("input", "output")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["input"], ["output"])], "g", made[:1], made[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(gpu_peers.int8_model("small", tmp_path)))
    run = prepare(task)
    assert np.array_equal(run().copy_outputs_to_cpu()[0], -task.inputs[0])
    assert gpu_peers.milliseconds(run, 2) > 0
