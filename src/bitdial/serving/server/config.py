"""Settings of a server and of its models, from a file or from the command line."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitdial.errors import ConfigError
from bitdial.serving.control.policies import make_policy
from bitdial.serving.control.scheduler import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"stats"}  # /v2/models/stats is a page of its own
_MOST_FILE = 1 << 20  # bytes of a configuration file
KEY_VARIABLE = "BITDIAL_API_KEY"
SHORTEST_KEY = 8

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelOptions(_Strict):
    """How a model is served; times in milliseconds, as people write them.

    slo_ms        an answer should be ready so soon
    policy        what turns the dial: "planned", "slackfit:dwell=1", "fixed:0.5", ...
    max_batch     images of the largest batch, and of the largest request
    max_wait_ms   how long a batch that is not full waits for more
    max_queue     requests that may wait
    timeout_ms    requests that cannot be answered so soon are dropped; None: the SLO
    max_ratio     the dial is never turned further; None: than the ceiling in the model's file, if there is one
    min_accuracy  nor to a ratio whose expected accuracy (0..1; as measured, made non-increasing) is below this
    workers       processes that run the model
    threads       CPU threads of each; None: the usable cores shared out
    isa, engine, memory   passed to the engine
    table         file of a service table to use instead of measuring one
    save_table    file to write the service table to
    """

    slo_ms: Positive = 100.0
    policy: str = "planned"
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    max_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    timeout_ms: Positive | None = None
    max_ratio: Share | None = None
    min_accuracy: Share | None = None
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    isa: str | None = None
    engine: str | None = None
    memory: str | None = None
    table: Path | None = None
    save_table: Path | None = None

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        make_policy(value)  # a ConfigError is a ValueError, which pydantic collects
        return value

    def settings(self) -> Settings:
        """For the scheduler, in seconds."""
        return Settings(
            slo=self.slo_ms / 1000.0,
            timeout=None if self.timeout_ms is None else self.timeout_ms / 1000.0,
            max_batch=self.max_batch,
            max_wait=self.max_wait_ms / 1000.0,
            max_queue=self.max_queue,
            max_ratio=self.max_ratio,
            min_accuracy=self.min_accuracy,
        )


class ModelConfig(ModelOptions):
    """A model: its name in URLs, its file, and how it is served."""

    name: str
    path: Path

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        problem = name_problem(value)
        if problem:
            raise ValueError(problem)
        return value


class ServerConfig(_Strict):
    """A server.

    host, port        where it listens; port 0: any free one
    models            at least one
    api_key           callers must show it; None: no key is asked for
    tls_cert, tls_key PEM files; both or none
    max_body_mb       largest request body, MiB; None: what the models' largest requests need as JSON
    max_json_mb       most JSON in it, MiB; None: 4, or what one image needs
    header_timeout    seconds for a request's head to arrive, and for a TLS handshake
    body_timeout      seconds for its body, and for a client to take its answer
    keep_alive        seconds that an idle connection is kept
    max_connections   connections at once; more are refused
    drain_timeout     seconds that a stopping server waits for requests it has taken in
    record            file that decisions are recorded to (one per model)
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    api_key: str | None = Field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body_mb: Positive | None = None
    max_json_mb: Positive | None = None
    header_timeout: Positive = 10.0
    body_timeout: Positive = 30.0
    keep_alive: Positive = 75.0
    max_connections: Annotated[int, Field(ge=1)] = 1024
    drain_timeout: Positive = 30.0
    record: Path | None = None

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, value: str | None) -> str | None:
        if value is not None:
            check_key(value, "the API key")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        seen: dict[str, Path] = {}
        for model in self.models:
            if model.name in seen:
                raise ValueError(
                    f"two models are called '{model.name}', {seen[model.name]} and {model.path}: give one another name, as in "
                    f"{model.name[:90]}-2={model.path}"
                )
            seen[model.name] = model.path
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key (--tls-cert and --tls-key)")
        return self

    def body_limits(self) -> tuple[int | None, int | None]:
        """`max_body_mb` and `max_json_mb` in bytes."""
        body, json = (None if mb is None else int(mb * (1 << 20)) for mb in (self.max_body_mb, self.max_json_mb))
        return body, json

    def record_file(self, model: str) -> Path | None:
        """Where a model's decisions are recorded: `record`, with the model's name in it where there are several."""
        if self.record is None or len(self.models) == 1:
            return self.record
        return self.record.with_name(f"{self.record.stem}.{model}{self.record.suffix}")

    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        import ipaddress

        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def check_key(key: str, where: str) -> str:
    """The key, if it can be sent in a header. Raises ConfigError, without showing it."""
    if len(key) < SHORTEST_KEY or not all(33 <= ord(c) <= 126 for c in key):
        raise ConfigError(f"{where} must be at least {SHORTEST_KEY} visible ASCII characters without blanks")
    return key


def read_key_file(path: Path) -> str:
    """The API key in a file (blanks around it are ignored). Raises ConfigError."""
    try:
        with open(path, "rb") as stream:
            text = stream.read(4097).decode("ascii").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--api-key-file {path} cannot be read: {reason}") from None
    return check_key(text, f"the API key in {path}")


def key_file_is_open(path: Path) -> bool:
    """Whether other users of this machine can read the key."""
    try:
        return bool(os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO))
    except OSError:
        return False


def name_problem(name: str) -> str:
    """Why a model cannot be called so; "" if it can."""
    shown = f"'{name[:100]}'" if len(name) <= 100 else f"'{name[:100]}...'"
    if name in _RESERVED:
        return f"{shown} cannot be a model's name: /v2/models/{name} is an address of the server's own; use another"
    if len(name) > 100:
        return f"{shown} cannot be a model's name in URLs: it has {len(name)} characters; use at most 100"
    if not _NAME.fullmatch(name):
        return (
            f"{shown} cannot be a model's name in URLs: use ASCII letters, digits, '.', '_' and '-', a letter or digit first, "
            f"e.g. '{_name_of(name)}'"
        )
    return ""


def model_arguments(arguments: list[str]) -> list[dict[str, Any]]:
    """name and path of "model.bitdial" or "name=model.bitdial"; the name is otherwise the file's. Raises ConfigError."""
    result = []
    for text in arguments:
        name, equals, path = text.partition("=")
        problem = name_problem(name) if equals else ""
        if not equals or (problem and (os.path.exists(text) or ("/" in name and not os.path.exists(path)))):
            name, path = "", text  # the = belongs to the path
        elif problem:
            raise ConfigError(f"{text}: {problem}")
        if not path:
            raise ConfigError(f"'{text}' names no file: write model.bitdial or name=model.bitdial")
        result.append({"name": name or _name_of(Path(path).stem), "path": path})
    return result


def _name_of(stem: str) -> str:
    """A file's name (without its ending) as near as a model's name can be to it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:100] or "model"
    return f"{name}-model" if name in _RESERVED else name


def read_config_file(path: Path) -> dict[str, Any]:
    """The object in a JSON or TOML file (by its ending). Raises ConfigError."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MOST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_FILE:
        raise ConfigError(f"--config {path} is larger than {_MOST_FILE} bytes")
    try:
        if path.suffix.lower() == ".toml":
            if sys.version_info < (3, 11):
                raise ConfigError(f"--config {path}: reading TOML needs Python 3.11 or newer; write the same as JSON")
            import tomllib

            value: Any = tomllib.loads(data.decode("utf-8"))
        else:
            value = json.loads(data)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is malformed: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--config {path} must hold an object of settings, with 'models'")
    return value


def make_config(
    arguments: list[str],
    file: dict[str, Any] | None,
    server: dict[str, Any],
    model: dict[str, Any],
    folder: Path | None = None,
) -> ServerConfig:
    """One configuration from models named on the command line, a file's content (paths relative to `folder`), and options for
    the server and for every model (None: not given). The command line wins over the file, a model's entry over `defaults`.

    Raises ConfigError that names the setting.
    """
    content = dict(file or {})
    defaults = content.pop("defaults", {})
    listed = content.pop("models", [])
    if not isinstance(defaults, dict) or not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
        raise ConfigError(
            "--config: 'defaults' must be an object and 'models' a list of objects with 'name' and 'path'"
        )
    entries = [{**defaults, **entry} for entry in listed]
    if folder is not None:
        content, entries = _anchored(content, folder), [_anchored(entry, folder) for entry in entries]
        defaults = _anchored(defaults, folder)
    entries += [{**defaults, **entry} for entry in model_arguments(arguments)]
    if not entries:
        raise ConfigError("no model is named: write bitdial serve model.bitdial, or list 'models' in --config")
    for entry in entries:
        entry.setdefault("name", _name_of(Path(str(entry.get("path", ""))).stem))
        entry.update({key: value for key, value in model.items() if value is not None})
    content.update({key: value for key, value in server.items() if value is not None})
    try:
        return ServerConfig.model_validate({**content, "models": entries})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _anchored(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    keys = {"path", "table", "save_table", "tls_cert", "tls_key", "record"}
    return {k: str(folder / v) if k in keys and isinstance(v, str) else v for k, v in entry.items()}


def explain(error: ValidationError) -> str:
    """The setting that is wrong, and why, without its value (it may be a key)."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
