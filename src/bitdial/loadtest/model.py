"""What the server says about its model (Open Inference Protocol v2); what it does not say is None, never guessed."""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitdial.errors import ConfigError
from bitdial.loadtest.client import Answer, Target, ask
from bitdial.loadtest.errors import ServerError

DATATYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class InputInfo:
    """One input: datatype as the protocol names it, shape with -1 where it is free (the first one is the batch axis)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RemoteModel:
    """A model on the server. ratios and accuracy (0..1 or None each): of the dial, empty where the server has none. dilation:
    seconds of the wall clock in one of the model's, where its time is modelled; else 1."""

    name: str
    inputs: tuple[InputInfo, ...]
    ratios: tuple[float, ...] = ()
    accuracy: tuple[float | None, ...] = ()
    slo_ms: float | None = None
    platform: str = ""
    digest: str = ""
    dilation: float = 1.0


async def find_model(target: Target, name: str | None, seconds: float = 10.0) -> RemoteModel:
    """Ask for the model's metadata; without a name the server must have exactly one model.

    Raises ServerError (not reachable, refused, no such model, answers that make no sense) and ConfigError (several models).
    """
    if name is None:
        name = await _only_model(target, seconds)
    path = f"/v2/models/{urllib.parse.quote(name, safe='')}"
    document = _document(target, path, await ask(target, target.request("GET", path), seconds))
    try:
        inputs = tuple(
            InputInfo(str(i["name"]), str(i["datatype"]), tuple(int(d) for d in i["shape"])) for i in document["inputs"]
        )
    except (KeyError, TypeError, ValueError):
        raise ServerError(
            f"{target.url}{path} does not describe the model's inputs; is it an inference server?"
        ) from None
    if not inputs:
        raise ServerError(f"model '{name}' has no inputs that requests could be made for")
    found = document.get("parameters")
    more: dict[str, Any] = found if isinstance(found, dict) else {}
    ratios = tuple(v for v in map(_share, _list(more.get("ratios"))) if v is not None)
    accuracy = tuple(map(_share, _list(more.get("accuracy"))))
    slo, slowed = more.get("slo_ms"), more.get("dilation")
    return RemoteModel(
        name,
        inputs,
        ratios,
        accuracy if len(accuracy) == len(ratios) else (None,) * len(ratios),
        float(slo) if isinstance(slo, (int, float)) and math.isfinite(slo) and slo > 0 else None,
        str(document.get("platform", ""))[:100],
        str(more.get("digest", ""))[:100],
        float(slowed) if isinstance(slowed, (int, float)) and 1e-3 <= slowed <= 1e6 else 1.0,
    )


async def _only_model(target: Target, seconds: float) -> str:
    """The name of the server's only model, from the repository index (Triton's extension, which bitdial has too)."""
    headers = {"Content-Type": "application/json"}
    path = "/v2/repository/index"
    answer = await ask(target, target.request("POST", path, b"{}", headers), seconds)
    if answer.status in (404, 405, 501):
        raise ConfigError(f"{target.url} does not list its models; name the one to test: bitdial loadtest URL MODEL ...")
    listed = _document(target, path, answer, kind=list)
    names = [str(row["name"]) for row in listed if isinstance(row, dict) and "name" in row]
    if len(names) != 1:
        has = f"has the models {', '.join(names[:20])[:500]}" if names else "has no model"
        raise ConfigError(f"{target.url} {has}; name the one to test: bitdial loadtest URL MODEL ...")
    return names[0]


def _document(target: Target, path: str, answer: Answer, kind: type = dict) -> Any:
    if answer.status != 200:
        raise ServerError(
            f"{target.url}{path} answered {answer.status}: {error_text(answer.body) or 'no reason given'}"
        )
    try:
        document = json.loads(answer.body)
    except ValueError:
        document = None
    if not isinstance(document, kind):
        raise ServerError(f"{target.url}{path} did not answer with JSON as an inference server does")
    return document


def error_text(body: bytes) -> str:
    """The message of an error document, or the beginning of whatever it is, on one line."""
    text = body[:400].decode(errors="replace")
    try:
        document = json.loads(body)
        if isinstance(document, dict):
            text = str(document.get("error") or document.get("detail") or text)
    except ValueError:
        pass
    return " ".join(text.split())[:300]


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _share(value: Any) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
    return float(value) if fine else None
