"""`bitdial deploy`: a .bitdial file on a Ray cluster, with as many replicas as the load needs."""

from __future__ import annotations

import json as json_text
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import options, reading
from bitdial.cli.terminal import Terminal
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.serving.ray.config import DeployConfig
    from bitdial.serving.ray.deployment import Deployed

LOOK = 2.0  # seconds between looks at the replicas
_DIAL, _REPLICAS, _NETWORK, _OUTPUT = "Dial and queue", "Replicas", "Cluster and network", options.OUTPUT_PANEL


def deploy(
    model: options.Model,
    slo: Annotated[
        float, typer.Option("--slo-ms", metavar="MS", help="Answers should be ready so soon.", rich_help_panel=_DIAL)
    ] = 100.0,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help="What turns the dial.", rich_help_panel=_DIAL)
    ] = "planned",
    max_batch: Annotated[
        int, typer.Option("--max-batch", metavar="N", min=1, help="Images of the largest batch.", rich_help_panel=_DIAL)
    ] = 32,
    max_wait: Annotated[
        float,
        typer.Option("--max-wait-ms", metavar="MS", help="How long a small batch waits for more.", rich_help_panel=_DIAL),
    ] = 0.0,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue", metavar="N", min=1, help="Requests that may wait at a replica; more are refused (503).",
            rich_help_panel=_DIAL,
        ),
    ] = 1024,
    max_ratio: options.MaxRatio = None,
    min_accuracy: Annotated[
        str | None,
        typer.Option(
            "--min-accuracy", metavar="SHARE", help="Nor to a ratio whose expected accuracy is lower.",
            rich_help_panel=_DIAL, show_default=False,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", metavar="FILE.json",
            help="Service table of the replicas' machines. Default: every replica measures its own when it starts, and "
            "remembers it.",
            rich_help_panel=_DIAL, show_default=False,
        ),
    ] = None,
    min_replicas: Annotated[
        int, typer.Option("--min-replicas", metavar="N", min=1, help="Never fewer.", rich_help_panel=_REPLICAS)
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            "--max-replicas", metavar="N", min=1, help="Never more. Default: as --min-replicas.",
            rich_help_panel=_REPLICAS, show_default=False,
        ),
    ] = None,
    utilization: Annotated[
        str,
        typer.Option(
            "--utilization", metavar="SHARE", help="How busy replicas should be at the smallest ratio; the rest is for bursts.",
            rich_help_panel=_REPLICAS,
        ),
    ] = "70%",
    up_delay: Annotated[
        float,
        typer.Option(
            "--up-delay", metavar="SECONDS", help="Add replicas when they were needed for so long.", rich_help_panel=_REPLICAS
        ),
    ] = 15.0,
    down_delay: Annotated[
        float,
        typer.Option(
            "--down-delay", metavar="SECONDS", help="Take some away when fewer were enough for so long.",
            rich_help_panel=_REPLICAS,
        ),
    ] = 300.0,
    hysteresis: Annotated[
        str,
        typer.Option(
            "--hysteresis", metavar="SHARE", help="And only if fewer would do with so much more work.",
            rich_help_panel=_REPLICAS,
        ),
    ] = "20%",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of a replica's engine.", rich_help_panel=_REPLICAS)
    ] = 1,
    num_cpus: Annotated[
        float | None,
        typer.Option(
            "--num-cpus", metavar="N", min=0, help="CPUs that Ray sets aside for a replica. Default: as --threads.",
            rich_help_panel=_REPLICAS, show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="NAME", help="Default: cpu where it can run, else reference.", rich_help_panel=_REPLICAS,
            show_default=False,
        ),
    ] = None,
    isa: options.Isa = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="ADDRESS",
            help="Of a Ray cluster: ray://HOST:10001, HOST:6379 or auto. Default: RAY_ADDRESS, else a cluster of its own on "
            "this machine.",
            rich_help_panel=_NETWORK, show_default=False,
        ),
    ] = None,
    ship: Annotated[
        bool,
        typer.Option(
            "--ship", help="Send the model file through the cluster. Default: every node reads it at the same path.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Of the model in URLs and of the application. Default: the file's.",
            rich_help_panel=_NETWORK, show_default=False,
        ),
    ] = None,
    route_prefix: Annotated[
        str, typer.Option("--route-prefix", metavar="PATH", help="Path before /v2/...", rich_help_panel=_NETWORK)
    ] = "/",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where Ray's proxies listen.", rich_help_panel=_NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=1, max=65535, help="And on which port.", rich_help_panel=_NETWORK)
    ] = 8000,
    every_node: Annotated[
        bool, typer.Option("--every-node", help="A proxy on every node, not only on the head.", rich_help_panel=_NETWORK)
    ] = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Ask callers for the key in this file.", rich_help_panel=_NETWORK,
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE.pem", rich_help_panel=_NETWORK, show_default=False,
                     help="Certificate, on every node with a proxy."),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="FILE.pem", help="And its key.", rich_help_panel=_NETWORK, show_default=False),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(
            "--drain-timeout", metavar="SECONDS", help="How long running requests may take when replicas end.",
            rich_help_panel=_NETWORK,
        ),
    ] = 30.0,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Return when it runs, and leave it on the cluster.", rich_help_panel=_NETWORK),
    ] = False,
    remove: Annotated[
        bool,
        typer.Option("--remove", help="Take down what --detach left on the cluster.", rich_help_panel=_NETWORK),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the configuration, as 'serve deploy' and KubeRay take it.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Serve a model on a Ray cluster: replicas with a dial each, and as many of them as the load needs.

    Needs bitdial\\[ray]. Speaks the same protocol as bitdial serve, and blocks until Ctrl-C or SIGTERM, then drains.

    The dial and the number of replicas do not fight: the dial of each replica acts at once on its own queue; replicas follow the
    work that arrives, counted at the smallest ratio (arrivals, refused ones included, times the service time there), which
    does not change when the dial turns. A burst turns the dial up at once. If it lasts, replicas come after --up-delay and
    their start, queues become short, and the dial returns by itself. They go after --down-delay.
    """
    terminal = Terminal(json, quiet)
    with terminal.running():
        from bitdial.serving.ray.config import make_deploy_config, serve_document
        from bitdial.serving.server.config import model_arguments, read_key_file

        if detach and address is None:
            raise ConfigError(
                "--detach needs the --address of a cluster: one that is started here ends with this command"
            )
        entry: dict[str, Any] = {
            **model_arguments([str(model)])[0],
            "slo_ms": slo, "policy": policy, "max_batch": max_batch, "max_wait_ms": max_wait, "max_queue": max_queue,
            "max_ratio": reading.parse_share(max_ratio, "--max-ratio"), "threads": threads, "engine": engine, "isa": isa,
            "min_accuracy": None if min_accuracy is None else reading.parse_share(min_accuracy, "--min-accuracy"),
            "table": table,
        }  # fmt: skip
        entry["path"] = str(Path(entry["path"]).absolute())
        if table is not None:
            entry["table"] = str(table.absolute())
        if name is not None:
            entry["name"] = name
        config = make_deploy_config(
            {
                "models": [entry], "host": host, "port": port, "route_prefix": route_prefix, "every_node": every_node,
                "min_replicas": min_replicas, "max_replicas": min_replicas if max_replicas is None else max_replicas,
                "utilization": reading.parse_share(utilization, "--utilization"), "up_delay": up_delay, "down_delay": down_delay,
                "hysteresis": reading.parse_share(hysteresis, "--hysteresis"), "num_cpus": num_cpus, "ship": ship,
                "api_key": None if api_key_file is None else read_key_file(api_key_file),
                "tls_cert": tls_cert, "tls_key": tls_key, "drain_timeout": drain,
            }
        )  # fmt: skip
        if dry_run:
            document = serve_document(config)
            terminal.say(json_text.dumps(document, indent=2))
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
