"""The Ray Serve application: built from its settings, started on a cluster, looked at and taken down again."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdial.errors import BitdialError
from bitdial.serving.ray.config import DEPLOYMENT, DeployConfig, make_deploy_config, serve_options
from bitdial.serving.ray.errors import DeployError, RayMissing
from bitdial.serving.ray.store import STORES, ModelStore, store_name

LOCAL_STORE = 256 << 20  # bytes of the object store of a cluster that is started here, and room for the model
REACH = 10.0  # seconds for a cluster to accept a connection
LONGEST_DRAIN = 600.0  # seconds for replicas to end whose own limit is not known
STORE_PATIENCE = 120.0  # seconds for a shipped model to be there


def load_ray() -> tuple[Any, Any]:
    """The modules ray and ray.serve. Raises RayMissing, which says what to install."""
    try:
        ray = importlib.import_module("ray")
        serve = importlib.import_module("ray.serve")
        fields = importlib.import_module("ray.serve.config").AutoscalingPolicy.model_fields
    except (ImportError, AttributeError) as error:
        raise RayMissing(
            f"deploying needs Ray Serve, which cannot be loaded ({error}): pip install 'bitdial[ray]'"
        ) from error
    if "policy_kwargs" not in fields:
        raise RayMissing(
            f"Ray {ray.__version__} knows no autoscaling policies with settings: pip install --upgrade 'bitdial[ray]'"
        )
    return ray, serve


def application(arguments: Mapping[str, Any]) -> Any:
    """The application, for configuration files of Ray Serve (import_path); the arguments are DeployConfig's fields.

    Raises ConfigError, and RayMissing.
    """
    return build(make_deploy_config(arguments))


def build(config: DeployConfig, store: str | None = None, digest: str | None = None) -> Any:
    """The bound Ray Serve application. store: name of the actor that holds the model file; None: it is read at its path.
    digest: sha256 that the file must have there; None: any.

    What goes to the replicas are strings: settings as JSON and, if one is named, the service table.
    """
    _, serve = load_ray()
    try:
        from bitdial.serving.ray.replica import Replica, replica_app
    except ImportError as error:
        raise RayMissing(f"replicas need what bitdial serve needs ({error}): pip install 'bitdial[ray]'") from error
    table = config.model.read_table()
    options = serve_options(config)
    deployment = serve.deployment(serve.ingress(replica_app)(Replica), name=DEPLOYMENT, **options)
    text = config.model_dump_json(exclude={"models": {0: {"table", "save_table"}}})
    return deployment.bind(text, None if table is None else _json(table.as_json()), store, digest)


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


@dataclass
class Deployed:
    """An application that runs.

    url          where its protocol is answered
    replicas     by state, as Ray counts them: {"RUNNING": 2, "STARTING": 1}
    own_cluster  whether bitdial started the cluster, which then ends with `stop`
    """

    config: DeployConfig
    url: str
    own_cluster: bool
    shares_proxy: bool

    def replicas(self) -> dict[str, int]:
        """Replicas by state; empty if the application is gone."""
        return self.look()[1]

    def look(self) -> tuple[str, dict[str, int]]:
        """State of the application ("RUNNING", "DEPLOYING", "UNHEALTHY", ...; "GONE") and its replicas by state."""
        _, serve = load_ray()
        found = serve.status().applications.get(self.config.name)
        if found is None:
            return "GONE", {}
        deployment = found.deployments.get(DEPLOYMENT)
        states = {} if deployment is None else deployment.replica_states
        return str(getattr(found.status, "value", found.status)), {
            str(getattr(k, "value", k)): n for k, n in states.items()
        }

    def stop(self) -> None:
        """Let requests finish (as long as `drain_timeout`) and take the application down; also the cluster, if it is bitdial's
        own. May be called more than once."""
        ray, serve = load_ray()
        if not ray.is_initialized():
            return
        try:
            _delete(serve, self.config.name, self.config.drain_timeout)
            _end_stores(ray, self.config.name)
        finally:
            ray.shutdown()

    def leave(self) -> None:
        """Let it run and disconnect from the cluster."""
        load_ray()[0].shutdown()


def deploy(config: DeployConfig, address: str | None = None, ray_options: Mapping[str, Any] | None = None) -> Deployed:
    """Start the application and wait until its replicas answer.

    address      of a cluster ("ray://host:10001", "host:6379", "auto"); None: RAY_ADDRESS, else a cluster of our own on this
                 machine, which ends with this process
    ray_options  more arguments of ray.init

    An application of that name that runs on the cluster already is replaced, replica by replica; where it has one, it is away
    until the new one has started.

    Raises RayMissing, DeployError, ConfigError, and ArtifactError for a bad model file. Nothing new is left running then; an
    application that was there before stays in whatever state Ray has left it (`serve status`).
    """
    ray, serve = load_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    data = _model_bytes(config, address)
    own = address is None
    if own:
        _check_port(config)
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    _connect(ray, address, len(data or b""), dict(ray_options or {}))
    existed = False
    try:
        status = serve.status()  # empty where Serve does not run yet
        existed, shares_proxy = config.name in status.applications, bool(status.proxies)
        if own:
            _check_cpus(ray, config)
        serve.start(proxy_location="EveryNode" if config.every_node else "HeadOnly", http_options=_http_options(config))
        store = None
        if config.ship and data is not None and digest is not None:
            store = store_name(config.name, digest)
            _start_store(ray, store, data)
        serve.run(build(config, store, digest), name=config.name, route_prefix=config.route_prefix, blocking=False)
        _end_stores(ray, config.name, keep=store)
    except BaseException as error:
        ours = isinstance(error, BitdialError) or not isinstance(error, Exception)
        reason = "" if ours else _reason(f"{error}\n{_messages(serve, config.name)}")
        _clean_up(ray, serve, config, own, existed)
        if ours:
            raise
        raise DeployError(f"'{config.name}' did not start: {reason}") from error
    scheme = "https" if config.tls_cert is not None else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return Deployed(config, f"{scheme}://{host}:{config.port}{config.route_prefix.rstrip('/')}", own, shares_proxy)


def remove(name: str, address: str | None = None) -> None:
    """Take an application down that was left on a cluster. Raises RayMissing, DeployError."""
    ray, serve = load_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        raise DeployError("which cluster? Give its --address")
    _connect(ray, address, 0, {})
    try:
        if name not in serve.status().applications:
            raise DeployError(f"there is no application '{name}' at {address}")
        _delete(serve, name, LONGEST_DRAIN)
        _end_stores(ray, name)
    finally:
        ray.shutdown()


def _model_bytes(config: DeployConfig, address: str | None) -> bytes | None:
    """The file, checked here before it is tried on every replica; None if only the cluster's nodes have it."""
    from bitdial.artifact import from_bytes

    path = config.model.path
    if not path.exists() and address is not None and not config.ship:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DeployError(f"{path} cannot be read: {error.strerror}") from None
    program = from_bytes(data, str(path))
    table = config.model.read_table()
    if table is not None:
        if table.ratios != tuple(program.ratios):
            raise DeployError(
                f"--table {config.model.table} is of a model with other ratios: measure it again, or leave it out"
            )
        config.model.settings().allowed(table)
    return data


def _check_port(config: DeployConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise DeployError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port"
            ) from None


def _connect(ray: Any, address: str | None, size: int, options: dict[str, Any]) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if address is not None:
        _check_reachable(address)
    try:
        if address is not None:
            ray.init(address=address, **{**quiet, **options})
        else:
            local = {"include_dashboard": False, "object_store_memory": LOCAL_STORE + 2 * size}
            ray.init(address="local", **{**quiet, **local, **options})
    except Exception as error:
        where = (
            "a cluster could not be started on this machine"
            if address is None
            else f"no Ray cluster answers at {address}"
        )
        raise DeployError(f"{where}: {_reason(error)}") from error


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, OverflowError) as error:
        raise DeployError(f"no Ray cluster answers at {address}: {error}; check the --address and its port") from None


def _check_cpus(ray: Any, config: DeployConfig) -> None:
    """On a cluster that cannot grow: whether the fewest replicas fit."""
    each = config.threads if config.num_cpus is None else config.num_cpus
    there = float(ray.cluster_resources().get("CPU", 0.0))
    if config.min_replicas * each > there:
        raise DeployError(
            f"{config.min_replicas} replicas with {each:g} CPUs each do not fit on this machine's {there:g}: fewer "
            "--min-replicas, fewer --threads or a smaller --num-cpus"
        )


def _http_options(config: DeployConfig) -> dict[str, Any]:
    # Ray's own limit is far off: requests have deadlines of their own.
    longest = max(60.0, 2.0 * (config.model.timeout_ms or config.model.slo_ms) / 1000.0)
    options: dict[str, Any] = {"host": config.host, "port": config.port, "request_timeout_s": longest}
    options["keep_alive_timeout_s"] = round(config.keep_alive)
    if config.tls_cert is not None:
        options.update(
            ssl_certfile=str(config.tls_cert.absolute()), ssl_keyfile=str(Path(str(config.tls_key)).absolute())
        )
    return options


def _start_store(ray: Any, name: str, data: bytes) -> None:
    maker = ray.remote(ModelStore).options(
        name=name, namespace=STORES, lifetime="detached", get_if_exists=True, num_cpus=0, max_concurrency=16
    )
    actor = maker.remote(ray.put(data))
    ray.get(actor.__ray_ready__.remote(), timeout=STORE_PATIENCE)


def _end_stores(ray: Any, application: str, keep: str | None = None) -> None:
    """End the actors that hold files of an application, but for one."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = actor["name"]
        if actor["namespace"] == STORES and name != keep and name.startswith(store_name(application, "")):
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name, namespace=STORES))


def _delete(serve: Any, name: str, drain: float) -> None:
    """Take an application down and wait until its replicas have ended. Ray itself waits a minute, whatever they were allowed."""
    until = time.monotonic() + drain + 30.0
    while True:
        try:
            serve.delete(name)
            return
        except TimeoutError:
            if time.monotonic() > until:
                raise DeployError(f"'{name}' has not ended after {drain + 30.0:.0f} s; see 'serve status'") from None


def _clean_up(ray: Any, serve: Any, config: DeployConfig, own: bool, existed: bool) -> None:
    """After a failure. An application that was there before stays, and so do the files that its replicas may ask for."""
    try:
        if ray.is_initialized() and not own and not existed:
            _delete(serve, config.name, config.drain_timeout)
            _end_stores(ray, config.name)
    except Exception:
        logging.getLogger("bitdial.serving").debug("cleaning up after a failed deployment failed too", exc_info=True)
    finally:
        ray.shutdown()


def _messages(serve: Any, name: str) -> str:
    """What Ray says of an application that failed."""
    try:
        found = serve.status().applications.get(name)
        return "" if found is None else "\n".join([found.message, *(d.message for d in found.deployments.values())])
    except Exception:
        return ""


def _reason(error: object) -> str:
    """The line of Ray's long messages that says why: bitdial's own error in a replica, where there is one."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if re.match(r"(bitdial[\w.]*\.)\w+: ", line)]
    if ours:
        return ours[-1].partition(": ")[2]
    failures = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\w*: ", line)]
    return (failures or lines or ["Ray does not say why"])[-1][:500]
