"""`bitdial deploy`: a .bitdial file on a Ray cluster, with as many replicas as the load needs."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bitdial.cli import options
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.serving.ray.config import DeployConfig
    from bitdial.serving.ray.deployment import Deployed

LOOK = 2.0  # seconds between looks at the replicas
_NETWORK, _SERVER = "Cluster and network", "bitdial.serving.server.config"


@command
def deploy(
    *,
    model: options.Model,
    dial: Annotated[
        Given,
        options_of(
            f"{_SERVER}:ModelOptions",
            only=("slo_ms", "policy", "max_batch", "max_wait_ms", "max_queue", "max_ratio", "min_accuracy", "table"),
            panel="Dial and queue",
            told={
                "max_queue": "Requests that may wait at a replica; more are refused (503).",
                "table": "Service table of the replicas' machines. Default: every replica measures its own when it starts, and "
                "remembers it.",
            },
        ),
    ],
    cluster: Annotated[
        Given,
        options_of(
            "bitdial.serving.ray.config:DeployConfig", without=("api_key", "max_body_mb", "max_connections", "record")
        ),
    ],
    max_replicas: Annotated[
        int | None,
        option("--max-replicas", "N", "Never more. Default: as --min-replicas.", "Replicas", min=1),
    ] = None,
    engine: Annotated[
        Given,
        options_of(
            f"{_SERVER}:ModelOptions",
            only=("threads", "engine", "isa"),
            panel="Replicas",
            told={
                "threads": "Threads of a replica's engine. Default: 1.",
                "engine": "Default: cpu where it can run, else reference.",
            },
        ),
    ],
    address: Annotated[
        str | None,
        option(
            "--address", "ADDRESS",
            "Of a Ray cluster: ray://HOST:10001, HOST:6379 or auto. Default: RAY_ADDRESS, else a cluster of its own on this "
            "machine.", _NETWORK,
        ),
    ] = None,
    name: Annotated[
        str | None,
        option("--name", "NAME", "Of the model in URLs and of the application. Default: the file's.", _NETWORK),
    ] = None,
    api_key_file: Annotated[
        Path | None, option("--api-key-file", "FILE", "Ask callers for the key in this file.", _NETWORK)
    ] = None,
    detach: Annotated[
        bool, option("--detach", "", "Return when it runs, and leave it on the cluster.", _NETWORK)
    ] = False,
    remove: Annotated[bool, option("--remove", "", "Take down what --detach left on the cluster.", _NETWORK)] = False,
    dry_run: Annotated[
        bool,
        option(
            "--dry-run", "", "Only print the configuration, as 'serve deploy' and KubeRay take it.", options.OUTPUT_PANEL
        ),
    ] = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Serve a model on a Ray cluster: replicas with a dial each, and as many of them as the load needs.

    Needs bitdial\\[ray]. Speaks the same protocol as bitdial serve, and blocks until Ctrl-C or SIGTERM, then drains.

    The dial and the number of replicas do not fight: the dial of each replica acts at once on its own queue; replicas follow the
    work that arrives, counted at the smallest ratio (arrivals, refused ones included, times the service time there), which
    does not change when the dial turns. A burst turns the dial up at once. If it lasts, replicas come after --up-delay and
    their start, queues become short, and the dial returns by itself. They go after --down-delay.
    """
    from bitdial.serving.ray.config import make_deploy_config, serve_document
    from bitdial.serving.server.config import model_arguments, read_key_file

    if detach and address is None:
        raise ConfigError("--detach needs the --address of a cluster: one that is started here ends with this command")
    entry: dict[str, Any] = {**model_arguments([str(model)])[0], **dial, **engine}
    for key in ("path", "table"):
        if key in entry:
            entry[key] = str(Path(entry[key]).absolute())
    if name is not None:
        entry["name"] = name
    config = make_deploy_config(
        {
            **cluster,
            "models": [entry],
            "max_replicas": cluster.get("min_replicas", 1) if max_replicas is None else max_replicas,
            "api_key": None if api_key_file is None else read_key_file(api_key_file),
        }
    )
    if dry_run:
        document = serve_document(config)
        terminal.say(json.dumps(document, indent=2))
        terminal.emit(document)
        return
    if remove:
        from bitdial.serving.ray.deployment import remove as take_down

        take_down(config.name, address)
        terminal.say(f"{config.name} has been taken down")
        terminal.emit({"command": "deploy", "application": config.name, "removed": True})
        return
    _run(terminal, config, address, detach)


def _run(terminal: Terminal, config: DeployConfig, address: str | None, detach: bool) -> None:
    from bitdial.serving.ray.deployment import deploy as start

    terminal.interrupted = lambda: "stopped"
    terminal.note(
        f"starting {config.min_replicas} replica{'s' if config.min_replicas > 1 else ''}; this takes some seconds"
    )
    deployed = start(config, address)
    if detach:
        _tell(terminal, deployed)
        deployed.leave()
        return
    with _stop_signals() as stopped:
        try:
            _tell(terminal, deployed)
            _watch(terminal, deployed, stopped)
            terminal.note(f"draining: running requests have {config.drain_timeout:g} s")
        finally:
            deployed.stop()


def _tell(terminal: Terminal, deployed: Deployed) -> None:
    config = deployed.config
    if deployed.shares_proxy:
        terminal.note(
            "note: Ray Serve runs on this cluster already; its own host and port hold, and may differ from these"
        )
    address = f"{deployed.url}/v2/models/{config.model.name}"
    terminal.say(f"{config.name} is served at {address}")
    terminal.say(f"{config.min_replicas} to {config.max_replicas} replicas, {config.threads} thread(s) each")
    terminal.emit(
        {
            "command": "deploy", "application": config.name, "model": config.model.name, "url": deployed.url,
            "replicas": deployed.replicas(), "own_cluster": deployed.own_cluster, "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
        }
    )  # fmt: skip


def _watch(terminal: Terminal, deployed: Deployed, stopped: threading.Event) -> None:
    """Tell of replicas that come and go, until a signal comes."""
    told = deployed.look()
    while not stopped.wait(LOOK):
        now = deployed.look()
        if now != told:
            state, replicas = told = now
            counted = ", ".join(f"{n} {name.lower()}" for name, n in sorted(replicas.items())) or "none"
            terminal.note(f"replicas: {counted}" + ("" if state == "RUNNING" else f" ({state.lower()})"))
        if now[0] == "GONE":
            raise ConfigError(f"'{deployed.config.name}' has been taken down by others")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; Ray's own handlers would end the process at once. A second signal ends the wait for
    requests that still run."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
