"""Accuracy and preparation on networks that people deploy: float32, the int8 quantizers of others, and bitdial's whole dial.

Every preparation has a process of its own, so that its peak memory is its own; peers run in the environment of --peer-python.
bitdial's outputs are those of the CPU engine where it runs the network, compared with the reference engine on the first
samples of every ratio, else of the reference engine; a row says which, and the largest deviation. Each network has a result
file of its own, and another one for --ablation: one step of the quantization left out at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitdial.artifact import load_program
from bitdial.engines.base import Engine, available_engines, create_engine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import BitdialError, ConfigError, EngineError
from bitdial.files import write_atomically
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from common import (
    ROOT,
    Options,
    Progress,
    machine_caption,
    make_parser,
    note,
    open_results,
    print_table,
    read_options,
    run_command,
)
from machine import describe_machine
from peers.protocol import PeerError, Worker
from real_networks_ablation import ABLATION, SHOWN, ablation_markdown, ablation_rows
from real_networks_ablation import HEAD as ABLATION_HEAD
from real_networks_data import NETWORKS, Arrays, Network
from real_networks_layers import SAMPLES, layer_lines, layer_losses, layers_markdown
from real_networks_rows import CONFIGURATIONS, FLOAT, PEERS, RATIOS, Configuration, Peer, choose_names, choose_rows
from real_networks_table import HEAD, NOTE, PROVISIONAL, markdown, provisional, sample_counts, stage_rows, table_rows
from results import read_rows, settings_hash
from scores import Outputs, Score

CACHE = ROOT / "benchmarks" / ".cache" / "real_networks"
BATCH = 32
LAYERS = "layers"  # the ablation's last row: which layers hold the loss
CHECKED = 4  # samples of each ratio that the reference engine runs too
TIMEOUT = 4 * 3600.0  # seconds that a contestant may take
Report = Callable[[str, float], None]


class NetworkRun:
    """The rows of one network; data, models and outputs of the float network are kept in a cache folder."""

    def __init__(self, network: Network, options: Options, cache: Path = CACHE) -> None:
        self.network, self.options = network, options
        self.file = open_results(options, file_stem(network.name, options), "real_networks")
        self.digest = network.digest()
        self.samples = options.extra.calibration or network.calibration
        self.cache = cache
        self._tests: tuple[Arrays, Score] | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """What a row's figures depend on."""
        common = {"network": self.network.name, "weights": self.digest, "tests": self.options.images}
        if name == FLOAT:
            return common
        common["calibration"] = self.samples
        configuration = _configuration(name)
        if configuration is None:
            return {**common, "peer": name}
        left_out = {"hook": configuration.hook} if configuration.hook else {}
        return {**common, "config": self.config(configuration).model_dump(mode="json"), **left_out}

    def config(self, configuration: Configuration) -> QuantizeConfig:
        ratios = SHOWN if leaves_out(self.options) else RATIOS
        return self.options.config(ratios=ratios, calibration_images=self.samples, **configuration.changes)

    def applies(self, name: str) -> bool:
        """Whether a row says anything about this network."""
        configuration = _configuration(name)
        return configuration is None or not configuration.transformer or self.network.transformer

    def measure(self, name: str) -> bool:
        """Measure a row unless the file has it; False where its contestant failed, which is said on stderr."""
        settings = self.settings(name)
        row = self.file.find(name, settings, changed=self.options.changed)
        refresh = self.options.extra.refresh_seconds and row is not None and provisional({name: row})
        if row is not None and not refresh:
            return True
        progress = Progress(f"{self.network.name} {name}")
        configuration, peer = _configuration(name), next((p for p in PEERS if p.name == name), None)
        try:
            if name == LAYERS:
                figures = self.layers(progress)
            elif configuration is not None:
                figures = self.bitdial(configuration, progress)
            elif peer is not None:
                figures = self.peer(peer, progress)
            else:
                figures = self.float32(progress)
        except BitdialError as error:
            progress.done(f"FAILED: {error}")
            return False
        row = self.file.put(name, settings, figures)
        progress.done(_summary(row))
        return True

    def tests(self) -> tuple[Arrays, Score]:
        if self._tests is None:
            self._tests = self.network.tests(self.options.images)
        return self._tests

    def stem(self, *parts: str) -> Path:
        """A path in the cache, by the network, its weights, and what else the file depends on."""
        self.cache.mkdir(parents=True, exist_ok=True)
        (self.cache.parent / ".gitignore").write_text("*\n", encoding="ascii")
        return self.cache / ".".join([self.network.name, self.digest[:8], *parts])

    def arrays(self, kind: str, n: int | None, make: Callable[[], Arrays]) -> list[str]:
        """The .npy files of samples, one per input, made if they are not there."""
        named = [self.stem(kind, str(n or "all"), f"{i}.npy") for i in range(8)]
        if not named[0].exists():
            for path, array in reversed(list(zip(named, make(), strict=False))):  # the first one comes last: all are whole
                _save(path, array)
        return [str(path) for path in named if path.exists()]

    def calibration(self) -> list[str]:
        return self.arrays("calibration", self.samples, lambda: self.network.samples(self.samples))

    def float_outputs(self, progress: Report) -> Outputs:
        path = self.stem("float", str(self.options.images or "all"), "npy")
        if path.exists():
            kept: Outputs = np.load(path)
            return kept
        model, (inputs, _) = self.network.load(), self.tests()
        with torch.no_grad():
            outputs = run_batches(lambda batch: model(*map(torch.from_numpy, batch)).numpy(), inputs, "float32", progress)
        _save(path, outputs)
        return outputs

    def onnx(self) -> Path:
        """The float network as ONNX, batch dimension "N"."""
        path = self.stem("onnx")
        if not path.exists():
            samples = tuple(torch.from_numpy(np.load(name)[:2]) for name in self.calibration())
            names = [f"input{i}" for i in range(len(samples))]
            partial = path.with_suffix(".partial")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this exporter is the older one; it needs no further package
                torch.onnx.export(
                    self.network.load(), samples, str(partial), dynamo=False, input_names=names, output_names=["output"],
                    dynamic_axes={name: {0: "N"} for name in [*names, "output"]}, opset_version=17,
                )  # fmt: skip
            partial.replace(path)
        return path

    def score(self, outputs: Outputs, ratio: float | None, progress: Report) -> dict[str, Any]:
        return {"ratio": ratio, **self.tests()[1].figures(outputs, self.float_outputs(progress))}

    def float32(self, progress: Report) -> dict[str, Any]:
        outputs = self.float_outputs(progress)
        return self.figures([self.score(outputs, None, progress)], self.onnx().stat().st_size)

    def figures(self, entries: list[dict[str, Any]], size: int, **more: Any) -> dict[str, Any]:
        score = self.tests()[1]
        return {"measure": score.name, "samples": score.samples, "entries": entries, "file_bytes": size, **more}

    def prepare(self, adapter: str, python: str, **settings: Any) -> tuple[Worker, dict[str, Any]]:
        """(the contestant's process, what it says of its preparation, with the process's peak memory)."""
        log = self.cache / "logs" / f"{self.network.name}.{adapter}.log"
        note(f"{self.network.name}: {adapter} prepares; its log is {log}")
        worker = Worker(adapter, log, timeout=TIMEOUT, python=python, alone=True)
        try:
            before = worker.ask("memory")["now_bytes"]
            threads = self.options.threads
            info = worker.ask("load", samples=self.calibration(), threads=threads, **settings)["info"]
            peak = worker.ask("memory")["peak_bytes"]
        except BaseException:
            worker.close()
            raise
        info["preparation"] |= {"before_bytes": before, "peak_bytes": peak, "threads": threads or torch.get_num_threads()}
        return worker, info

    def peer(self, peer: Peer, progress: Report) -> dict[str, Any]:
        """Prepared and run by another library."""
        python = self.options.extra.peer_python
        settings = {"model": str(self.onnx()), "transformer": self.network.transformer}
        artifact = self.stem(peer.name, f"{self.samples}{peer.suffix}")
        worker, info = self.prepare(peer.adapter, python, artifact=str(artifact), **settings)
        try:
            progress("evaluate", 0.0)
            path = self.stem(f"{peer.name}.outputs.npy")
            inputs = self.arrays("tests", self.options.images, lambda: self.tests()[0])
            worker.ask("output", path=str(path), inputs=inputs, batch=BATCH)
        finally:
            worker.close()
        entries = [self.score(np.load(path), None, progress)]
        return self.figures(entries, info.pop("file_bytes"), **info)

    def artifact(self, configuration: Configuration) -> Path:
        """The file of a configuration."""
        dump = self.config(configuration).model_dump(mode="json")
        own = {**dump, "n": self.samples, "code": self.file.code, "hook": configuration.hook}
        return self.stem(settings_hash(own), "bitdial")

    def layers(self, progress: Report) -> dict[str, Any]:
        """Which layers hold the loss of the ablation's start at 100 %."""
        whole = ABLATION[0]
        if not self.artifact(whole).exists():
            self.bitdial(whole, progress)
        inputs = [x[:SAMPLES] for x in self.network.tests(SAMPLES)[0]]

        def run(program: Program) -> Outputs:
            engine, _ = choose_engine(program)

            def answer(batch: Arrays) -> Outputs:
                return np.asarray(engine.run(batch if len(batch) > 1 else batch[0], 1.0), np.float32)

            return run_batches(answer, inputs, "", lambda *_: None)

        model = self.network.load()
        with torch.no_grad():
            exact = run_batches(lambda batch: model(*map(torch.from_numpy, batch)).numpy(), inputs, "", lambda *_: None)
        return {"samples": len(exact), **layer_losses(load_program(self.artifact(whole)), run, exact, progress)}

    def bitdial(self, configuration: Configuration, progress: Report) -> dict[str, Any]:
        """Prepared in a process of its own, loaded from its file and run here."""
        dump, hook = self.config(configuration).model_dump(mode="json"), configuration.hook
        artifact = self.artifact(configuration)
        told = artifact.with_suffix(".json")  # there: prepared by a run that was interrupted while it evaluated
        if not told.exists():
            settings = {"network": self.network.name, "config": dump, "artifact": str(artifact), "hook": hook}
            worker, info = self.prepare("bitdial_preparation", sys.executable, **settings)
            worker.close()
            write_atomically(told, json.dumps(info).encode())
        info = json.loads(told.read_text(encoding="utf-8"))
        program = load_program(artifact)
        started = time.perf_counter()
        inputs, _ = self.tests()
        engine, why = choose_engine(program)
        entries, deviations = [], []
        for ratio in program.ratios:
            def run(batch: Arrays, ratio: float = ratio) -> Outputs:
                return np.asarray(engine.run(batch if len(batch) > 1 else batch[0], ratio), np.float32)

            outputs = run_batches(run, inputs, f"evaluate at {100 * ratio:.0f} %", progress)
            deviations.append(deviation(program, inputs, outputs, ratio))
            entries.append({**self.score(outputs, ratio, progress), "low_share": program.low_share(len(entries))})
        info |= {
            "engine": "reference" if why else "cpu",
            "engine_reason": why,
            "deviation_from_reference": max(deviations),
            "evaluation_seconds": time.perf_counter() - started,
        }
        told.unlink()
        return self.figures(entries, artifact.stat().st_size, **info)


def run_batches(run: Callable[[Arrays], Outputs], inputs: Arrays, stage: str, progress: Report) -> Outputs:
    """Outputs of all samples, a batch at a time."""
    parts, n = [], len(inputs[0])
    for start in range(0, n, BATCH):
        parts.append(run([np.ascontiguousarray(x[start : start + BATCH]) for x in inputs]))
        progress(stage, min(1.0, (start + BATCH) / n))
    return np.concatenate(parts)


def choose_engine(program: Program) -> tuple[Engine, str]:
    """(the CPU engine, ""), or (the reference engine, why the other cannot run the program)."""
    why = available_engines()["cpu"]
    if not why:
        try:
            return create_engine(program, "cpu", kernels="fixed"), ""
        except EngineError as error:
            why = str(error)
    return ReferenceEngine(program, check_finite=False), why


def deviation(program: Program, inputs: Arrays, outputs: Outputs, ratio: float) -> float:
    """Largest difference to the reference engine on the first samples, over the largest output; 0 is equal to the bit."""
    batch = [torch.from_numpy(np.ascontiguousarray(x[:CHECKED])) for x in inputs]
    exact = ReferenceEngine(program, check_finite=False).run(batch if len(batch) > 1 else batch[0], ratio).numpy()
    return float(np.abs(exact - outputs[:CHECKED]).max() / max(float(np.abs(exact).max()), 1e-30))


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    """Under another name first, so that a cache never holds half a file."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)


def _configuration(name: str) -> Configuration | None:
    return next((c for c in (*CONFIGURATIONS, *ABLATION) if c.name == name), None)


def leaves_out(options: Options) -> bool:
    """Whether it is the ablation; other commands that prepare these networks do not know the option."""
    return bool(getattr(options.extra, "ablation", False))


def file_stem(network: str, options: Options) -> str:
    """The result file of a network, without kind of machine and suffix."""
    return f"real_networks{'_ablation' if leaves_out(options) else ''}.{network}"


def _summary(row: dict[str, Any]) -> str:
    if "layers" in row:
        return f"{row['layers'][0]['layer']} first, with {100 * row['layers'][0]['share']:.1f} %"
    shown = ", ".join(
        f"{100 * e['accuracy']:.2f}" if e["ratio"] is None else f"{100 * e['ratio']:.0f} %: {100 * e['accuracy']:.2f}"
        for e in row["entries"]
    )
    spent = row.get("preparation")
    return shown if spent is None else f"{shown} ({spent['wall_seconds']:.0f} s to prepare)"


def missing_modules(python: str, needs: Sequence[str]) -> list[str]:
    """Those of the modules that an interpreter does not find; all of them where it cannot be started."""
    code = f"import importlib.util as u; print(*[m for m in {list(needs)!r} if u.find_spec(m) is None])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return list(needs)
    return done.stdout.split()


def chosen_rows(options: Options) -> list[str]:
    """Rows that can be measured here; what is left out is said on stderr."""
    if leaves_out(options):
        return choose_names(options.extra.rows, [*(step.name for step in ABLATION), LAYERS])
    rows = choose_rows(options.extra.rows, note)
    for peer in PEERS:
        if peer.name in rows and (absent := missing_modules(options.extra.peer_python, peer.needs)):
            note(
                f"row '{peer.name}' left out: {', '.join(absent)} not installed for {options.extra.peer_python} "
                "(pip install -r benchmarks/requirements-peers.txt)"
            )
            rows.remove(peer.name)
    return rows


def stored(options: Options) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> rows of the result files of this machine's kind."""
    kind = describe_machine()["kind"]
    found = {}
    for network in options.networks:
        path = options.results / f"{file_stem(network, options)}.{kind}.json"
        if path.exists():
            found[network] = read_rows(path, "real_networks")
    return found


def show(options: Options) -> None:
    networks = {name: rows for name, rows in stored(options).items() if rows}
    if not networks:
        raise BitdialError("there are no results to show yet")
    machine = next(iter(next(iter(networks.values())).values()))["machine"]
    if leaves_out(options):
        show_ablation(options, networks, f"{machine_caption(machine)}.")
        return
    if options.extra.markdown:
        sys.stdout.write(markdown(networks, f"{machine_caption(machine)}."))
        return
    for network, rows in networks.items():
        counts = ", ".join(f"{n:,}" for n in sample_counts(rows))
        caption = f"{counts} test samples; {machine_caption(machine)}. {NOTE}"
        measure = next(iter(rows.values()))["measure"]
        print_table(f"{network}: {measure}", HEAD, table_rows(rows), f"{caption} {PROVISIONAL}" if provisional(rows) else caption)
        if options.extra.stages:
            print_table(f"{network}: stages of preparation", ["row", "stage", "s", "CPU, s"], stage_rows(rows))


def show_ablation(options: Options, networks: dict[str, dict[str, dict[str, Any]]], caption: str) -> None:
    if options.extra.markdown:
        losses = [layers_markdown(name, rows[LAYERS]) for name, rows in networks.items() if LAYERS in rows]
        sys.stdout.write("\n".join([ablation_markdown(networks, caption), *(line for own in losses for line in own)]))
        return
    for network, rows in networks.items():
        print_table(f"{network}: points to float", ["without", *ABLATION_HEAD], ablation_rows(rows), caption)
        if LAYERS in rows:
            head = ["low layer", "place", "weight", "% of multiplies", "% of the error at 100 %"]
            print_table(f"{network}: what goes with a layer at 8 bits", head, layer_lines(rows[LAYERS]))


def own_options(arguments: Sequence[str] | None = None) -> Options:
    """The command's options. Raises ConfigError."""
    parser = make_parser("real_networks", __doc__, tuple(NETWORKS), None)
    parser.add_argument("--rows", help="comma-separated names (default: all; float is always measured)")
    parser.add_argument("--ablation", action="store_true", help="leave out one step of the quantization at a time")
    parser.add_argument("--calibration", type=int, help="samples (default: 128, CIFAR 256)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers (default: this one)")
    parser.add_argument(
        "--refresh-seconds", action="store_true", help="measure rows again during which others used the machine"
    )
    parser.add_argument("--stages", action="store_true", help="also print where bitdial's preparation took its time")
    parser.add_argument("--markdown", action="store_true", help="print stored results in Markdown and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of stored results and stop")
    options = read_options(parser, arguments, tuple(NETWORKS))
    if options.extra.calibration is not None and options.extra.calibration < 1:
        raise ConfigError(f"--calibration is {options.extra.calibration}; give at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    options = own_options(arguments)
    failed = []
    if not (options.extra.markdown or options.extra.table):
        rows = chosen_rows(options)
        for name in options.networks:
            if reason := NETWORKS[name].missing():
                note(f"NETWORK SKIPPED: {name}: {reason}")
                continue
            run = NetworkRun(NETWORKS[name], options)
            failed += [f"{name} {row}" for row in rows if run.applies(row) and not run.measure(row)]
    show(options)
    if failed:
        raise BitdialError(f"these rows failed, see above: {', '.join(failed)}")


__all__ = ["NetworkRun", "PeerError", "main"]

if __name__ == "__main__":
    run_command(main)
