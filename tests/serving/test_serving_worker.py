"""Workers with real engines: the same bits as the engine's, and what happens when inputs, files, processes or parents go bad."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitdial
from bitdial.artifact import load_program
from bitdial.engines.base import create_engine
from bitdial.engines.cpu import native
from bitdial.errors import ArtifactError, BitdialError, ConfigError, EngineError, InputError
from bitdial.quantization.config import QuantizeConfig
from bitdial.serving.supervision import Supervisor
from bitdial.serving.worker import process as process_module
from bitdial.serving.worker.base import Result, Worker, WorkerOptions
from bitdial.serving.worker.calibration import measure_table
from bitdial.serving.worker.errors import SignatureError, UnservableError, WorkerCrash
from bitdial.serving.worker.frames import AsyncFrames
from bitdial.serving.worker.info import ModelInfo
from bitdial.serving.worker.model import LoadedModel
from bitdial.serving.worker.pool import Candidate, WorkerPool
from bitdial.serving.worker.process import ProcessWorker
from bitdial.serving.worker.thread import ThreadWorker

ENGINE = "reference" if native.missing() else "cpu"
COMPILED = pytest.mark.skipif(ENGINE != "cpu", reason=f"CPU ENGINE MISSING: {native.missing()}")
QUICK = {
    "target": "paper",
    "selector": "random",
    "calibration_images": 12,
    "batch_size": 12,
    "group_size": 4,
    "shift_choice": "value_error",
    "keep_answers": 0.0,  # random weights: no ratio is sound
}
OPTIONS = WorkerOptions(engine=ENGINE, engine_options={"kernels": "fixed"} if ENGINE == "cpu" else {}, max_batch=8)


def options(**changes: Any) -> WorkerOptions:
    return WorkerOptions(**{**OPTIONS.__dict__, **changes})


class Embedded(nn.Module):
    """Whole numbers in; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, words: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(self.table(words).mean(1) * weight)))
        return out


class Interleaved(nn.Module):
    """Its second output holds the first class of all images, then the second of all, ...: without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.second(torch.relu(self.first(x)))
        return y, y.t().reshape(-1)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is remembered in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITDIAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("BITDIAL_TEST_FAULT", raising=False)
        yield


@pytest.fixture(scope="module")
def models(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """a, b: the same tensors, other weights and ratios; c: seven classes; corrupt; text: whole-number inputs; interleaved."""
    folder = tmp_path_factory.mktemp("models")
    images = helpers.images(12)

    def save(name: str, model: nn.Module, calibration: Any, **config: Any) -> Path:
        quantized = bitdial.quantize(model, calibration, QuantizeConfig(**{**QUICK, **config}), engine="reference")
        quantized.program.curve = [{"ratio": r, "accuracy": 0.9 - 0.1 * r} for r in quantized.ratios]
        quantized.save(folder / f"{name}.bitdial")
        return folder / f"{name}.bitdial"

    found = {}
    for name, classes, ratios in (("a", 10, (0.0, 0.5, 1.0)), ("b", 10, (0.0, 1.0)), ("c", 7, (0.0, 1.0))):
        torch.manual_seed(ord(name))
        model = helpers.estimate(helpers.conv_net(8, classes), images)
        found[name] = save(name, model, images, ratios=ratios)
    torch.manual_seed(0)
    words = [(torch.randint(0, 50, (6, 5)), torch.rand(6, 16)) for _ in range(2)]
    found["text"] = save("text", Embedded().eval(), words, ratios=(0.0, 1.0))
    found["interleaved"] = save("interleaved", Interleaved().eval(), torch.randn(12, 16), ratios=(0.0, 1.0))
    damaged = bytearray(found["a"].read_bytes())
    damaged[-100] ^= 1
    found["corrupt"] = folder / "corrupt.bitdial"
    found["corrupt"].write_bytes(damaged)
    return SimpleNamespace(**found)


def request(images: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    return [np.random.default_rng(seed).standard_normal((images, 3, 8, 8), dtype=np.float32)]


def go(job: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; it must leave no descriptor and no child behind."""
    before = held()
    asyncio.run(asyncio.wait_for(job, 300))
    assert held() == before


def held() -> tuple[list[str], int, list[str]]:
    """Open descriptors, mapped shared memories, children (zombies too) of this process."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:bitdial")
    children = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children += (task / "children").read_text().split()
    return sorted(os.listdir("/proc/self/fd")), mapped, sorted(children)


def is_there(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.005)


def both_kinds(path: Path, chosen: WorkerOptions) -> list[Worker]:
    return [ProcessWorker(path, chosen), ThreadWorker(path, chosen)]


async def check_bits(worker: Worker, path: Path) -> None:
    """Batches of one and of several requests give the engine's bits at every ratio, each request its own."""
    engine = create_engine(load_program(path), OPTIONS.engine, **OPTIONS.engine_options)
    requests = [request(n, seed=n) for n in (1, 3, 2)]
    whole = np.concatenate([r[0] for r in requests])
    seen = set()
    for index, ratio in enumerate(engine.ratios):
        expected = engine.run(whole, ratio)
        seen.add(expected.tobytes())
        for batch, wanted in ((requests, expected), (requests[:1], expected[:1])):
            result = await worker.run(batch, index)
            assert result.index == index and result.compute > 0 and result.checked == [""] * len(batch)
            assert [o[0].shape for o in result.outputs] == [(len(r[0]), 10) for r in batch]
            assert np.concatenate([o[0] for o in result.outputs]).tobytes() == wanted.tobytes()
            result.outputs[0][0][...] = 0  # own memory
    assert len(seen) == len(engine.ratios)  # the dial moves this network, and with it the test


# ---- one worker ------------------------------------------------------------------------------------------------------------


def test_a_worker_gives_the_engines_bits_at_every_ratio(models: SimpleNamespace) -> None:
    async def job() -> None:
        for worker in both_kinds(models.a, OPTIONS):
            info = await worker.start()
            assert worker.alive and worker.info is info
            assert info.name == "a" and len(info.digest) == 64
            assert [str(t) for t in info.inputs] == ["float32[N, 3, 8, 8]"]
            assert [str(t) for t in info.outputs] == ["float32[N, 10]"]
            assert info.ratios == (0.0, 0.5, 1.0) and info.accuracy == pytest.approx((0.9, 0.85, 0.8))
            assert info.engine["name"] == ENGINE and info.engine["processor"] and info.engine["threads"] == 1
            assert any(row["eligible"] and row["low"] == [0.0, pytest.approx(0.5, abs=0.4), 1.0] for row in info.layers)
            await check_bits(worker, models.a)
            await worker.stop()
            await worker.stop()
            assert not worker.alive
            with pytest.raises(WorkerCrash, match="stopped"):
                await worker.run([request(1)], 0)

    go(job())


def test_the_reference_engine_serves_too(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ThreadWorker(models.a, WorkerOptions(engine="reference", engine_options={"threads": 1, "batch_hint": 4}))
        info = await worker.start()
        assert info.engine["name"] == "reference" and info.engine["processor"]
        await check_bits(worker, models.a)
        await worker.stop()

    go(job())


def test_one_bad_request_does_not_spoil_a_batch(models: SimpleNamespace) -> None:
    async def job() -> None:
        for worker in both_kinds(models.a, OPTIONS):
            await worker.start()
            good, bad, other = request(2, 1), request(1, 2), request(3, 3)
            bad[0][0, 1, 2, 3] = np.nan
            alone = [(await worker.run([r], 1)).outputs[0][0].tobytes() for r in (good, other)]
            for _ in range(2):  # found out, and then looked for
                result = await worker.run([good, bad, other], 1)
                assert result.checked == ["", "input 'x' holds NaN or infinite values", ""]
                assert result.outputs[1] == []
                assert [result.outputs[i][0].tobytes() for i in (0, 2)] == alone
            bad[0][0, 1, 2, 3] = np.inf
            result = await worker.run([bad], 1)
            assert result.checked[0] and result.outputs == [[]]
            with pytest.raises(InputError, match="shape"):
                await worker.run([good, [np.zeros((1, 1, 8, 8), np.float32)]], 1)
            with pytest.raises(InputError, match="1 to 8 samples"):
                await worker.run([request(9)], 1)
            with pytest.raises(ConfigError, match="index 3"):
                await worker.run([good], 3)
            assert (await worker.run([good], 1)).outputs[0][0].tobytes() == alone[0]
            await worker.stop()

    go(job())


def test_whole_numbers_out_of_range_blame_their_request_only(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ThreadWorker(models.text, WorkerOptions(engine="reference", max_batch=8))
        info = await worker.start()
        assert [str(t) for t in info.inputs] == ["int64[N, 5]", "float32[N, 16]"]
        rng = np.random.default_rng(0)

        def words(high: int) -> list[np.ndarray[Any, Any]]:
            return [np.full((2, 5), high - 1, np.int64), rng.random((2, 16), dtype=np.float32)]

        requests = [words(50), words(51), words(3)]
        result = await worker.run(requests, 1)
        assert [bool(c) for c in result.checked] == [False, True, False] and "looks up row 50 of 50" in result.checked[1]
        engine = create_engine(load_program(models.text), "reference")
        for i in (0, 2):
            assert np.allclose(result.outputs[i][0], engine.run(requests[i], 1.0), rtol=0, atol=1e-6)
        alone = await worker.run([words(51)], 0)
        assert "looks up row 50 of 50" in alone.checked[0]
        await worker.stop()

    go(job())


def test_files_that_cannot_be_served_give_typed_errors(models: SimpleNamespace, tmp_path: Path) -> None:
    async def job() -> None:
        cases: list[tuple[Path, WorkerOptions, type[BitdialError], str]] = [
            (tmp_path / "none.bitdial", OPTIONS, ArtifactError, "none.bitdial"),
            (tmp_path, OPTIONS, ArtifactError, "no regular file"),
            (models.corrupt, OPTIONS, ArtifactError, "corrupt.bitdial.*get a sound copy"),
            (models.a, WorkerOptions(engine="abacus"), EngineError, "unknown engine 'abacus'"),
            (models.a, WorkerOptions(engine=ENGINE, engine_options={"speed": 3}), EngineError, "no option"),
        ]
        for path, chosen, kind, says in cases:
            for worker in both_kinds(path, chosen):
                with pytest.raises(kind, match=says):
                    await worker.start()
                assert not worker.alive
                await worker.stop()
        worker = ThreadWorker(models.interleaved, WorkerOptions(engine="reference"))
        with pytest.raises(UnservableError, match="output .* along which the samples"):
            await worker.start()

    go(job())


def test_overlapping_calls_are_refused_and_abandoned_ones_do_not_mix(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job() -> None:
        for worker in both_kinds(models.a, OPTIONS):
            await worker.start()
            freed: list[bool] = []
            worker.on_free = lambda freed=freed: freed.append(True)  # type: ignore[misc]
            requests = [request(n % 3 + 1, seed=n) for n in range(4)]
            alone = [(await worker.run([r], 1)).outputs[0][0].tobytes() for r in requests]
            assert not worker.busy and not freed
            for n, asked in enumerate(requests):
                call = asyncio.create_task(worker.run([requests[n - 1]], 1))
                await asyncio.sleep(0)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert worker.busy and len(freed) == n  # with what nobody waits for
                with pytest.raises(EngineError, match="has a batch already"):
                    await worker.run([asked], 1)
                await until(lambda worker=worker: not worker.busy)  # type: ignore[misc]
                assert len(freed) == n + 1
                assert (await worker.run([asked], 1)).outputs[0][0].tobytes() == alone[n]
            await worker.stop()

    slow_down(monkeypatch, 0.005)
    go(job())


def test_an_abandoned_batch_that_hangs_is_noticed(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, options(patience=0.3))
        lost: list[WorkerCrash] = []
        worker.on_lost = lost.append
        await worker.start()
        call = asyncio.create_task(worker.run([request(1)], 0))
        await asyncio.sleep(0.01)
        call.cancel()
        await until(lambda: bool(lost))
        assert "did not answer" in str(lost[0])
        await worker.stop()

    monkeypatch.setenv("BITDIAL_TEST_FAULT", "hang-after:0")
    go(job())


# ---- processes that die ----------------------------------------------------------------------------------------------------


def test_a_crash_loses_the_batch_and_says_so(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, OPTIONS)
        lost: list[WorkerCrash] = []
        worker.on_lost = lost.append
        await worker.start()
        for _ in range(3):
            await worker.run([request(1)], 0)
        for _ in range(2):  # the one that had it, and the next
            with pytest.raises(WorkerCrash, match="SIGSEGV"):
                await worker.run([request(1)], 0)
        assert len(lost) == 1 and not worker.alive
        await worker.stop()
        # while idle
        worker = ProcessWorker(models.a, OPTIONS)
        worker.on_lost = lost.append
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: len(lost) == 2)
        assert "SIGKILL" in str(lost[1])
        with pytest.raises(WorkerCrash, match="SIGKILL"):
            await worker.run([request(1)], 0)
        await worker.stop()
        monkeypatch.setenv("BITDIAL_TEST_FAULT", "crash-at-load")
        with pytest.raises(WorkerCrash, match="while loading: killed by SIGSEGV"):
            await ProcessWorker(models.a, OPTIONS).start()

    monkeypatch.setenv("BITDIAL_TEST_FAULT", "crash-after:3")
    go(job())


def test_a_hung_worker_is_killed(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, options(patience=1.5))
        lost: list[WorkerCrash] = []
        worker.on_lost = lost.append
        await worker.start()
        for _ in range(2):
            await worker.run([request(1)], 0)
            await asyncio.sleep(0.8)  # idle for longer than its patience in all: that is no hang
        begin = time.monotonic()
        with pytest.raises(WorkerCrash, match=r"did not answer for 1.5 s"):
            await worker.run([request(1)], 0)
        assert time.monotonic() - begin > 1.4
        assert len(lost) == 1
        await worker.stop()

    monkeypatch.setenv("BITDIAL_TEST_FAULT", "hang-after:2")
    go(job())


def test_stopping_waits_for_the_batch_but_not_for_ever(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, OPTIONS)
        await worker.start()
        call = asyncio.create_task(worker.run([request(2)], 0))
        await asyncio.sleep(0.02)
        await worker.stop()
        assert (await call).checked == [""]
        for fault in ("stuck-at-end", "hang-after:0"):
            monkeypatch.setenv("BITDIAL_TEST_FAULT", fault)
            worker = ProcessWorker(models.a, options(grace=0.2))
            await worker.start()
            call = asyncio.create_task(worker.run([request(2)], 0))
            await asyncio.sleep(0.05)
            pid, begin = worker.pid, time.monotonic()
            await worker.stop()
            assert time.monotonic() - begin > 0.1
            assert pid is not None and not is_there(pid)
            if fault == "hang-after:0":
                with pytest.raises(WorkerCrash, match="stopped"):
                    await call
            else:
                await call

    monkeypatch.setenv("BITDIAL_TEST_FAULT", "slow:0.2")
    go(job())


def test_cancelled_and_overlong_starts_leave_nothing(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, options(start_timeout=0.01))
        with pytest.raises(WorkerCrash, match="took longer than 0.01 s"):
            await worker.start()
        worker = ProcessWorker(models.a, OPTIONS)
        starting = asyncio.create_task(worker.start())
        await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        worker = ProcessWorker(models.a, OPTIONS)
        starting = asyncio.create_task(worker.start())
        await asyncio.sleep(0.01)
        await worker.stop()
        with pytest.raises(WorkerCrash, match="stopped"):
            await starting

    go(job())


def test_a_start_cancelled_in_the_moment_of_the_reply_leaves_nothing(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, OPTIONS)
        starting = asyncio.create_task(worker.start())
        answered = worker._message

        def answer_and_cancel(message: Any) -> None:
            answered(message)
            starting.cancel()

        worker._message = answer_and_cancel  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not worker.alive

    go(job())


def test_an_end_that_is_cancelled_leaves_nothing(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, OPTIONS)
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)  # it cannot end by itself
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping

    go(job())


def test_signals_to_the_group_leave_the_child_to_its_parent(models: SimpleNamespace) -> None:
    async def job() -> None:
        worker = ProcessWorker(models.a, OPTIONS)
        starting = asyncio.create_task(worker.start())
        await until(lambda: worker.pid is not None)
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)  # it may not even have begun
        await starting
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
        assert (await worker.run([request(1)], 0)).checked == [""]
        output = [os.readlink(f"/proc/{worker.pid}/fd/{n}") for n in (0, 1, 2)]
        assert (
            output[0] == "/dev/null" and output[1] == output[2]
        )  # what it prints does not mix with the server's output
        await worker.stop()

    go(job())


PARENT = """
    import asyncio, sys
    from bitdial.serving.worker.base import WorkerOptions
    from bitdial.serving.worker.process import ProcessWorker

    async def main():
        worker = ProcessWorker(sys.argv[1], WorkerOptions(engine=sys.argv[2], max_batch=2))
        info = await worker.start()
        asyncio.create_task(worker.run([[__import__("numpy").zeros((1, 3, 8, 8), "float32")]], 0))
        await asyncio.sleep(0.05)
        print(worker.pid, "torch" in sys.modules, "bitdial.engines.cpu._native" in sys.modules, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_a_worker_process_imports_nothing_of_the_server() -> None:
    program = "import sys, bitdial.serving.worker.child; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert "bitdial.serving.worker.model" in modules
    assert not modules & {"bitdial.serving.control", "bitdial.serving.worker.pool", "pydantic", "uvicorn", "torch"}


def test_a_child_dies_with_its_parent_and_neither_needs_torch(models: SimpleNamespace) -> None:
    path = [str(Path(bitdial.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "BITDIAL_TEST_FAULT": "hang-after:0", "PYTHONPATH": os.pathsep.join(path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(models.a), ENGINE],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid, *imported = parent.stdout.readline().split()
        try:
            assert imported == ["False", "False"]  # not by the server's process
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert ENGINE == "reference" or ("_native" in maps and "libtorch" not in maps)
        finally:
            parent.kill()
    asyncio.run(until(lambda: not is_there(int(pid))))  # in the middle of a batch that never ends


# ---- several workers -------------------------------------------------------------------------------------------------------


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Batches of processes that start from now on, and of threads."""
    real = LoadedModel.run

    def run(*arguments: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments)

    monkeypatch.setattr(LoadedModel, "run", run)
    monkeypatch.setenv("BITDIAL_TEST_FAULT", f"slow:{seconds}")


async def swap(
    pool: WorkerPool, path: Path | None = None, before: Callable[[Candidate], Awaitable[None]] | None = None
) -> ModelInfo:
    """Put a new version to use, after `before`; if that raises, the old workers stay."""
    candidate = await pool.prepare(path)
    try:
        if before is not None:
            await before(candidate)
    except BaseException:
        await candidate.discard()
        raise
    pool.commit(candidate)
    return candidate.info


async def compute(pool: WorkerPool, requests: list[Any], index: int) -> Result:
    """A batch on the first worker that is free; an index below 0 counts from its last ratio."""
    while (lease := pool.lease()) is None:
        await asyncio.sleep(0.001)
    index %= len(lease.worker.info.ratios)
    return await lease.run(requests, index)


@pytest.mark.parametrize("make", [ProcessWorker, ThreadWorker])
def test_a_leased_worker_is_one_batchs_own(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Worker]
) -> None:
    async def job() -> None:
        freed: list[bool] = []
        pool = WorkerPool(models.a, OPTIONS, workers=2, make=make, on_free=lambda: freed.append(True))
        assert pool.lease() is None  # not started
        info = await pool.start()
        assert pool.info is info and pool.alive == pool.idle == 2
        first, second = pool.lease(), pool.lease()
        assert first is not None and second is not None and first.worker is not second.worker
        assert pool.lease() is None and pool.idle == 0 and pool.alive == 2
        second.release()
        again = pool.lease()
        assert again is not None and again.worker is second.worker
        second.release()  # of no effect on whoever has it now
        assert pool.lease() is None
        assert (await again.run([request(1)], 0)).checked == [""]
        assert pool.idle == 1 and not freed
        # A batch that its caller gave up keeps its worker until it is done.
        call = asyncio.create_task(first.run([request(1)], 0))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert pool.idle == 1 and not freed
        await until(lambda: bool(freed))
        assert pool.idle == 2
        # The end: what runs is finished, nobody gets a worker any more.
        running = [asyncio.create_task(compute(pool, [request(1)], 0)) for _ in range(2)]
        await asyncio.sleep(0)
        await pool.stop()
        assert [(await r).checked for r in running] == [[""], [""]]
        assert pool.lease() is None and pool.idle == 0

    slow_down(monkeypatch, 0.05)
    go(job())


def test_a_worker_that_dies_while_leased(models: SimpleNamespace) -> None:
    async def job() -> None:
        pool = WorkerPool(models.a, OPTIONS)
        await pool.start()
        lease = pool.lease()
        assert lease is not None and isinstance(lease.worker, ProcessWorker) and lease.worker.pid is not None
        os.kill(lease.worker.pid, signal.SIGKILL)
        await until(lambda: pool.whole and pool.workers[0] is not lease.worker)  # there is a new one
        with pytest.raises(WorkerCrash, match="SIGKILL"):
            await lease.run([request(1)], 0)
        assert (await compute(pool, [request(1)], 0)).checked == [""]
        await pool.stop()

    go(job())


def test_a_pool_replaces_workers_that_crash_or_hang(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        events: list[str] = []
        pool = WorkerPool(
            models.a,
            options(patience=1.5),
            workers=2,
            on_free=lambda: events.append("free"),
            on_crash=lambda error: events.append("crash"),
            on_restart=lambda seconds: events.append("restart"),
            supervisor=Supervisor(first_delay=0.05),
        )
        await pool.start()
        await asyncio.gather(*(compute(pool, [request(1)], 0) for _ in range(2)))
        with pytest.raises(WorkerCrash, match="SIGSEGV"):
            await compute(pool, [request(1)], 0)
        assert pool.alive == 1
        await until(lambda: "free" in events)
        assert events == ["crash", "restart", "free"] and pool.alive == pool.idle == 2
        monkeypatch.setenv("BITDIAL_TEST_FAULT", "hang-after:0")  # of those started from now on
        with pytest.raises(WorkerCrash):
            await asyncio.gather(compute(pool, [request(1)], 0), compute(pool, [request(1)], 0))
        await until(lambda: events.count("restart") == 2)
        monkeypatch.delenv("BITDIAL_TEST_FAULT")
        ends = await asyncio.gather(*(compute(pool, [request(1)], 0) for _ in range(2)), return_exceptions=True)
        assert sorted(str(e).partition(":")[0] for e in ends) == [
            "the worker did not answer for 1.5 s and was killed",
            "the worker died",
        ]
        await until(lambda: events.count("crash") == 4 and pool.alive == 2)
        for _ in range(4):
            assert len(await asyncio.gather(compute(pool, [request(1)], 0), compute(pool, [request(2)], 1))) == 2
        await pool.stop()

    monkeypatch.setenv("BITDIAL_TEST_FAULT", "crash-after:1")
    go(job())


def test_attempts_to_replace_a_worker_become_rarer(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        loop = asyncio.get_running_loop()
        crashes: list[float] = []
        pool = WorkerPool(
            models.a,
            OPTIONS,
            on_crash=lambda e: crashes.append(loop.time()),
            supervisor=Supervisor(first_delay=0.2, longest_delay=0.4),
        )
        await pool.start()
        monkeypatch.setenv("BITDIAL_TEST_FAULT", "crash-at-load")
        (worker,) = pool.workers
        assert isinstance(worker, ProcessWorker) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: len(crashes) == 4)
        between = np.diff(crashes)
        assert between[1] > 0.2 and between[2] > 0.4
        waiting = asyncio.create_task(compute(pool, [request(1)], 0))
        monkeypatch.delenv("BITDIAL_TEST_FAULT")
        assert (await waiting).checked == [""]  # as soon as there is a worker again
        await pool.stop()

    go(job())


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """Have the next call of a function fail."""
    real, left = getattr(owner, name), [error]

    def call(*arguments: Any, **more: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, call)


def test_a_worker_is_replaced_whatever_its_restart_meets(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = OSError(24, "Too many open files")

    async def job() -> None:
        told: list[BitdialError] = []
        supervisor = Supervisor("model 'a'", first_delay=0.01, longest_delay=0.02, tries=2, patience=0.0)
        pool = WorkerPool(models.a, OPTIONS, on_crash=told.append, supervisor=supervisor)
        await pool.start()

        async def lose() -> None:
            (worker,) = pool.workers
            assert isinstance(worker, ProcessWorker) and worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: not worker.alive)

        # Descriptors are used up for a moment.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await lose()
            await until(lambda: len(told) >= 4)
            assert pool.alive == 0 and "replacing a worker has failed" in supervisor.problems()[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: pool.whole and not supervisor.problems())  # the step, and then what is known of it
        assert isinstance(told[1], EngineError) and "Too many open files" in str(told[1])
        # The same, or what nobody has foreseen, at one step of a start after the other.
        told.clear()
        fail_once(monkeypatch, socket, "socketpair", full)
        fail_once(monkeypatch, process_module.subprocess, "Popen", full)
        fail_once(monkeypatch, AsyncFrames, "__init__", full)
        fail_once(monkeypatch, process_module, "BatchMemory", ZeroDivisionError("unforeseen"))
        await lose()
        await until(lambda: pool.whole)
        assert [type(e) for e in told] == [WorkerCrash] + [EngineError] * 4 and "unforeseen" in str(told[-1])
        assert (await compute(pool, [request(1)], 0)).checked == [""]
        await pool.stop()

    go(job())
    logged = [r for r in caplog.records if r.exc_info]
    assert len(logged) == 1 and "model 'a': replacing a worker failed unexpectedly" in logged[0].getMessage()


def test_a_worker_that_dies_without_a_word_is_found(models: SimpleNamespace) -> None:
    async def job() -> None:
        pool = WorkerPool(models.a, OPTIONS)
        await pool.start()
        (worker,) = pool.workers
        worker.on_lost = None
        assert isinstance(worker, ProcessWorker) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not worker.alive)
        assert pool.alive == 0
        pool.look()
        pool.look()
        await until(lambda: pool.whole)
        await pool.stop()

    go(job())


def test_workers_restart_from_the_bytes_they_had(models: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever is written over the file meanwhile; a new version is read when it is asked for."""

    async def job(make: Callable[..., Worker], end: Callable[[Any], None], damage: bytes) -> None:
        path = tmp_path / "m.bitdial"
        path.write_bytes(models.a.read_bytes())
        pool = WorkerPool(path, OPTIONS, make=make)
        info = await pool.start()
        before = (await compute(pool, [request(1)], 1)).outputs[0][0].tobytes()
        path.write_bytes(damage)  # in place
        (worker,) = pool.workers
        end(worker)
        await until(lambda: not worker.alive)
        await until(lambda: pool.whole)
        assert pool.workers[0].info.digest == info.digest
        assert (await compute(pool, [request(1)], 1)).outputs[0][0].tobytes() == before
        path.write_bytes(models.b.read_bytes())
        assert (await swap(pool)).ratios == (0.0, 1.0)
        await compute(pool, [request(1)], 1)
        await pool.stop()

    def give_up(worker: ThreadWorker) -> None:
        worker._give_up(asyncio.get_running_loop().create_future(), "as if hung")

    go(job(ProcessWorker, lambda worker: os.kill(worker.pid, signal.SIGKILL), models.b.read_bytes()))
    go(job(ThreadWorker, give_up, b"no model"))


# ---- a new version ---------------------------------------------------------------------------------------------------------


def test_a_new_version_takes_over_without_losing_a_batch(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job() -> None:
        path = tmp_path / "m.bitdial"
        path.write_bytes(models.a.read_bytes())
        freed: list[bool] = []
        pool = WorkerPool(path, OPTIONS, workers=2, on_free=lambda: freed.append(True))
        await pool.start()
        monkeypatch.setenv("BITDIAL_TEST_FAULT", "slow:0.001")
        x = request(2)
        old, new = (
            create_engine(load_program(p), OPTIONS.engine, **OPTIONS.engine_options).run(x[0], 1.0).tobytes()
            for p in (models.a, models.b)
        )
        answers: list[bytes] = []
        stopping = False

        async def client() -> None:
            while not stopping:
                answers.append((await compute(pool, [x], -1)).outputs[0][0].tobytes())
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client()) for _ in range(3)]
        await asyncio.sleep(0.05)
        other = tmp_path / "new"
        other.write_bytes(models.b.read_bytes())
        os.replace(other, path)
        before: list[int] = []

        async def look(candidate: Candidate) -> None:
            before.append(pool.alive)
            assert (await candidate.workers[0].run([x], 1)).outputs[0][0].tobytes() == new

        while (leased := pool.lease()) is None:
            await asyncio.sleep(0)
        info = await swap(pool, before=look)
        assert pool.info is info and info.ratios == (0.0, 1.0) and before == [2]
        assert (await leased.run([x], 2)).outputs[0][0].tobytes() == old  # as was decided for it
        await until(lambda: not leased.worker.alive)
        await asyncio.sleep(0.1)
        stopping = True
        await asyncio.gather(*clients)  # none failed
        assert set(answers) == {old, new} and answers[-1] == new and freed == [True]
        first = answers.index(new)
        assert old not in answers[first + 4 :]  # at most those that were running
        await pool.stop()

    go(job())


def test_a_bad_new_version_leaves_the_old_one_in_place(models: SimpleNamespace) -> None:
    async def job() -> None:
        pool = WorkerPool(models.a, OPTIONS, workers=2)
        info = await pool.start()
        pids = [w.pid for w in pool.workers if isinstance(w, ProcessWorker)]
        expected = (await compute(pool, [request(1)], 2)).outputs[0][0].tobytes()

        async def refuse(candidate: Candidate) -> None:
            raise ConfigError("not this one")

        cases: list[tuple[Path, type[BitdialError], str, Callable[[Candidate], Awaitable[None]] | None]] = [
            (models.corrupt, ArtifactError, "sound copy", None),
            (models.a.with_name("none"), ArtifactError, "none", None),
            (models.c, SignatureError, r"outputs were .* float32\[N, 10\] and are .* float32\[N, 7\]", None),
            (models.b, ConfigError, "not this one", refuse),
        ]
        for path, kind, says, before in cases:
            with pytest.raises(kind, match=says):
                await swap(pool, path, before)
            assert pool.info is info and [w.pid for w in pool.workers if isinstance(w, ProcessWorker)] == pids
            assert (await compute(pool, [request(1)], 2)).outputs[0][0].tobytes() == expected
        await pool.stop()

    go(job())


def test_pools_of_threads_work_alike(models: SimpleNamespace) -> None:
    async def job() -> None:
        pool = WorkerPool(models.a, OPTIONS, workers=2, make=ThreadWorker)
        await pool.start()
        await asyncio.gather(*(compute(pool, [request(n % 3 + 1)], 1) for n in range(8)))
        info = await swap(pool, models.b)
        assert info.ratios == (0.0, 1.0)
        await compute(pool, [request(1)], 1)
        await pool.stop()

    go(job())


# ---- with other parts ------------------------------------------------------------------------------------------------------


def test_a_real_worker_is_measured(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdial.serving.worker.calibration.TRUSTED", 1e9)  # other tests share the cores

    async def job() -> None:
        worker = ProcessWorker(models.a, options(max_batch=64))
        await worker.start()
        table = await measure_table(worker, 64, seconds=0.5)
        assert table.ratios == worker.info.ratios and table.batches == (1, 2, 4, 8, 16, 32, 64)
        assert all(a is not None for a in table.accuracy)
        assert table.latency(0, 64) > 1.2 * table.latency(0, 1)
        again = await measure_table(worker, 64, seconds=0.5)
        assert again == table  # remembered
        await worker.stop()

    go(job())


def test_workers_run_on_uvloop(models: SimpleNamespace) -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")

    async def job() -> None:
        pool = WorkerPool(models.a, OPTIONS)
        await pool.start()
        await check_bits(pool.workers[0], models.a)
        (worker,) = pool.workers
        assert isinstance(worker, ProcessWorker) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: pool.alive == 0)
        await compute(pool, [request(1)], 0)
        await pool.stop()

    uvloop.new_event_loop().close()  # the first of a process leaves a pipe behind, for signals
    before = held()
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(job(), 300))
    finally:
        loop.close()
    assert held() == before
