"""What is deployed: a model as `bitdial serve` takes it, how many replicas, and where they are reached. Imports no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from bitdial.errors import ConfigError
from bitdial.serving.control import ServiceTable
from bitdial.serving.ray.scaling import ScalingSettings, WorkPolicy, policy_arguments
from bitdial.serving.server.config import KEY_VARIABLE, ModelConfig, Positive, ServerConfig, explain

DEPLOYMENT = "model"  # name of the one deployment in the application
BUILDER = "bitdial.serving.ray.deployment:application"
REPORT = 2.0  # seconds between a replica's reports of its work: the delays of scaling are several times that
SPARE = 64  # requests beside those queued and computed: such as ask for metadata or are about to be refused

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DeployConfig(ServerConfig):
    """A server's settings, of which one model and what Ray's proxy can keep are used, and replicas. Times in seconds.

    application      name on the cluster; None: the model's
    route_prefix     path before /v2/...; several applications on a cluster need different ones
    every_node       a proxy on each node with replicas, instead of one on the head node
    min_replicas ... smoothing   see ScalingSettings
    num_cpus         what Ray sets aside for a replica; None: as many as it has threads
    ship             send the model file through the cluster instead of having every node read it at its path
    """

    application: str | None = None
    route_prefix: str = "/"
    every_node: bool = False
    min_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    up_delay: NotNegative = 15.0
    down_delay: NotNegative = 300.0
    hysteresis: Annotated[float, Field(ge=0, le=10)] = 0.2
    smoothing: Positive = 15.0
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    ship: bool = False

    @field_validator("route_prefix")
    @classmethod
    def _usable_prefix(cls, value: str) -> str:
        if not value.startswith("/") or (value != "/" and value.endswith("/")) or "{" in value or "//" in value:
            raise ValueError(f"'{value}' is no path such as / or /cats")
        return value

    @model_validator(mode="after")
    def _deployable(self) -> DeployConfig:
        if len(self.models) != 1:
            raise ValueError(
                "an application has one model: deploy others as applications of their own (--name, --route-prefix)"
            )
        if self.models[0].workers != 1:
            raise ValueError("a replica has one worker: use more replicas instead of workers")
        if self.record is not None:
            raise ValueError("decisions cannot be recorded on a cluster (record)")
        self.scaling()
        return self

    @property
    def model(self) -> ModelConfig:
        return self.models[0]

    @property
    def name(self) -> str:
        """Of the application."""
        return self.application or self.model.name

    @property
    def threads(self) -> int:
        """Of a replica's engine."""
        return self.model.threads or 1

    def scaling(self) -> ScalingSettings:
        """Raises ValueError if they contradict each other."""
        return ScalingSettings(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            utilization=self.utilization,
            up_delay=self.up_delay,
            down_delay=self.down_delay,
            hysteresis=self.hysteresis,
            smoothing=self.smoothing,
        )


def make_deploy_config(content: Mapping[str, Any]) -> DeployConfig:
    """Raises ConfigError that names the setting."""
    try:
        return DeployConfig.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def read_table(path: Path | None) -> ServiceTable | None:
    """The service table in a file. Raises ConfigError."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--table {path} cannot be read: {error}") from None
    return ServiceTable.from_json(text, str(path))


def serve_options(config: DeployConfig) -> dict[str, Any]:
    """Options of the Ray Serve deployment, JSON-able."""
    model = config.model
    return {
        # The replica's own queue is the one that refuses; Ray must never hold requests back before that.
        "max_ongoing_requests": model.max_queue + model.max_batch + SPARE,
        "max_queued_requests": model.max_queue,  # in a proxy, while no replica can be reached
        "graceful_shutdown_timeout_s": config.drain_timeout,
        "graceful_shutdown_wait_loop_s": min(1.0, config.drain_timeout),
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 3,
        "ray_actor_options": {"num_cpus": config.threads if config.num_cpus is None else config.num_cpus},
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "initial_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            # WorkPolicy has delays of its own.
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "metrics_interval_s": REPORT,
            "look_back_period_s": 5 * REPORT,
            "aggregation_function": "max",  # reports are sums that only grow: the largest is the latest
            "policy": {
                "policy_function": f"{WorkPolicy.__module__}:{WorkPolicy.__name__}",
                "policy_kwargs": policy_arguments(config.scaling()),
            },
        },
    }


def serve_document(config: DeployConfig) -> dict[str, Any]:
    """The configuration that `serve deploy` and KubeRay's serveConfigV2 take (JSON is YAML), for the same deployment.

    Raises ConfigError for what cannot be written there.
    """
    if config.ship:
        raise ConfigError(
            "a model that is shipped (--ship) cannot be deployed from a configuration file: put it on every node"
        )
    if config.api_key is not None:
        raise ConfigError(
            f"no API key is written into a configuration file: set {KEY_VARIABLE} on the cluster's nodes instead"
        )
    arguments = json.loads(config.model_dump_json(exclude_defaults=True, exclude={"models"}))
    arguments["models"] = [json.loads(config.model.model_dump_json(exclude_defaults=True))]
    return {
        "proxy_location": "EveryNode" if config.every_node else "HeadOnly",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": config.name,
                "route_prefix": config.route_prefix,
                "import_path": BUILDER,
                "args": arguments,
                "deployments": [{"name": DEPLOYMENT, **serve_options(config)}],
            }
        ],
    }
