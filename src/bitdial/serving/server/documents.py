"""Shapes of the JSON documents that the server answers with, for its OpenAPI description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")


class Error(_Document):
    """Every answer that is no success."""

    error: str


class ServerMetadata(_Document):
    name: str
    version: str
    extensions: list[str]


class Live(_Document):
    live: bool


class Ready(_Document):
    ready: bool


class ModelReady(_Document):
    name: str
    ready: bool


class ModelList(_Document):
    models: list[str]


class Tensor(_Document):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Document):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Any]


class RepositoryModel(_Document):
    name: str
    version: str
    state: str
    reason: str


class Loaded(_Document):
    """A model file was read again. changed: whether it differed from the one before."""

    name: str
    changed: bool
    digest: str


# Inference is answered by no FastAPI route; this is its part of the description.
_PARAMETERS = {"type": "object", "additionalProperties": True}
INFER_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "maxLength": 1024, "description": "Repeated in the answer."},
        "parameters": {
            "type": "object",
            "additionalProperties": True,
            "properties": {
                "slo_ms": {
                    "type": "number",
                    "exclusiveMinimum": 0,
                    "maximum": 600_000,
                    "description": "Milliseconds within which the caller wants the answer; default: the server's bound.",
                },
                "max_ratio": {
                    "type": "number",
                    "minimum": 0,
                    "maximum": 1,
                    "description": "Largest share of low precision that the caller accepts.",
                },
                "timeout": {
                    "type": "number",
                    "minimum": 0,
                    "maximum": 600_000_000,
                    "description": "Microseconds after which the caller waits no longer; 0: no such limit.",
                },
                "binary_data_output": {"type": "boolean", "default": False},
            },
        },
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"type": "string"},
                    "parameters": _PARAMETERS,
                    "data": {"type": "array", "items": {}, "description": "Flat, or nested as the shape is."},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
                },
            },
        },
    },
}
INFER_RESPONSE: dict[str, Any] = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs", "parameters"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "required": ["ratio", "queue_ms", "compute_ms", "batch"],
            "properties": {
                "ratio": {"type": "number", "description": "Share of low precision that this request ran at."},
                "queue_ms": {"type": "number", "description": "Milliseconds it waited."},
                "compute_ms": {"type": "number", "description": "Milliseconds its batch took in the engine."},
                "batch": {"type": "integer", "description": "Samples of that batch."},
                "dilation": {
                    "type": "number",
                    "description": "Only where the engine's time is modelled: seconds of the wall clock in one of its seconds.",
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string"},
                    "datatype": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "data": {"type": "array", "items": {}},
                    "parameters": _PARAMETERS,
                },
            },
        },
    },
}
STATUSES = {
    400: "The request is malformed or does not fit the model.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or version.",
    405: "The address knows other methods.",
    408: "The request did not arrive whole in time.",
    409: "The file holds a model with other inputs or outputs: restart the server.",
    413: "The body is too large.",
    415: "The body is compressed in an unknown way.",
    431: "The request's head is too large.",
    500: "The computation failed, or the model file could not be loaded.",
    503: "Overloaded, not ready, or stopping; Retry-After says when to come again.",
    504: "The deadline passed while the request waited.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses."""
    return {status: {"model": Error, "description": STATUSES[status]} for status in statuses}


def error_response(status: int) -> dict[str, Any]:
    """The OpenAPI response object of an error."""
    return {
        "description": STATUSES[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


def infer_operation(names: list[str], version: bool) -> dict[str, Any]:
    """The OpenAPI path item of inference. names: of the models, as examples."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    parameters: list[dict[str, Any]] = [
        {
            "name": "model", "in": "path", "required": True, "schema": {"type": "string"},
            "examples": {name: {"value": name} for name in names},
        }
    ]  # fmt: skip
    if version:
        parameters.append(
            {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": ["1"]}}
        )
    parameters += [
        {
            "name": "Inference-Header-Content-Length", "in": "header", "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "Bytes of the JSON part, where binary tensors follow it.",
        },
        {
            "name": "Content-Encoding", "in": "header", "required": False,
            "schema": {"type": "string", "enum": ["identity", "gzip", "deflate"]},
        },
    ]  # fmt: skip
    responses: dict[str, Any] = {
        "200": {
            "description": "The outputs: JSON, or JSON followed by binary tensors.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
                        "application/octet-stream": binary},
        }
    }  # fmt: skip
    for status in (400, 401, 404, 408, 413, 415, 431, 500, 503, 504):
        responses[str(status)] = error_response(status)
    return {
        "post": {
            "tags": ["inference"],
            "summary": "Infer",
            "operationId": "infer_version" if version else "infer",
            "parameters": parameters,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
                            "application/octet-stream": binary},
            },
            "responses": responses,
        }
    }  # fmt: skip
