"""One replica: a model on an engine in this process, its own scheduler and dial, and the inference protocol in front of it.

Ray makes a `Replica` in a process of its own on one of the cluster's machines, and calls the ASGI application of `replica_app`
with every request that its proxy gives to this replica.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
from typing import Any

from bitdial.processor import processor_name
from bitdial.serving.control import ServiceTable
from bitdial.serving.errors import NotReady
from bitdial.serving.metrics.exposition import make_registry
from bitdial.serving.ray.config import DeployConfig, make_deploy_config
from bitdial.serving.ray.errors import DeployError
from bitdial.serving.ray.scaling import METRIC, WorkMeter
from bitdial.serving.ray.store import STORES, MemoryFile
from bitdial.serving.server.access import Access
from bitdial.serving.server.app import Application, Message, Receive, Scope, Send, send_error, without_slash
from bitdial.serving.server.config import KEY_VARIABLE, check_key
from bitdial.serving.server.model import ServedModel
from bitdial.serving.server.routes import create_api
from bitdial.serving.server.run import PAGE_PATHS
from bitdial.serving.worker.base import WorkerOptions
from bitdial.serving.worker.thread import ThreadWorker

HEADER = b"bitdial-replica"  # of every answer: which replica gave it
_RELOAD = ("/v2/repository/models/", "/load")  # how such a request's path begins and ends
_started: dict[str, Any] = {}  # "app": of this process's replica, once there is one

logger = logging.getLogger("bitdial.serving")


class Replica:
    """The class that Ray makes replicas of. All of its arguments are plain text; see `deployment.build`.

    settings  DeployConfig as JSON
    table     ServiceTable as JSON; None: measured now, or known from an earlier start on this machine
    store     name of the actor that holds the model file; None: the file is read at its path
    digest    sha256 that the file must have; None: any
    """

    # Ray awaits it, on the event loop that requests will be answered on.
    async def __init__(  # type: ignore[misc]
        self, settings: str, table: str | None = None, store: str | None = None, digest: str | None = None
    ) -> None:
        config = make_deploy_config(json.loads(settings))
        self.name = replica_name()
        self._file = None if store is None else await fetch_model(store)
        known = None if table is None else ServiceTable.from_json(table)
        registry = make_registry()
        self.model = await start_model(config, known, self._file, registry, digest)
        self._work = WorkMeter()
        self._gauges = RayGauges(config.model.name)
        _started["app"] = make_app(config, self.model, self.name, registry)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray asks every few seconds and hands to `scaling.WorkPolicy`."""
        metrics = self.model.metrics
        assert metrics is not None
        total = self._work.read(self.model.scheduler, metrics.arrived_samples)
        self._gauges.show(self.model, total)
        return {METRIC: total}

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        problems = self.model.supervisor.problems()
        if problems:
            raise NotReady("; ".join(problems))
        if not self.model.ready:
            raise NotReady(f"model '{self.model.name}' is {self.model.state} {self.model.reason}".rstrip())

    async def __del__(self) -> None:
        """Called when Ray lets go of the replica, after the requests that it was given have been answered."""
        model: ServedModel | None = getattr(self, "model", None)  # it may have failed to start
        if model is not None:
            await model.stop()
        file: MemoryFile | None = getattr(self, "_file", None)
        if file is not None:
            file.close()


def replica_app() -> ReplicaApp:
    """The ASGI application of this process's replica; Ray calls it once the replica is there."""
    app: ReplicaApp = _started["app"]
    return app


def replica_name() -> str:
    """Of the replica in this process, unique on the cluster."""
    serve = importlib.import_module("ray.serve")
    return str(serve.get_replica_context().replica_tag)


async def fetch_model(store: str) -> MemoryFile:
    """A shipped model file. Raises DeployError if the actor that holds it is gone."""
    ray = importlib.import_module("ray")

    def fetch() -> bytes:
        data: bytes = ray.get(ray.get_actor(store, namespace=STORES).fetch.remote())
        return data

    try:
        return MemoryFile(await asyncio.to_thread(fetch), store)
    except (ValueError, ray.exceptions.RayError) as error:
        raise DeployError(f"the shipped model file is not on the cluster any more ({error}): deploy again") from error


async def start_model(
    config: DeployConfig, table: ServiceTable | None, file: MemoryFile | None, registry: Any, digest: str | None = None
) -> ServedModel:
    """The model, ready. Raises BitdialError, also if the file is not the one with that sha256."""
    given = config.model
    options = WorkerOptions(
        engine=given.engine, engine_options={"threads": config.threads, **given.given_engine_options()}
    )
    model = ServedModel(
        given.name, given.path if file is None else file.path, given.settings(), given.policy,
        options=options, table=table, registry=registry, make=ThreadWorker,
    )  # fmt: skip
    await model.start()
    if digest is not None and model.info.digest != digest:
        await model.stop()
        raise DeployError(
            f"{given.path} is not the same file on this node as where the application was deployed: deploy again, or with --ship"
        )
    return model


def make_app(config: DeployConfig, model: ServedModel, name: str, registry: Any) -> ReplicaApp:
    """The same application as `bitdial serve` runs, as a replica answers with it."""
    key = config.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is not None:
        check_key(key, KEY_VARIABLE)
    models = {model.name: model}
    access = Access(key, PAGE_PATHS)
    api = create_api(models, registry, processor_name(), access.needs_key)
    return ReplicaApp(Application(models, api, access, *config.body_limits()), name)


class ReplicaApp:
    """Around the server's application: paths without the route prefix, answers that say which replica gave them, and no hot
    reload, which would reach one replica of several."""

    def __init__(self, inner: Application, name: str) -> None:
        self.inner, self._header = inner, (HEADER, name.encode("latin-1", "replace"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        prefix, path = scope.get("root_path", "").rstrip("/"), scope["path"]
        if prefix:
            path = path.removeprefix(prefix) or "/"
            scope = {**scope, "path": path, "root_path": "", "raw_path": path.encode()}
        if path.startswith(_RELOAD[0]) and without_slash(path).endswith(_RELOAD[1]):
            await send_error(
                labelled, 400, "a model on a cluster is not loaded again by a request: deploy the new file"
            )
            return
        await self.inner(scope, receive, labelled)


class RayGauges:
    """A replica's state among Ray's own metrics, which Ray labels with the replica and exports for Prometheus. (The application's
    /metrics has far more, but through the proxy it answers for one replica, another one each time.)"""

    def __init__(self, model: str) -> None:
        gauge = importlib.import_module("ray.serve.metrics").Gauge

        def make(name: str, description: str) -> Any:
            made = gauge(f"bitdial_{name}", description=description, tag_keys=("model",))
            made.set_default_tags({"model": model})  # Ray adds to the dict that it is given
            return made

        self._ratio = make("ratio", "Where the replica's dial stands: share of low precision, 0 to 1")
        self._depth = make("queue_depth", "Requests that wait at the replica")
        self._wait = make("oldest_wait_seconds", "How long the oldest of them has waited")
        self._work = make("work_8bit_seconds", "Work that has arrived since the replica started, at the smallest ratio")

    def show(self, model: ServedModel, work: float) -> None:
        """Set them."""
        scheduler = model.scheduler
        self._ratio.set(scheduler.table.table.ratios[scheduler.current])
        self._depth.set(len(scheduler.queue))
        self._wait.set(scheduler.oldest_wait(model.clock()))
        self._work.set(work)
