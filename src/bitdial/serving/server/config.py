"""Settings of a server and of its models, from a file or from the command line."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from bitdial.engines.npu.options import NpuOptions
from bitdial.errors import ConfigError
from bitdial.serving.control import ServiceTable
from bitdial.serving.control.policies import make_policy
from bitdial.serving.control.settings import BATCHING, DIAL, Positive, Settings, Share
from bitdial.settings import Strict, setting

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"stats"}  # /v2/models/stats is a page of its own
_MOST_FILE = 1 << 20  # bytes of a configuration file
KEY_VARIABLE = "BITDIAL_API_KEY"
SHORTEST_KEY = 8

_ENGINE, _WEB = "Engine", "Network and security"
_SAID: dict[str, Any] = dict(Settings.model_fields)  # what has no time in it is the same there


class ModelOptions(NpuOptions):
    """How a model is served; times in milliseconds, as people write them."""

    slo_ms: Positive = setting(100.0, "An answer should be ready so soon.", "MS", DIAL)
    policy: str = setting(
        "planned", "What turns the dial: planned, lookahead, slackfit, ladder, fixed:RATIO.", "NAME", DIAL
    )
    max_ratio: Share | None = _SAID["max_ratio"]
    min_accuracy: Share | None = _SAID["min_accuracy"]
    table: Path | None = setting(None, "Use these service times instead of measuring (of one model).", "FILE", DIAL)
    save_table: Path | None = setting(None, "Write the service times there (of one model).", "FILE", DIAL)
    max_batch: int = _SAID["max_batch"]
    max_wait_ms: float = setting(
        0.0, "How long a batch that is not full waits for more.", "MS", BATCHING, ge=0, le=60_000
    )
    max_queue: int = _SAID["max_queue"]
    timeout_ms: Positive | None = setting(
        None, "Drop requests that cannot be answered so soon. Default: the SLO.", "MS", BATCHING
    )
    workers: int = setting(1, "Processes per model.", "N", _ENGINE, ge=1, le=256)
    threads: Annotated[int, Field(ge=1, le=1024)] | None = setting(
        None, "CPU threads of each. Default: the usable cores, shared out.", "N", _ENGINE
    )
    engine: str | None = setting(
        None, "What runs the models; see bitdial doctor. Default: cpu where it can.", "NAME", _ENGINE
    )
    isa: str | None = setting(
        None,
        "Instruction set of the cpu engine; see bitdial doctor. Default: BITDIAL_CPU_ISA, else the best that the processor has.",
        "NAME", _ENGINE,
    )  # fmt: skip
    memory: str | None = setting(
        None, "Of the cpu engine; small: one copy of the weights. Default: fast.", "fast|small", _ENGINE
    )
    dilation: Positive | None = setting(
        None,
        "Of the npu engine: seconds of the wall clock in one of its modelled seconds. Default: as few as the arithmetic needs.",
        "X", _ENGINE,
    )  # fmt: skip

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        make_policy(value)  # a ConfigError is a ValueError, which pydantic collects
        return value

    def read_table(self) -> ServiceTable | None:
        """The service times in the file `table`, if one is named. Raises ConfigError."""
        if self.table is None:
            return None
        try:
            with open(self.table, "rb") as stream:
                return ServiceTable.from_json(stream.read(1 << 24), str(self.table))
        except OSError as error:
            raise ConfigError(f"--table {self.table} cannot be read: {error.strerror}") from None

    def given_engine_options(self) -> dict[str, Any]:
        """Options of the engine, `threads` left out. Raises ConfigError for those of another engine."""
        given = {"isa": self.isa, "memory": self.memory, **self.engine_options(self.engine)}
        return {name: value for name, value in given.items() if value is not None}

    def settings(self) -> Settings:
        """For the scheduler, in seconds."""
        return Settings(
            slo=self.slo_ms / 1000.0,
            timeout=None if self.timeout_ms is None else self.timeout_ms / 1000.0,
            max_wait=self.max_wait_ms / 1000.0,
            **{name: getattr(self, name) for name in ("max_batch", "max_queue", "max_ratio", "min_accuracy")},
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


class ServerConfig(Strict):
    """A server and the models it serves, at least one."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    host: str = setting("127.0.0.1", "Where to listen; the default is this machine only.", "ADDRESS", _WEB)
    port: int = setting(8000, "0: any free one, which is printed.", "N", _WEB, ge=0, le=65535)
    api_key: str | None = setting(
        None,
        "Ask callers for this key. Other users of the machine see it here; better use the variable or a file.",
        "KEY", _WEB, env=KEY_VARIABLE, repr=False,
    )  # fmt: skip
    tls_cert: Path | None = setting(None, "Certificate (chain), for HTTPS.", "FILE.pem", _WEB)
    tls_key: Path | None = setting(None, "Its key.", "FILE.pem", _WEB)
    max_body_mb: Positive | None = setting(
        None, "Largest request body. Default: what --max-batch samples need as JSON.", "MIB", _WEB
    )
    max_json_mb: Positive | None = setting(
        None, "Most JSON in a request; larger tensors: in binary. Default: 4, or one sample.", "MIB", _WEB
    )
    header_timeout: Positive = Field(
        10.0, description="Seconds for a request's head to arrive, and for a TLS handshake."
    )
    body_timeout: Positive = Field(30.0, description="Seconds for its body, and for a client to take its answer.")
    keep_alive: Positive = Field(75.0, description="Seconds that an idle connection is kept.")
    max_connections: int = setting(1024, "Connections at once; more are refused.", "N", _WEB, ge=1)
    drain_timeout: Positive = setting(
        30.0, "How long a stopping server answers what it took in.", "S", _WEB, option="--drain-seconds"
    )
    record: Path | None = setting(
        None, "Record every decision there, to replay or study (a file for each model).", "FILE", DIAL
    )

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


def make_options(**values: Any) -> ModelOptions:
    """Raises ConfigError that names the setting."""
    try:
        return ModelOptions(**values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


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
    keys = {"path", "table", "save_table", "tls_cert", "tls_key", "record", "npu_energy"}
    return {k: str(folder / v) if k in keys and isinstance(v, str) else v for k, v in entry.items()}


def explain(error: ValidationError) -> str:
    """The setting that is wrong, and why, without its value (it may be a key)."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
