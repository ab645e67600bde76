"""`bitdial serve`: models behind the Open Inference Protocol, holding a latency bound with the dial."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, percent, plain, ratio_name, safe
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.serving.control import ServiceTable
    from bitdial.serving.server.config import ServerConfig
    from bitdial.serving.server.run import Server

WORTHWHILE = 1.2  # below this factor between the ends of the dial it cannot help a network (measured, see the README)


@command
def serve(
    *,
    models: Annotated[list[str] | None, typer.Argument(metavar="[NAME=]MODEL.bitdial...", help="Models to serve.")] = None,
    model: Annotated[Given, options_of("bitdial.serving.server.config:ModelOptions")],
    server: Annotated[Given, options_of("bitdial.serving.server.config:ServerConfig")],
    api_key_file: Annotated[
        Path | None, option("--api-key-file", "FILE", "Ask callers for the key in this file.", "Network and security")
    ] = None,
    config: Annotated[
        Path | None, option("--config", "FILE.toml|.json", "Read settings there; options given here win.")
    ] = None,
    dashboard: Annotated[
        bool, option("--dashboard", "", "Print a Grafana dashboard of the metrics, to import, and stop.")
    ] = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Serve models over HTTP and hold a latency bound: the dial goes up when load does, and back as soon as it can.

    Open Inference Protocol v2, a live page at /, Prometheus metrics at /metrics. SIGTERM and Ctrl-C stop after the requests taken
    in are answered; SIGHUP reads the model files again.
    """
    if dashboard:
        from bitdial.serving.page import file_bytes

        print(file_bytes("grafana.json").decode(), end="", file=terminal._out)
        return
    from bitdial.serving.server.config import KEY_VARIABLE, make_config, read_config_file, read_key_file

    if api_key_file is not None:
        if server.get("api_key", os.environ.get(KEY_VARIABLE)) != os.environ.get(KEY_VARIABLE):
            raise ConfigError("--api-key and --api-key-file are both given; use one")
        server["api_key"] = read_key_file(api_key_file)
    read = None if config is None else read_config_file(config)
    given = make_config(list(models or []), read, server, model, None if config is None else config.parent)
    _warn(terminal, given, api_key_file)
    check_tables(given)
    _log(terminal.quiet)
    status = _run(terminal, given)
    if status:
        raise typer.Exit(status)


def _run(terminal: Terminal, config: ServerConfig) -> int:
    try:
        from bitdial.serving.server.run import run, run_with_uvloop
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error.name} is missing): pip install bitdial[serve]") from None

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(terminal.progress())

        def ready(server: Server) -> None:
            stack.close()  # the bar goes before the tables come
            save_tables(server)
            announce(terminal, server)

        def progress(name: str, share: float, text: str) -> None:
            bar(f"{name}: {text.partition(':')[0]}", share)

        return run_with_uvloop(lambda: run(config, ready, progress if terminal.shows_progress else None))


def check_tables(config: ServerConfig) -> None:
    """Raises ConfigError if one file is to hold the tables of several models."""
    for what in ("table", "save_table"):
        files = [getattr(m, what) for m in config.models if getattr(m, what) is not None]
        if len(set(files)) < len(files):
            option = "--" + what.replace("_", "-")
            raise ConfigError(f"{option} names one file for several models; give each its own in --config")


def save_tables(server: Server) -> None:
    """Write the service tables that are to be saved. Raises OutputError."""
    from bitdial.files import write_atomically

    for config in server.config.models:
        if config.save_table is not None:
            table = server.models[config.name].scheduler.table.table
            text = json.dumps(table.as_json(), indent=1) + "\n"
            write_atomically(config.save_table, text.encode(), "the service table")


def gain(table: ServiceTable, index: int, samples: int) -> float:
    """How many times more samples per second the ratio at `index` gives than the smallest one, in batches of `samples`."""
    return table.latency(0, samples) / table.latency(index, samples)


def _warn(terminal: Terminal, config: ServerConfig, key_file: Path | None) -> None:
    from bitdial.serving.server.config import key_file_is_open

    if not config.is_loopback():
        if config.api_key is None:
            terminal.note(
                f"warning: {config.host} can be reached from other machines, and no API key is asked for; set BITDIAL_API_KEY or "
                "--api-key-file"
            )
        if config.tls_cert is None:
            terminal.note("warning: requests, answers and the key travel unencrypted; give --tls-cert and --tls-key")
    if key_file is not None and key_file_is_open(key_file):
        terminal.note(f"warning: other users of this machine can read {key_file}; chmod 600 it")


def _log(quiet: bool) -> None:
    """Remarks of the running server go to standard error, one line each, with the time; uvicorn's own only if serious."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    ours = logging.getLogger("bitdial.serving")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.ERROR if quiet else logging.INFO)
    web = logging.getLogger("uvicorn.error")
    web.handlers, web.propagate = [handler], False
    web.setLevel(logging.ERROR)


def announce(terminal: Terminal, server: Server) -> None:
    """What is served, at what cost, and where; with --json one line, so that a program can wait for it."""
    from bitdial.processor import processor_name
    from bitdial.quantization.curve import rise_remark

    processor = processor_name()
    content: dict[str, Any] = {
        "event": "ready",
        "address": server.address,
        "port": server.port,
        "processor": processor,
        "models": [],
    }
    for name, model in server.models.items():
        table, allowed = model.scheduler.table.table, model.scheduler.allowed
        batch, top = model.scheduler.full_batch, allowed[-1]
        content["models"].append(
            {
                "name": name,
                "path": model.path,
                "ratios": [table.ratios[i] for i in allowed],
                "max_ratio": model.top_ratio,
                "max_ratio_from": model.bound_by,
                "slo_ms": 1000 * model.settings.slo,
                "full_batch": batch,
                "gain": gain(table, top, batch),
                "dilation": model.dilation,
                "table": table.as_json(),
                "engine": model.info.engine,
            }
        )
        shown = [b for b in dict.fromkeys((1, batch, table.batches[-1])) if b <= table.batches[-1]]
        terminal.table(
            ["ratio", *(f"{b} sample{'s' if b > 1 else ''}, ms" for b in shown), "samples/s", "speed", "accuracy"],
            [
                [
                    ratio_name(table.ratios[i]), *(f"{1000 * table.latency(i, b):.2f}" for b in shown),
                    f"{model.pool.size * table.throughput(i, batch):.0f}", f"{gain(table, i, batch):.2f}x",
                    percent(table.accuracy[i]),
                ]
                for i in allowed
            ],
            f"{name}: {model.path}",
        )  # fmt: skip
        terminal.say(_engine_line(model))
        terminal.say(_gain_line(gain(table, top, batch), len(allowed), model.dilation is not None))
        if model.dilation is not None:
            terminal.say(
                f"time is modelled: one second of the engine's takes {model.dilation:g} s here; the bound and all figures are in "
                "its seconds, and bitdial loadtest sends by it"
            )
        if model.bound_by == "model file":
            terminal.say(safe(model.ceiling_words()))
        if remark := rise_remark(table.accuracy):
            terminal.say(remark)
        terminal.say()
    terminal.say(f"{processor}")
    terminal.say(f"ready at {server.address} (live page, /metrics, /v2/...); bound: {_bounds(server)}; Ctrl-C to stop")
    sys.stdout.flush()
    if terminal.as_json:
        print(json.dumps(plain(content), allow_nan=False), file=terminal._out, flush=True)


def _bounds(server: Server) -> str:
    bounds = {f"{1000 * m.settings.slo:g} ms" for m in server.models.values()}
    return ", ".join(sorted(bounds))


def _engine_line(model: Any) -> str:
    engine = model.info.engine
    facts = [f"engine {engine.get('name', '?')}"]
    facts += [str(engine[key]) for key in ("isa",) if engine.get(key)]
    if engine.get("threads"):
        facts.append(f"{engine['threads']} thread{'' if engine['threads'] == 1 else 's'}")
    facts.append(f"{model.pool.size} worker{'' if model.pool.size == 1 else 's'}")
    facts.append(f"policy {model.policy}")
    return safe(", ".join(facts))


def _gain_line(factor: float, ratios: int, modelled: bool = False) -> str:
    if ratios == 1:
        return "the dial has one setting here: it cannot help"
    line = f"the dial buys {factor:.2f}x {'by the model' if modelled else 'on this machine'}"
    if factor < WORTHWHILE:
        line += f": below {WORTHWHILE:g}x, it cannot help this network here; more workers or a smaller network can"
    return line
