"""A server on a thread of its own whose workers are quick fakes, and plain sockets to be rude to it with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvloop

from bitdial.errors import ArtifactError
from bitdial.serving.control import ServiceTable
from bitdial.serving.server.config import make_config
from bitdial.serving.server.run import Server, start
from bitdial.serving.worker.base import Result, WorkerOptions
from bitdial.serving.worker.errors import WorkerCrash
from bitdial.serving.worker.file import ModelFile, read_descriptor
from bitdial.serving.worker.info import ModelInfo, TensorInfo

T = TypeVar("T")
RATIOS = (0.0, 0.5, 1.0)
SHAPE = (3, 8, 8)
LIMIT = 120.0  # seconds after which something hangs: generous, other programs may hold the machine up


class FakeWorker:
    """Answers with the mean of every image and the ratio index. Its "model file" is JSON: ratios, accuracy, seconds of a batch
    at every ratio, `modelled` those that a model says; anything else is corrupt. `crash` in the file: batches that run before it
    dies. fault: called when it starts, to raise what it is to fail with."""

    def __init__(self, file: ModelFile, options: WorkerOptions, fault: Callable[[], None] | None = None) -> None:
        self.file, self.options, self.fault = file, options, fault
        self.on_lost: Callable[[WorkerCrash], None] | None = None
        self.on_free: Callable[[], None] | None = None
        self.alive = self.busy = False
        self._info: ModelInfo | None = None
        self.content: dict[str, Any] = {}
        self.batches: list[tuple[list[int], int]] = []
        self.paces: list[float] = []
        self.free = asyncio.Event()
        self.free.set()

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None
        return self._info

    async def start(self) -> ModelInfo:
        if self.fault is not None:
            self.fault()
        text = read_descriptor(self.file.fileno(), self.file.path).decode()
        try:
            self.content = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{self.file.path} is damaged: {error}") from error
        await asyncio.sleep(self.content.get("load", 0.0))
        shape = tuple(self.content.get("shape", SHAPE))
        ratios = tuple(self.content.get("ratios", RATIOS))
        accuracy = tuple(self.content.get("accuracy", [0.9 - 0.1 * r for r in ratios]))
        self._info = ModelInfo(
            self.options.name or "fake", (TensorInfo("x", "float32", (-1, *shape)),),
            (TensorInfo("mean", "float32", (-1,)), TensorInfo("index", "float32", (-1, 2))),
            ratios, accuracy, {"name": "fake", "threads": 1}, [], str(hash(text)),
            modelled=tuple(self.content.get("modelled", ())),
        )  # fmt: skip
        self.alive = True
        return self._info

    async def run(self, requests: Sequence[Sequence[np.ndarray[Any, Any]]], index: int, pace: float = 0.0) -> Result:
        if not self.alive:
            raise WorkerCrash("the worker has been stopped")
        begin = time.monotonic()
        if len(self.batches) >= self.content.get("crash", 1 << 60):
            await asyncio.sleep(0.002)
            self.alive = False
            error = WorkerCrash("the worker died: killed by SIGSEGV")
            if self.on_lost is not None:
                self.on_lost(error)
            raise error
        self.batches.append(([len(r[0]) for r in requests], index))
        seconds = self.content.get("seconds", [0.0] * len(self.info.ratios))[index]
        if seconds:
            await asyncio.sleep(seconds)
        await self.free.wait()
        outputs, checked = [], []
        for (x,) in requests:
            good = bool(np.isfinite(x).all())
            checked.append("" if good else "input 'x' holds NaN or infinity")
            mean = x.reshape(len(x), -1).mean(1).astype(np.float32)
            outputs.append([mean, np.full((len(x), 2), index, np.float32)] if good else [])
        if pace:
            self.paces.append(pace)
            return Result(outputs, index, self.info.modelled[index], checked, bool(self.content.get("overrun")))
        return Result(outputs, index, time.monotonic() - begin, checked)

    def die(self, tell: bool = True) -> None:
        """As if killed between two batches; tell: and the pool learns of it."""
        self.alive = False
        if tell and self.on_lost is not None:
            self.on_lost(WorkerCrash("the worker died: killed by SIGKILL"))

    async def stop(self) -> None:
        self.alive = False


def write_model(path: Path, **content: Any) -> Path:
    """A fake's model file, put in place in one step."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)
    return path


def write_table(path: Path, seconds: Sequence[float] = (0.001, 0.001, 0.001), ratios: Sequence[float] = RATIOS) -> Path:
    """A service table: one image costs a fourth of a batch of 16."""
    rows = tuple((s / 4, s) for s in seconds)
    table = ServiceTable(tuple(ratios), (1, 16), rows, tuple(0.9 for _ in ratios))
    path.write_text(json.dumps(table.as_json()))
    return path


class Running:
    """A server on its own thread. `workers`: all fakes that were ever made."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, workers: list[FakeWorker]) -> None:
        self.server, self.loop, self.workers = server, loop, workers
        self.port, self.address = server.port, f"127.0.0.1:{server.port}"
        self.stopped = False

    def do(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(job, self.loop).result(LIMIT)

    def hold(self, on: bool = True) -> None:
        """Whether batches of the workers that there are stay unanswered."""
        for worker in self.workers:
            self.loop.call_soon_threadsafe(worker.free.clear if on else worker.free.set)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function on the server's loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def model(self, name: str = "m") -> Any:
        return self.server.models[name]


@contextlib.contextmanager
def serving(
    models: dict[str, Path],
    tables: dict[str, Path],
    make: Any = None,
    server: dict[str, Any] | None = None,
    fault: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server of these models; options as in ServerConfig (`server`) and ModelOptions. fault: of all workers, see FakeWorker."""
    made: list[FakeWorker] = []

    def make_fake(file: ModelFile, chosen: WorkerOptions) -> FakeWorker:
        made.append(FakeWorker(file, chosen, fault))
        return made[-1]

    file = {
        "models": [
            {"name": n, "path": str(p), **({"table": str(tables[n])} if n in tables else {})} for n, p in models.items()
        ]
    }
    config = make_config([], file, {"port": 0, **(server or {})}, {"max_batch": 16, **options})
    ready: Future[Running] = Future()
    finish = threading.Event()

    async def main() -> None:
        try:
            running = Running(await start(config, make=make or make_fake), asyncio.get_running_loop(), made)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(running)
        while not finish.is_set():
            await asyncio.sleep(0.01)
        if not running.stopped:
            await running.server.stop(drain=2.0)

    thread = threading.Thread(target=lambda: uvloop.run(main()), daemon=True)
    thread.start()
    try:
        yield ready.result(LIMIT)
    finally:
        finish.set()
        thread.join(LIMIT)
        assert not thread.is_alive(), "the server did not stop"


def until(condition: Callable[[], bool], seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def http(port: int, data: bytes, seconds: float = LIMIT, pieces: Sequence[tuple[float, bytes]] = ()) -> bytes:
    """Send bytes (then pieces, each after a pause), and all that comes back until the server closes or is silent for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        with contextlib.suppress(ConnectionError, TimeoutError):
            client.sendall(data)
            for pause, piece in pieces:
                time.sleep(pause)
                client.sendall(piece)
        return receive(client)


def receive(client: socket.socket) -> bytes:
    """One answer, or what there is of it."""
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while True:
            head, separator, body = answer.partition(b"\r\n\r\n")
            if separator:
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if length and len(body) >= int(length[0].split(b":")[1]):
                    break
            more = client.recv(65536)
            if not more:
                break
            answer += more
    return answer


def status(answer: bytes) -> int:
    """0: no answer."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def message(answer: bytes) -> str:
    """The text of an error document."""
    content = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert list(content) == ["error"]
    return str(content["error"])


def infer_bytes(
    x: np.ndarray[Any, Any] | None = None, model: str = "m", headers: str = "", parameters: dict[str, Any] | None = None,
    **changes: Any,
) -> bytes:  # fmt: skip
    """A request with binary tensors; changes: of its JSON part."""
    x = np.ones((1, *SHAPE), np.float32) if x is None else x
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [tensor], "parameters": parameters or {}, **changes}).encode()
    body = header + x.tobytes()
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n{headers}\r\n"
    ).encode() + body
