"""What is deployed: a model as `bitdial serve` takes it, how many replicas, and where they are reached. Imports no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from bitdial.engines.base import engine_spec
from bitdial.errors import ConfigError
from bitdial.serving.control.settings import Positive
from bitdial.serving.ray.scaling import ScalingSettings, WorkPolicy, policy_arguments
from bitdial.serving.server.config import KEY_VARIABLE, ModelConfig, ServerConfig, explain
from bitdial.settings import setting

DEPLOYMENT = "model"  # name of the one deployment in the application
BUILDER = "bitdial.serving.ray.deployment:application"
REPORT = 2.0  # seconds between a replica's reports of its work: the delays of scaling are several times that
SPARE = 64  # requests beside those queued and computed: such as ask for metadata or are about to be refused

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


_REPLICAS, _NETWORK = "Replicas", "Cluster and network"


class DeployConfig(ServerConfig):
    """A server's settings, of which one model and what Ray's proxy can keep are used, and replicas. Times in seconds.

    See ScalingSettings for how min_replicas and what follows act together.
    """

    application: str | None = Field(None, description="Name on the cluster; None: the model's.")
    min_replicas: int = setting(1, "Never fewer.", "N", _REPLICAS, ge=1, le=10_000)
    max_replicas: int = Field(1, ge=1, le=10_000, description="Never more.")
    utilization: float = setting(
        0.7,
        "How busy replicas should be at the smallest ratio; the rest is for bursts.",
        "SHARE", _REPLICAS, read="share", gt=0, le=1,
    )  # fmt: skip
    up_delay: NotNegative = setting(15.0, "Add replicas when they were needed for so long.", "SECONDS", _REPLICAS)
    down_delay: NotNegative = setting(300.0, "Take some away when fewer were enough for so long.", "SECONDS", _REPLICAS)
    hysteresis: float = setting(
        0.2, "And only if fewer would do with so much more work.", "SHARE", _REPLICAS, read="share", ge=0, le=10
    )
    smoothing: Positive = Field(15.0, description="Time constant of the average over the arriving work.")
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = setting(
        None, "CPUs that Ray sets aside for a replica. Default: as --threads.", "N", _REPLICAS
    )
    ship: bool = setting(
        False, "Send the model file through the cluster. Default: every node reads it at the same path.", "", _NETWORK
    )
    route_prefix: str = setting("/", "Path before /v2/...", "PATH", _NETWORK)
    host: str = setting("127.0.0.1", "Where Ray's proxies listen.", "ADDRESS", _NETWORK)
    port: int = setting(8000, "And on which port.", "N", _NETWORK, ge=1, le=65535)
    every_node: bool = setting(False, "A proxy on every node, not only on the head.", "", _NETWORK)
    tls_cert: Path | None = setting(None, "Certificate, on every node with a proxy.", "FILE.pem", _NETWORK)
    tls_key: Path | None = setting(None, "And its key.", "FILE.pem", _NETWORK)
    drain_timeout: Positive = setting(
        30.0, "How long running requests may take when replicas end.", "SECONDS", _NETWORK
    )

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
        if self.models[0].engine is not None and engine_spec(self.models[0].engine).modelled:
            raise ValueError("what an engine models is no time that replicas could be scaled by: serve it with bitdial serve")
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
        return ScalingSettings(**{field.name: getattr(self, field.name) for field in fields(ScalingSettings)})


def make_deploy_config(content: Mapping[str, Any]) -> DeployConfig:
    """Raises ConfigError that names the setting."""
    try:
        return DeployConfig.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


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
