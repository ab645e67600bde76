"""Engines whose time is modelled: the server's clock, bounds and figures in their seconds. Clocks are set by hand, or told to run
at a stated pace; nothing here measures time."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="THE SERVER IS NOT TESTED: fastapi is not installed")
httpx = pytest.importorskip("httpx", reason="THE SERVER IS NOT TESTED: httpx is not installed")

from served import RATIOS, http, infer_bytes, serving, status, write_model  # noqa: E402

from bitdial.artifact import to_bytes  # noqa: E402
from bitdial.cli.serve import announce  # noqa: E402
from bitdial.cli.terminal import Terminal  # noqa: E402
from bitdial.engines.base import create_engine  # noqa: E402
from bitdial.engines.cpu import native  # noqa: E402
from bitdial.errors import ConfigError  # noqa: E402
from bitdial.loadtest import LoadPlan, Schedule, parse_url, run_load  # noqa: E402
from bitdial.loadtest.generator import LoadRun  # noqa: E402
from bitdial.serving.server.config import make_options  # noqa: E402
from bitdial.serving.worker import calibration  # noqa: E402
from bitdial.serving.worker import model as worker_model  # noqa: E402
from bitdial.serving.worker.base import Result, Worker, WorkerOptions  # noqa: E402
from bitdial.serving.worker.calibration import measure_dilation, measure_table  # noqa: E402
from bitdial.serving.worker.info import ModelInfo, TensorInfo  # noqa: E402
from bitdial.serving.worker.model import LoadedModel  # noqa: E402
from bitdial.serving.worker.process import ProcessWorker  # noqa: E402
from bitdial.serving.worker.thread import ThreadWorker  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent.parent / "engines" / "cpu")]
import cpu_networks as nets  # noqa: E402

MODELLED = (0.004, 0.003, 0.002)
ARRAY = {"rows": 4, "columns": 4, "megahertz": 2.0}


def info(modelled: tuple[float, ...] = MODELLED) -> ModelInfo:
    x, y = TensorInfo("x", "float32", (-1, 3)), TensorInfo("y", "float32", (-1, 2))
    return ModelInfo("m", (x,), (y,), RATIOS, (0.9, 0.8, 0.7), {"name": "npu"}, [], "00", modelled=modelled)


class Idle:
    """A worker that only says what its model is, and whose batches move the clock."""

    def __init__(self, now: list[float], seconds: float) -> None:
        self.info, self.now, self.seconds, self.ran = info(), now, seconds, 0

    async def run(self, requests: Any, index: int, pace: float = 0.0) -> Result:
        self.ran += 1
        self.now[0] += self.seconds
        return Result([[]], index, 0.0, [""])


def test_the_table_is_the_models_and_nothing_is_run() -> None:
    worker: Any = Idle([0.0], 1.0)
    table = asyncio.run(measure_table(worker, 6))
    assert worker.ran == 0 and table.batches == (1, 2, 4, 6)
    for i, seconds in enumerate(MODELLED):
        assert table.seconds[i] == pytest.approx([n * seconds for n in table.batches])
    assert table.about["measured_cells"] == 0


@pytest.mark.parametrize(("seconds", "dilation"), [(0.0001, 2.2), (0.01, 22.0), (0.0123, 27.0)])
def test_dilation_leaves_the_arithmetic_room(monkeypatch: pytest.MonkeyPatch, seconds: float, dilation: float) -> None:
    """The worst is one sample at the full dial, 0.002 modelled seconds: four times what it takes and 1 ms, rounded up to two
    digits. What the model takes longer for than that needs none."""
    now = [50.0]
    monkeypatch.setattr(calibration, "clock", lambda: now[0])
    worker: Any = Idle(now, seconds)
    assert asyncio.run(measure_dilation(worker, 8)) == dilation
    worker.info = info((0.4, 0.3, 0.2))
    assert asyncio.run(measure_dilation(worker, 8)) == 1.0


def test_a_batch_is_held_and_told_in_modelled_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_held sleeps what the arithmetic leaves, on the clock that it is given."""
    now, slept = [10.0], []
    monkeypatch.setattr(worker_model.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker_model.time, "sleep", slept.append)
    model = LoadedModel.__new__(LoadedModel)

    def run(inputs: Any, samples: Any, index: int) -> Any:
        now[0] += 0.25
        return [], 0.25, [""]

    monkeypatch.setattr(model, "run", run)
    for hold, left in ((1.0, [0.75]), (0.25, []), (0.0, [])):
        slept.clear()
        model.run_held([], [1], 0, hold)
        assert slept == left
    held = Worker._result([], 1, 0.25, [""], 1.0, 10.0)
    assert held.compute == 0.1 and not held.overrun
    late = Worker._result([], 1, 2.5, [""], 1.0, 10.0)
    assert late.compute == 0.25 and late.overrun
    assert Worker._result([], 1, 0.25, [""], 0.0, 0.0).compute == 0.25


def test_a_worker_tells_the_cycle_models_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    program = nets.quantized(nets.residual_net())
    if not native.missing():
        monkeypatch.setitem(sys.modules, "torch", None)  # the compiled engine computes, and needs none
    model = LoadedModel(to_bytes(program), "net", engine="npu", options={**ARRAY, "threads": 1}, max_batch=2)
    engine: Any = create_engine(program, "npu", **ARRAY)
    assert model.info.modelled == tuple(engine.modelled_seconds(1, r) for r in program.ratios)
    again = ModelInfo.from_json(json.loads(json.dumps(model.info.as_json())))
    assert again.modelled == model.info.modelled and again.engine["name"] == "npu"
    x = nets.samples(program.graph, 2)
    outputs, _, _ = model.run([x], [2], 1)
    monkeypatch.undo()
    np.testing.assert_array_equal(outputs[0], nets.reference_outputs(program, x)[1][0])
    assert LoadedModel(to_bytes(program), "net", engine="reference").info.modelled == ()


@pytest.mark.parametrize("kind", [ThreadWorker, ProcessWorker])
def test_workers_hold_real_batches(tmp_path: Path, kind: type[Worker]) -> None:
    """Modelled seconds come back unless the arithmetic took longer, which is told; without a pace, the arithmetic's own."""
    program = nets.quantized(nets.residual_net())
    path = tmp_path / "net.bitdial"
    path.write_bytes(to_bytes(program))
    x = nets.samples(program.graph, 3)

    async def play() -> None:
        worker = kind(path, WorkerOptions(engine="npu", engine_options={**ARRAY, "megahertz": 20.0}, max_batch=4))
        try:
            made = await worker.start()
            begin = time.monotonic()
            result = await worker.run([[x[:1]], [x[1:]]], 1, pace=8.0)
            assert time.monotonic() - begin >= 8.0 * 3 * made.modelled[1]
            assert result.overrun or result.compute == pytest.approx(3 * made.modelled[1])
            np.testing.assert_array_equal(
                np.concatenate([result.outputs[0][0], result.outputs[1][0]]), nets.reference_outputs(program, x)[1][0]
            )
            assert not (await worker.run([[x]], 0)).overrun
        finally:
            await worker.stop()

    asyncio.run(play())


def test_a_server_keeps_the_models_time_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten seconds of the wall clock are one; clocks, bounds, answers, metadata and metrics say so."""
    path = write_model(tmp_path / "m", modelled=MODELLED)
    with serving({"m": path}, {}, slo_ms=20_000, dilation=10.0) as running:
        model = running.model()
        base = f"http://{running.address}"
        assert httpx.get(f"{base}/v2/models/m").json()["parameters"]["dilation"] == 10.0
        answer = http(running.port, infer_bytes(parameters={"max_ratio": 0.5}))
        head, _, body = answer.partition(b"\r\n\r\n")
        parameters = json.loads(body[: body.index(b"}]}") + 3])["parameters"]
        assert status(answer) == 200 and parameters["dilation"] == 10.0 and parameters["compute_ms"] == 4.0
        assert running.workers[0].paces == [10.0]
        assert model.scheduler.table.table.seconds[0][:2] == pytest.approx((0.004, 0.008))
        text = httpx.get(f"{base}/metrics").text
        assert 'bitdial_time_dilation{model="m"} 10.0' in text and 'bitdial_overruns_total{model="m"} 0.0' in text
        state = httpx.get(f"{base}/live/state").json()["models"][0]
        assert state["engine"]["dilation"] == 10.0
        capsys.readouterr()
        announce(Terminal(), running.server)
        said = capsys.readouterr().out
        assert "the dial buys 2.00x by the model" in said and "one second of the engine's takes 10 s here" in said
        announce(Terminal(as_json=True), running.server)
        assert json.loads(capsys.readouterr().out)["models"][0]["dilation"] == 10.0
        # A new version has times of its own, though its ratios are the same; the pace stays.
        write_model(path, modelled=[0.008, 0.006, 0.004], overrun=True)
        assert httpx.post(f"{base}/v2/repository/models/m/load").json()["changed"]
        assert model.scheduler.table.table.seconds[0][0] == pytest.approx(0.008) and model.dilation == 10.0
        assert status(http(running.port, infer_bytes())) == 200
        assert 'bitdial_overruns_total{model="m"} 1.0' in httpx.get(f"{base}/metrics").text


def test_its_clock_is_slowed_down(tmp_path: Path) -> None:
    from served import FakeWorker

    from bitdial.serving.control import Settings
    from bitdial.serving.server.model import ServedModel

    now = [80.0]

    async def look() -> None:
        model = ServedModel("m", write_model(tmp_path / "m", modelled=MODELLED), Settings(slo=1.0), make=FakeWorker,
                            clock=lambda: now[0], dilation=8.0)  # type: ignore[arg-type]  # fmt: skip
        await model.start()
        assert model.clock() == 10.0
        now[0] += 4.0
        assert model.clock() == 10.5 and model.metrics is not None and model.metrics.clock() == 10.5
        assert model._wall(0.5) == 4.0
        await model.stop()
        measured = ServedModel("m", write_model(tmp_path / "m"), Settings(slo=1.0), make=FakeWorker,  # type: ignore[arg-type]
                               dilation=8.0)  # fmt: skip
        with pytest.raises(ConfigError, match="--dilation slows modelled time down, and the time of engine 'fake' is measured"):
            await measured.start()

    asyncio.run(look())


def test_a_load_test_sends_in_the_models_time(tmp_path: Path) -> None:
    """Columns and schedule are in modelled seconds: a dilation of 0.01 plays 20 s in a fifth."""
    path = write_model(tmp_path / "m", modelled=MODELLED)
    with serving({"m": path}, {}, slo_ms=20_000, dilation=0.01) as running:
        times = np.array([0.0, 10.0, 20.0])
        plan = LoadPlan(schedule=Schedule(times, 20.0, "three"), warmup=0, connections=1, timeout=10_000.0)
        result = run_load(parse_url(f"http://{running.address}")[0], None, plan)
    assert result.settings["dilation"] == 0.01 and result.seconds == 20.0
    assert result.scheduled.tolist() == times.tolist() and result.ok.all()
    assert (result.done >= result.sent).all() and (result.sent >= times).all()
    run = LoadRun.__new__(LoadRun)
    run.begin, run.pace = 100.0, 4.0
    assert run._since(108.0) == 2.0 and run._at(2.0) == 108.0


def test_options_of_the_npu_belong_to_it(tmp_path: Path) -> None:
    given = make_options(engine="npu", npu_array=(8, 16), npu_mhz=200, pad_groups=True).given_engine_options()
    assert given == {"rows": 8, "columns": 16, "megahertz": 200, "pad_groups": True}
    with pytest.raises(ConfigError, match="--npu-mhz: belongs to the 'npu' engine; add --engine npu"):
        make_options(npu_mhz=200).given_engine_options()
    with pytest.raises(ConfigError, match="npu_mhz"):
        make_options(engine="npu", npu_mhz=0)
    table = tmp_path / "energy.json"
    table.write_text('{"dram_byte": 20}')
    assert make_options(engine="npu", npu_energy=table).given_engine_options() == {"energy": {"dram_byte": 20}}
    wrong = {"[1]": "an object of pJ", '{"dram": 1}': "'dram' is no entry of the table; it has multiply8", "{": "no JSON"}
    for text, told in wrong.items():
        table.write_text(text)
        with pytest.raises(ConfigError, match=told):
            make_options(engine="npu", npu_energy=table).given_engine_options()
