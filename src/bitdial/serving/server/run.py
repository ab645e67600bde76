"""Starting a server, keeping it running, and ending it: sockets, TLS, signals, uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from bitdial.engines.base import engine_spec
from bitdial.errors import BitdialError, ConfigError
from bitdial.processor import processor_name, usable_cores
from bitdial.serving.metrics.exposition import make_registry
from bitdial.serving.page.routes import STATIC
from bitdial.serving.server.access import Access
from bitdial.serving.server.app import Application
from bitdial.serving.server.config import ModelConfig, ServerConfig
from bitdial.serving.server.connection import PASS, Limits, guarded, look_after
from bitdial.serving.server.descriptors import connection_limit
from bitdial.serving.server.model import ServedModel
from bitdial.serving.server.routes import create_api
from bitdial.serving.supervision import Supervisor
from bitdial.serving.worker.base import WorkerOptions
from bitdial.serving.worker.pool import MakeWorker
from bitdial.serving.worker.process import ProcessWorker
from bitdial.serving.worker.scheduling import FRONT_SLICE, set_slice

GRACE = 2.0  # seconds that connections get to take their last answers
# Seconds between the last answer and the closing of connections. What comes in on open ones in between is answered 503 and
# "Connection: close", so that no client finds its connection gone with a request on it.
LAST_CALL = 0.25
PAGE_PATHS = ["/", *(f"/static/{name}" for name in STATIC)]

logger = logging.getLogger("bitdial.serving")


@dataclass
class Server:
    """A server that listens. address: as clients write it, "http://127.0.0.1:8000". supervisor: of its own background tasks,
    beside those of its models. Made by `start`."""

    config: ServerConfig
    models: dict[str, ServedModel]
    application: Application
    address: str
    port: int
    supervisor: Supervisor
    _uvicorn: _Uvicorn
    _serving: asyncio.Task[None]

    async def stop(self, drain: float | None = None) -> bool:
        """Stop: refuse new requests, answer those taken in (at most `drain` seconds; None: as configured), end all workers.
        Whether all were answered."""
        seconds = self.config.drain_timeout if drain is None else drain
        done = await asyncio.gather(*(m.drain(seconds) for m in self.models.values()))
        if self._uvicorn.server_state.connections and seconds > 0:
            await asyncio.sleep(LAST_CALL)
        self._uvicorn.should_exit = True
        await asyncio.wait([self._serving])
        await self.supervisor.stop()
        await asyncio.gather(*(m.stop() for m in self.models.values()))
        return all(done)

    async def reload(self) -> None:
        """Read all model files again; what cannot be loaded is logged, and its version before stays."""
        for model in self.models.values():
            with contextlib.suppress(BitdialError):  # `reload` has logged it
                await model.reload()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_models(config: ServerConfig, registry: Any = None, make: MakeWorker = ProcessWorker) -> dict[str, ServedModel]:
    """The models of a configuration, not started. make: what makes a worker.

    Raises ConfigError for a service table that cannot be read."""
    shares = sum(model.workers for model in config.models)
    return {
        model.name: ServedModel(
            model.name,
            model.path.absolute(),  # fixed for good, whatever the folder at hand is later
            model.settings(),
            model.policy,
            options=WorkerOptions(engine=model.engine, engine_options=engine_options(model, shares)),
            workers=model.workers,
            table=model.read_table(),
            registry=registry,
            record=config.record_file(model.name),
            make=make,
            dilation=model.dilation,
        )
        for model in config.models
    }


def engine_options(model: ModelConfig, workers: int) -> dict[str, Any]:
    """Options of a model's engine; workers: of all models, who share the cores."""
    options = model.given_engine_options()
    if model.engine is None or "threads" in engine_spec(model.engine).options:
        options["threads"] = model.threads or max(1, usable_cores() // workers)
    return options


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ConfigError that says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {reason}; choose another --host or --port (0: any free port)"
        ) from None


async def start(
    config: ServerConfig,
    progress: Callable[[str, float, str], None] | None = None,
    make: MakeWorker = ProcessWorker,
) -> Server:
    """Listen, then load the models one after another; health answers from the beginning, inference once a model is ready.

    progress: told a model's name, a share in 0..1, and what is going on. make: what makes a worker.
    Raises BitdialError; then nothing is left running.
    """
    registry = make_registry()
    models = make_models(config, registry, make)
    connections = connection_limit(config)
    listener = bind(config)
    access = Access(config.api_key, PAGE_PATHS)
    supervisor = Supervisor()
    api = create_api(models, registry, processor_name(), access.needs_key, supervisor)
    application = Application(models, api, access, *config.body_limits())
    web = _Uvicorn(_uvicorn_config(config, application, listener, connections))
    serving = asyncio.get_running_loop().create_task(web.serve(sockets=[listener]))
    supervisor.every(PASS, "looking after connections", lambda: look_after(web.server_state))
    scheme = "https" if config.tls_cert else "http"
    host, port = listener.getsockname()[:2]
    address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    server = Server(config, models, application, address, port, supervisor, web, serving)
    try:
        for model in models.values():
            if progress is not None:
                progress(model.name, 0.0, "loading")
            await model.start(None if progress is None else _of(model.name, progress))
        return server
    except BaseException:
        await server.stop(drain=0.0)
        raise


def _of(name: str, progress: Callable[[str, float, str], None]) -> Callable[[float, str], None]:
    return lambda share, text: progress(name, share, text)


def _uvicorn_config(
    config: ServerConfig, application: Application, listener: socket.socket, connections: int
) -> uvicorn.Config:
    protocol = guarded(Limits(header=config.header_timeout, body=config.body_timeout, connections=connections))
    result = uvicorn.Config(
        application,
        http=protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(config.keep_alive)),
        timeout_graceful_shutdown=max(1, round(GRACE)),
        ssl_certfile=None if config.tls_cert is None else str(config.tls_cert),
        ssl_keyfile=None if config.tls_key is None else str(config.tls_key),
    )
    try:
        result.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        listener.close()
        raise ConfigError(
            f"TLS cannot be set up with {config.tls_cert} and {config.tls_key}: {error}; both must be PEM files that fit each "
            "other, the key without a password"
        ) from None
    return result


async def run(
    config: ServerConfig,
    ready: Callable[[Server], None],
    progress: Callable[[str, float, str], None] | None = None,
) -> int:
    """Serve until a signal ends it; the exit status. SIGTERM and SIGINT stop gracefully, a second one at once; SIGHUP reads the
    model files again. ready: called once all models are. Raises BitdialError if the server cannot start."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()
    starting: asyncio.Task[Server] | None = None

    def stop(number: int) -> None:
        if stopping.is_set():
            logger.warning("stopping at once")
            os._exit(128 + number)  # workers end with this process
        stopping.set()
        if starting is not None and not starting.done():
            starting.cancel()

    def reload() -> None:
        if starting is not None and starting.done() and not stopping.is_set():
            server = starting.result()
            task = server.supervisor.once("loading the models again", server.reload)
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, reload)
    starting = loop.create_task(start(config, progress))
    try:
        server = await starting
    except asyncio.CancelledError:
        return 0
    gc.collect()
    gc.freeze()  # what is there now stays: not to be looked through again while requests wait
    gc.set_threshold(10_000, 20, 20)
    set_slice(FRONT_SLICE)
    ready(server)
    stopped = loop.create_task(stopping.wait())
    await asyncio.wait([stopped, server._serving], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.is_set():
        error = None if server._serving.cancelled() else server._serving.exception()
        logger.error("the web server has ended by itself, and the process ends with it", exc_info=error)
    for task in list(reloads):
        task.cancel()
    complete = await server.stop()
    if not complete:
        logger.warning("not all requests were answered within %g s", config.drain_timeout)
    return 0 if complete and stopping.is_set() else 1


def run_with_uvloop(main: Callable[[], Any]) -> int:
    """`asyncio.run`, on uvloop where it is there."""
    try:
        import uvloop
    except ImportError:
        return int(asyncio.run(main()))
    return int(uvloop.run(main()))
