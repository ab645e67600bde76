"""The live page's addresses: `/`, its static files, and the JSON it polls under `/live/`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypedDict

from fastapi import APIRouter, Query
from fastapi.params import Depends
from fastapi.responses import Response

from bitdial.serving.metrics import ModelMetrics
from bitdial.serving.page import file_bytes
from bitdial.serving.protocol.response import plain_json

# All that is ever served, by name: no path of a request reaches the file system.
STATIC = {
    "app.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LIVE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class ServerState(TypedDict):
    """version of bitdial; uptime_s in seconds; processor as people call it."""

    version: str
    uptime_s: float
    processor: str


class LayerState(TypedDict):
    """One quantized layer: name, kind ("conv"), multiply-accumulates per sample, whether it may run low at all, and per ratio the
    share (0..1) of its multiply-accumulates that does."""

    name: str
    kind: str
    macs: int
    eligible: bool
    low_share: Sequence[float]


class ModelState(TypedDict, total=False):
    """One model. `name` and `state` ("starting", "ready", "draining", "failed") are needed; the rest may be missing or None as
    long as it is not known.

    ratios and accuracy (0..1 or None), one per ratio; slo_ms; policy as on the command line; inputs and outputs: TensorInfo as
    JSON; engine: JSON-able facts; layers; table: ServiceTable.as_json(); workers: how many there should be; digest: SHA-256 of
    the file; message: why it failed.
    """

    name: str
    state: str
    ratios: Sequence[float]
    accuracy: Sequence[float | None]
    slo_ms: float
    policy: str
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    engine: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    table: Mapping[str, Any] | None
    workers: int
    digest: str
    message: str


class LiveState(TypedDict):
    """What `/live/state` answers."""

    server: ServerState
    models: Sequence[ModelState]


class LiveSource(Protocol):
    """What the page needs of a server."""

    def live_state(self) -> LiveState:
        """The server and its models as they stand."""
        ...

    def live_metrics(self, model: str) -> ModelMetrics | None:
        """Counts of one model; None where there is none of that name."""
        ...


def page_router(source: LiveSource, live_dependencies: Sequence[Depends] = ()) -> APIRouter:
    """Routes of the page. `live_dependencies` (such as the check of the API key) guard `/live/`; the page itself and its files
    tell nothing of the server and are open, so that a browser can ask for the key."""
    router = APIRouter()
    files = {name: file_bytes(name) for name in STATIC}
    index = file_bytes("index.html")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(index, media_type="text/html; charset=utf-8", headers=HEADERS)

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            return _missing("there is no such file")
        return Response(files[name], media_type=STATIC[name], headers=HEADERS)

    guards = list(live_dependencies)
    answers: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}}}}

    @router.get("/live/state", dependencies=guards, response_class=Response, responses=answers)
    async def state() -> Response:
        """The server and its models as they stand, for the live page."""
        return _json(json.dumps(plain_json(source.live_state()), allow_nan=False))

    answers = {**answers, 404: {"description": "no such model", "content": {"application/json": {}}}}

    @router.get("/live/history", dependencies=guards, response_class=Response, responses=answers)
    async def history(
        model: Annotated[str, Query(max_length=1024)],
        since: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    ) -> Response:
        """What a model did, second by second, for the live page: rows that ended after `since` (a `now` of an earlier answer)."""
        metrics = source.live_metrics(model)
        if metrics is None:
            return _missing("there is no such model")
        return _json(history_json(metrics, since))

    return router


def history_json(metrics: ModelMetrics, since: float | None = None) -> str:
    """{"now": seconds, "present": {...}, "rows": [...]}, see ModelMetrics.present and History.rows_json."""
    metrics.read()
    now = metrics.clock()
    present = json.dumps(plain_json(metrics.present()), allow_nan=False)
    rows = metrics.history.rows_json(now, -math.inf if since is None else since)
    return f'{{"now":{metrics.history.clock(now):.6f},"present":{present},"rows":{rows}}}'


def _json(text: str) -> Response:
    return Response(text, media_type="application/json", headers=LIVE_HEADERS)


def _missing(message: str) -> Response:
    return Response(json.dumps({"error": message}), 404, headers=LIVE_HEADERS, media_type="application/json")
