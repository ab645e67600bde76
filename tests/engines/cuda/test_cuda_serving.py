"""The server's worker on this engine: no torch, several replicas on one device, and a device that is lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cpu_networks import NETWORKS, outputs_of, quantized, reference_outputs, same_bits, samples
from fake_cuda import FakeCuda, Status

from bitdial.artifact import to_bytes
from bitdial.engines.cuda import driver as cuda_driver
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.errors import EngineLostError
from bitdial.quantization.program import Program
from bitdial.serving.worker import child
from bitdial.serving.worker.faults import Fault
from bitdial.serving.worker.model import LoadedModel

LOADING: dict[str, Any] = {"engine": "cuda", "options": {"gpu": 0}, "max_batch": 4, "name": "m"}


@pytest.fixture(scope="module")
def program() -> Program:
    return quantized(NETWORKS["residual"]())


@pytest.fixture
def fake(make_device: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU that the engine finds by itself."""
    own, opened = FakeCuda(make_device(True), (8, 6)), cuda_driver.open_device
    monkeypatch.setattr(cuda_driver, "missing", lambda: "")
    monkeypatch.setattr(cuda_driver, "open_device", lambda gpu: opened(gpu, own, lambda architecture: b"code"))
    return own


def test_the_worker_runs_it_as_any_other(fake: FakeCuda, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot be imported, too."""
    x = samples(program.graph, 3)
    expected = reference_outputs(program, x)
    monkeypatch.setitem(sys.modules, "torch", None)
    model = LoadedModel(to_bytes(program), "m.bitdial", **LOADING)
    assert model.info.engine["name"] == "cuda" and model.info.engine["device"] == "Imaginary GPU"
    for index in range(len(program.ratios)):
        outputs, _, checked = model.run([x], [1, 2], index)
        assert checked == ["", ""]
        for got, want in zip(outputs, expected[index], strict=True):
            assert same_bits(got, want)
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    outputs, _, checked = model.run([bad], [1, 2], 0)
    assert "NaN" in checked[0] and not checked[1] and same_bits(outputs[0], expected[0][0][1:])


def test_a_lost_device_ends_the_workers_process(
    fake: FakeCuda, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch is told why, and nothing is tried again: a new process is the server's affair."""
    model = LoadedModel(to_bytes(program), "m.bitdial", **LOADING)
    x = samples(program.graph, 2)
    fake.failing["cuGraphLaunch"] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    fake.calls.clear()
    with pytest.raises(EngineLostError, match="is lost"):
        model.run([x], [1, 1], 0)
    assert fake.calls.count("cuGraphLaunch") == 1
    messages = [{"samples": [1, 1], "index": 0}] * 2
    sent: list[Any] = []
    frames: Any = SimpleNamespace(receive=lambda: messages.pop() if messages else None, send=sent.append)
    memory: Any = SimpleNamespace(inputs=lambda n: [x[:n]])
    child._serve(frames, model, memory, Fault())
    assert len(messages) == 1 and [m["error"][0] for m in sent] == ["EngineLostError"]
    assert "start the process anew" in capsys.readouterr().err


def test_replicas_on_one_device_have_streams_of_their_own(fake: FakeCuda, program: Program) -> None:
    """Batches in turn, at ratios of their own; the end of one is not the end of the other."""
    x = samples(program.graph, 2)
    expected = reference_outputs(program, x)
    first, second = CudaEngine(program, gpu=0), CudaEngine(program, gpu=0)
    first.set_ratio(1.0)
    fake.launched.clear()
    for _ in range(2):
        assert same_bits(outputs_of(first.run(x))[0], expected[-1][0])
        assert same_bits(outputs_of(second.run(x))[0], expected[0][0])
    assert len(fake.launched) == 4 and len(set(fake.launched)) == 2 and fake.launched[:2] == fake.launched[2:]
    first.close()
    assert same_bits(outputs_of(second.run(x, 1.0))[0], expected[-1][0])
