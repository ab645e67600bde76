"""Everything but inference: health, metadata, hot reload, metrics, the live page's data. Built on FastAPI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from bitdial._version import __version__
from bitdial.errors import BitdialError
from bitdial.serving.errors import BadRequest, NotReady, ServingError
from bitdial.serving.page.routes import page_router
from bitdial.serving.protocol.jsontext import parse_json
from bitdial.serving.protocol.metadata import model_config, model_metadata, server_metadata
from bitdial.serving.protocol.response import VERSION, plain_json
from bitdial.serving.server import documents as doc
from bitdial.serving.server.app import find_model
from bitdial.serving.server.live import Live, statistics
from bitdial.serving.server.model import ServedModel
from bitdial.serving.supervision import Supervisor

_errors = doc.error_responses


def create_api(
    models: Mapping[str, ServedModel],
    registry: Any = None,
    processor: str = "",
    needs_key: bool = False,
    supervisor: Supervisor | None = None,
) -> FastAPI:
    """The API of these models, with the live page. registry: prometheus_client's, for /metrics; None: no such page. processor:
    for people. needs_key: said in the description; the check itself is `Application`'s. supervisor: of the server's own tasks."""
    api = FastAPI(
        title="bitdial",
        version=__version__,
        description="Open Inference Protocol v2, for models with a dial between 8-bit and lower precision.",
        docs_url=None,  # their pages come from other hosts
        redoc_url=None,
        redirect_slashes=False,  # `Application` leaves them out of every path
    )
    _explain_errors(api)
    _add_health(api, models, supervisor or Supervisor())
    _add_models(api, models)
    _add_repository(api, models)
    api.include_router(page_router(Live(models, processor)), tags=["live page"])
    if registry is not None:
        _add_metrics(api, registry)
    api.openapi = _describe(api, models, needs_key)  # type: ignore[method-assign]
    return api


def _explain_errors(api: FastAPI) -> None:
    def answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: "there is nothing at this address", 405: "this address does not know this method"}
        return answer(error.status_code, known.get(error.status_code, str(error.detail)), error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(400, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @api.exception_handler(BitdialError)
    async def ours(request: Request, error: BitdialError) -> JSONResponse:
        retry = error.retry_header() if isinstance(error, ServingError) else None
        headers = {} if retry is None else {"retry-after": str(retry)}
        return answer(getattr(error, "status", 500), str(error), headers)


def _add_health(api: FastAPI, models: Mapping[str, ServedModel], supervisor: Supervisor) -> None:
    @api.get("/v2", tags=["server"], responses={200: {"model": doc.ServerMetadata}, **_errors()})
    async def metadata() -> JSONResponse:
        """Name, version and extensions of the server."""
        return JSONResponse(server_metadata())

    @api.get("/v2/health/live", tags=["server"], responses={200: {"model": doc.Live}, **_errors(503)})
    async def live() -> JSONResponse:
        """Whether the server runs, and nothing in it fails for so long that only a restart can help."""
        problems = supervisor.problems() + [p for m in models.values() for p in m.supervisor.problems()]
        if problems:
            raise NotReady(f"{'; '.join(problems)}: restart the server if that goes on; its log says why")
        return JSONResponse({"live": True})

    @api.get("/v2/health/ready", tags=["server"], responses={200: {"model": doc.Ready}, **_errors(503)})
    async def ready() -> JSONResponse:
        """Whether all models are ready."""
        waiting = [m.name for m in models.values() if not m.ready]
        if waiting:
            raise NotReady(f"not ready: {', '.join(waiting)}", retry_after=1.0)
        return JSONResponse({"ready": True})


def _add_models(api: FastAPI, models: Mapping[str, ServedModel]) -> None:
    @api.get("/v2/models", tags=["models"], responses={200: {"model": doc.ModelList}, **_errors()})
    async def listing() -> JSONResponse:
        """Names of all models."""
        return JSONResponse({"models": list(models)})

    @api.get("/v2/models/stats", tags=["models"], responses=_errors())
    async def all_statistics() -> JSONResponse:
        """Counts and times of all models."""
        return JSONResponse({"model_stats": [statistics(m) for m in models.values()]})

    def both(suffix: str, handler: Callable[..., Any], responses: dict[int | str, dict[str, Any]]) -> None:
        """The address with and without a version."""

        async def plain(model: str) -> JSONResponse:
            return JSONResponse(plain_json(handler(find_model(models, model))))

        async def versioned(model: str, version: str) -> JSONResponse:
            return JSONResponse(plain_json(handler(find_model(models, model, version))))

        name = handler.__name__
        summary = (handler.__doc__ or "").rstrip(".")
        for middle, route, kind in (("", plain, name), ("/versions/{version}", versioned, f"{name}_version")):
            api.add_api_route(
                f"/v2/models/{{model}}{middle}{suffix}", route, methods=["GET"], tags=["models"], responses=responses,
                operation_id=kind, summary=summary,
            )  # fmt: skip

    def metadata(model: ServedModel) -> dict[str, Any]:
        """Inputs, outputs and ratios of a model."""
        return model_metadata(model.name, model.info, model.settings.slo, model.top_ratio, model.bound_by, model.dilation)

    def ready(model: ServedModel) -> dict[str, Any]:
        """Whether a model is ready."""
        if not model.ready:
            raise model.not_ready()
        return {"name": model.name, "ready": True}

    def config(model: ServedModel) -> dict[str, Any]:
        """Batching of a model, in the form that Triton's clients read."""
        return model_config(model.name, model.info, model.settings.max_batch, model.settings.max_wait)

    def stats(model: ServedModel) -> dict[str, Any]:
        """Counts and times of a model, in the form that Triton's clients read."""
        return {"model_stats": [statistics(model)]}

    both("", metadata, {200: {"model": doc.ModelMetadata}, **_errors(404, 503)})
    both("/ready", ready, {200: {"model": doc.ModelReady}, **_errors(404, 503)})
    both("/config", config, _errors(404, 503))
    both("/stats", stats, _errors(404, 503))


def _add_repository(api: FastAPI, models: Mapping[str, ServedModel]) -> None:
    @api.post(
        "/v2/repository/index",
        tags=["repository"],
        responses={200: {"model": list[doc.RepositoryModel]}, **_errors()},
        openapi_extra=_optional_object({"ready": {"type": "boolean"}}),
    )
    async def index(request: Request) -> JSONResponse:
        """States of all models; {"ready": true} lists only those that are ready."""
        wanted = (await _object_body(request)).get("ready", False)
        if type(wanted) is not bool:
            raise BadRequest("'ready' must be true or false")
        states = {"ready": "READY", "starting": "LOADING"}
        rows = [
            {"name": m.name, "version": VERSION, "state": states.get(m.state, "UNAVAILABLE"), "reason": m.reason}
            for m in models.values()
            if m.ready or not wanted
        ]
        return JSONResponse(rows)

    @api.post(
        "/v2/repository/models/{model}/load",
        tags=["repository"],
        responses={200: {"model": doc.Loaded}, **_errors(404, 409, 500, 503)},
        openapi_extra=_optional_object({"parameters": {"type": "object", "maxProperties": 0}}),
    )
    async def load(model: str, request: Request) -> JSONResponse:
        """Read a model's file again: the one that was named when the server was started."""
        served = find_model(models, model)
        if (await _object_body(request)).get("parameters"):
            raise BadRequest("load takes no parameters: the model's file and settings are fixed when the server starts")
        changed = await served.reload()
        return JSONResponse({"name": served.name, "changed": changed, "digest": served.info.digest})


def _add_metrics(api: FastAPI, registry: Any) -> None:
    from bitdial.serving.metrics.exposition import exposition

    @api.get(
        "/metrics", tags=["server"], response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors()},
    )  # fmt: skip
    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus text."""
        body, kind = exposition(registry, request.headers.get("accept", ""))
        return Response(body, media_type=kind)


async def _object_body(request: Request) -> dict[str, Any]:
    body = await request.body()
    if not body.strip():
        return {}
    value = parse_json(body)
    if type(value) is not dict:
        raise BadRequest("the body must be a JSON object, or empty")
    return value


def _optional_object(properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


def _describe(api: FastAPI, models: Mapping[str, ServedModel], needs_key: bool) -> Callable[[], dict[str, Any]]:
    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            components.setdefault("Error", doc.Error.model_json_schema())
            components["InferRequest"], components["InferResponse"] = doc.INFER_REQUEST, doc.INFER_RESPONSE
            for operations in schema["paths"].values():
                for operation in operations.values():
                    responses = operation["responses"]
                    responses.pop("422", None)  # answered as 400
                    for status in (400, 401, 408, 413, 431, 500, 503):  # what any request can meet
                        responses.setdefault(str(status), doc.error_response(status))
            names = list(models)
            schema["paths"]["/v2/models/{model}/infer"] = doc.infer_operation(names, version=False)
            schema["paths"]["/v2/models/{model}/versions/{version}/infer"] = doc.infer_operation(names, version=True)
            if needs_key:
                components = schema["components"]
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"bearer": []}]
            api.openapi_schema = schema
        return api.openapi_schema

    return openapi
