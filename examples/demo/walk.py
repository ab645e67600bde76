"""The demo, `./demo`: the whole way on handwritten digits, from training to a server that rides out a burst.

Everything is measured in the CPU engine; where that is missing, accuracy is in the reference engine and latency is left out.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.cli import machine
from bitdial.cli.terminal import STAGES, Terminal, count_name, duration, percent, ratio_name, size_name
from bitdial.errors import BitdialError, ConfigError, EngineError
from bitdial.files import write_atomically

if TYPE_CHECKING:
    import torch

    from bitdial.api import QuantizedModel
    from bitdial.benchmarking.latency import LatencyRow
    from bitdial.quantization.config import QuantizeConfig
    from bitdial.zoo.digits import Network

CALIBRATION_IMAGES = 256
BATCH = 120
# Smaller than the defaults (50 x 50 on 256 images) so that the demo is quick; the digits need no more.
SEARCH = {"population": 20, "generations": 15, "search_images": 128}
QUICK = {"population": 8, "generations": 3, "search_images": 64}
QUICK_EPOCHS = 2
LATENCY_BATCHES = (1, 16)
LATENCY_BUDGET = 8.0  # seconds
WORTH = 1.05  # a smaller gain is within what measurements this short differ by


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="demo",
        description="Trains (or loads) a network on handwritten digits, quantizes it once, and shows what each setting of "
        "its dial costs and buys, at last under a burst of requests. Writes digits.bitdial, report.html, latency.png and "
        "burst.html.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of training, data split and search (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a smaller network, trained and searched less")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, and nothing else")
    options = parser.parse_args(arguments)
    if options.seed < 0 or (options.threads is not None and options.threads < 1):
        parser.error("--seed must not be negative, --threads must be at least 1")
    machine.yield_waiting_cores()
    terminal = Terminal(options.json)
    try:
        with terminal.running():
            terminal.interrupted = lambda: f"stopped; run it again: what is in {options.out} is used"
            terminal.emit(Demo(terminal, options.out, options.seed, options.quick, options.threads).run())
    except BitdialError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        terminal.emit({"error": str(error), "type": type(error).__name__})
        return 2
    except Exception as error:
        # typer.Exit after Ctrl-C carries the code; anything else is a bug and shows its traceback.
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        return code
    return 0


class Demo:
    """One run of the demo. Each step prints what it did."""

    def __init__(self, terminal: Terminal, out: Path, seed: int, quick: bool, threads: int | None) -> None:
        from bitdial.engines.base import available_engines

        self.terminal, self.out, self.seed, self.quick = terminal, out, seed, quick
        machine.set_threads(threads)
        self.network: Network = "digits" if quick else "digits_wide"
        self.missing = available_engines()["cpu"]
        self.engine = "reference" if self.missing else "cpu"
        self.seconds: dict[str, float] = {}

    @property
    def weights_path(self) -> Path:
        return self.out / f"{self.network}{'-quick' if self.quick else ''}.safetensors"

    @property
    def model_path(self) -> Path:
        return self.out / "digits.bitdial"

    @property
    def report_path(self) -> Path:
        return self.out / "report.html"

    @property
    def burst_path(self) -> Path:
        return self.out / "burst.html"

    @property
    def picture_path(self) -> Path:
        return self.out / "latency.png"

    def run(self) -> dict[str, Any]:
        """All steps; returns what --json prints. Raises BitdialError."""
        import torch

        from bitdial.cli.files import make_folder

        make_folder(self.out, "--out")
        started = time.perf_counter()
        self.terminal.say(f"on {machine.cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        self.say_engine()
        network = self.train()
        calibration, test = self.images()
        quantized = self.quantize(network, calibration)
        curve, baselines = self.measure(quantized, network, calibration, test)
        loaded, against_reference = self.save(quantized, test)
        executed = self.count(loaded, test)
        self.report(quantized, baselines, test)
        latency = self.latency(quantized)
        burst = self.burst()
        self.seconds["total"] = time.perf_counter() - started
        self.terminal.say(f"took {duration(self.seconds['total'])} in all")
        commands = self.commands()
        self.farewell(commands)
        return {
            "command": "demo",
            "network": self.network,
            "engine": {"name": self.engine, "cpu_engine_missing": self.missing},
            "model": str(self.model_path),
            "report": str(self.report_path),
            "weights": str(self.weights_path),
            "curve": curve,
            "baselines": baselines,
            "search": quantized.program.provenance["search"],
            "loaded_model_is_bit_identical": True,  # else `save` has raised
            "bit_identical_to_reference": against_reference,
            "executed": executed,
            "latency": latency,
            "burst": burst,
            "seconds": self.seconds,
            "next": commands,
        }

    def say_engine(self) -> None:
        """Which engine runs the model, and why."""
        if self.missing:
            self.terminal.say("the CPU engine cannot run; accuracy is from the reference engine, latency is left out")
            self.terminal.say(f"  {self.missing}")
        else:
            from bitdial.engines.cpu import native

            self.terminal.say(f"engine: cpu, {native.choose_isa()}, compiled kernels")

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Times a step; where no progress bar is drawn its beginning is told."""
        if not self.terminal.shows_progress:
            self.terminal.note(f"{text} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def train(self) -> torch.nn.Module:
        """The trained network, from the folder if it is there."""
        from bitdial.zoo.digits import DEFAULT_EPOCHS, train_digits

        epochs = QUICK_EPOCHS if self.quick else DEFAULT_EPOCHS[self.network]
        trained: list[int] = []
        with self.step("train", "training"), self.terminal.progress() as progress:
            progress("training", 0.0)

            def after_epoch(epoch: int, count: int, loss: float) -> None:
                trained.append(epoch)
                progress("training", epoch / count)

            network = train_digits(self.seed, epochs, after_epoch, self.weights_path, self.network)
        how = f"trained {len(trained)} epochs in {duration(self.seconds['train'])}" if trained else "taken from"
        where = "" if trained else f" {self.weights_path}"
        self.terminal.say(f"1  network: zoo:{self.network}, {how}{where}")
        return network

    def images(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Calibration images of the train part, and the test part in batches."""
        import torch

        from bitdial.cli.data import Batches
        from bitdial.zoo.datasets import load_dataset

        train = load_dataset("digits", "train", seed=self.seed)
        test = load_dataset("digits", "test", seed=self.seed)
        calibration = torch.from_numpy(train.calibration_subset(CALIBRATION_IMAGES, self.seed).array())
        self.terminal.say(
            f"2  images: scikit-learn's digits, {len(train)} to train on ({len(calibration)} of these calibrate), "
            f"{len(test)} to test on"
        )
        return calibration, list(Batches(test, BATCH))

    def config(self) -> QuantizeConfig:
        from bitdial.quantization.config import QuantizeConfig

        sizes = QUICK if self.quick else SEARCH
        return QuantizeConfig(selector="evolutionary", seed=self.seed, **sizes)

    def quantize(self, network: torch.nn.Module, calibration: torch.Tensor) -> QuantizedModel:
        """One file's worth of model, with an evolutionary search for the low groups."""
        from bitdial.api import quantize

        told: set[str] = set()
        with self.step("quantize", "quantizing"), self.terminal.progress() as progress:

            def report(stage: str, share: float) -> None:
                progress(stage, share)
                if not self.terminal.shows_progress and stage in ("calibrate", "search", "bias") and stage not in told:
                    self.terminal.note(f"  {STAGES[stage]} ...")
                    told.add(stage)

            quantized = quantize(network, calibration, self.config(), progress=report, engine=self.engine)
        program = quantized.program
        program.provenance["cpu"] = machine.cpu_model()
        program.provenance["source"] = {
            "model": f"zoo:{self.network}",
            "weights": self.weights_path.name,
            "data": "digits",
            "split_seed": self.seed,
            "preprocessing": None,
        }
        eligible = [layer for layer in program.layers.values() if layer.eligible]
        groups = [layer.n_groups for layer in eligible]
        search = program.provenance["search"]
        self.terminal.say(
            f"3  quantized in {duration(self.seconds['quantize'])}: {len(program.layers)} layers in 8-bit integers, "
            f"{len(eligible)} of them may run low, with {min(groups)} to {max(groups)} groups each"
        )
        self.terminal.say(
            f"   search: up to {self.config().generations} generations of {self.config().population} per ratio, "
            f"{search['evaluations']} candidates evaluated in {duration(search['seconds'])}"
        )
        return quantized

    def measure(
        self, quantized: QuantizedModel, network: torch.nn.Module, calibration: torch.Tensor, test: list[Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The curve on the test images, float32 and the naive baseline beside it; kept in the program."""
        from bitdial.cli.measure import measure_baselines, measure_curve, naive_program, print_curve

        with self.step("measure", "measuring"), self.terminal.progress() as progress:
            curve = measure_curve(quantized, test, None, progress)
            naive = naive_program(network, calibration, self.config(), progress)
            baselines = measure_baselines(network, naive, lambda x: quantized(x, 0.0), test, progress)
        images = sum(len(labels) for _, labels in test)
        quantized.program.curve = curve
        quantized.program.provenance["evaluation"] = {
            "data": "digits",
            "split_seed": self.seed,
            "preprocessing": None,
            "split": "test",
            "images": images,
            "of": images,
            "seed": self.seed,
            "baselines": baselines,
        }
        print_curve(
            self.terminal,
            curve,
            baselines,
            title=f"4  on {images} test images, {self.engine} engine ({duration(self.seconds['measure'])})",
        )
        self.terminal.say(
            f"   one image is {100 / images:.2f} points. Agreement and distance (of soft labels) are against the 8-bit "
            "model; naive always takes the top four bits."
        )
        return curve, baselines

    def save(self, quantized: QuantizedModel, test: list[Any]) -> tuple[QuantizedModel, bool | None]:
        """Write the file, load it, and compare all outputs with those before and with the reference engine's.

        Returns the loaded model, and True (None where the reference engine is all there is). Raises ArtifactError or
        EngineError if a single bit differs.
        """
        import torch

        from bitdial.api import QuantizedModel, load
        from bitdial.errors import ArtifactError

        with self.step("save", "saving, loading and comparing"):
            summary = quantized.save(self.model_path)
            loaded = load(self.model_path, self.engine)
            exact = QuantizedModel(quantized.program, "reference") if self.engine != "reference" else None
            for ratio in quantized.ratios:
                for inputs, _ in test:
                    outputs = loaded(inputs, ratio)
                    if not torch.equal(outputs, quantized(inputs, ratio)):
                        raise ArtifactError(
                            f"{self.model_path}: the loaded model's outputs differ from the saved one's; please report it"
                        )
                    if exact is not None and not torch.equal(outputs, exact(inputs, ratio)):
                        raise EngineError(
                            f"the {self.engine} engine's outputs differ from the reference engine's at ratio {ratio}; please "
                            "report it with the output of bitdial doctor"
                        )
        if loaded.ratios != quantized.ratios:
            raise ArtifactError(
                f"{self.model_path}: the loaded model's ratios differ from the saved one's; please report it"
            )
        images = sum(len(labels) for _, labels in test)
        self.terminal.say(
            f"5  saved {self.model_path} ({size_name(summary.total)}), loaded again: outputs bit-identical at "
            f"{len(loaded.ratios)} ratios"
        )
        if exact is None:
            return loaded, None
        self.terminal.say(
            f"   the {self.engine} engine's outputs are bit-identical to the reference engine's: {images} images at "
            f"{len(loaded.ratios)} ratios"
        )
        return loaded, True

    def count(self, loaded: QuantizedModel, test: list[Any]) -> list[dict[str, Any]] | None:
        """What the kernels counted for one image at every ratio. Raises EngineError if it is not what the plan says."""
        from bitdial.engines.cpu.engine import CpuEngine

        engine = loaded.engine
        if not isinstance(engine, CpuEngine):
            return None
        rows = []
        for index, ratio in enumerate(loaded.ratios):
            engine.reset_counters()
            loaded(test[0][0][:1], ratio)
            counted = engine.counters()
            low, high = (sum(row[name] for row in counted) for name in ("low_macs", "high_macs"))
            planned = loaded.program.low_share(index)
            if abs(low / (low + high) - planned) > 1e-9:
                raise EngineError(
                    f"at ratio {ratio} the kernels counted {low} low multiplies of {low + high}, the plan says "
                    f"{planned:.6f} of them; please report it"
                )
            kernels = list(dict.fromkeys(row["kernel"] for row in counted if row["low_macs"]))
            issued = sum(row["multiplications"] for row in counted)
            rows.append(
                {"ratio": ratio, "low_macs": low, "high_macs": high, "multiplications": issued, "kernels": kernels}
            )
        columns = [
            "setting",
            "low multiplies",
            "8-bit multiplies",
            "low share",
            "byte products issued",
            "kernels of the low ones",
        ]
        shown = [
            [f"ratio {ratio_name(row['ratio'])}", count_name(row["low_macs"]), count_name(row["high_macs"]),
             percent(row["low_macs"] / (row["low_macs"] + row["high_macs"]), 1), count_name(row["multiplications"]),
             ", ".join(row["kernels"]) or "-"]
            for row in rows
        ]  # fmt: skip
        self.terminal.table(columns, shown, "6  what the kernels counted while they ran one image")
        if any("direct" in row["kernels"] for row in rows):
            self.terminal.say("   direct computes low values in the 8-bit kernel, where the others would gain no time")
        return rows

    def report(self, quantized: QuantizedModel, baselines: list[dict[str, Any]], test: list[Any]) -> None:
        """One self-contained HTML file."""
        from bitdial.cli.report import build_report, count_saturated, write_report

        program = quantized.program
        with self.step("report", "writing the report"), self.terminal.progress() as progress:
            saturation = count_saturated(program, test, progress)
            title = "Handwritten digits: one model, one dial"
            write_report(build_report(program, title, baselines=baselines, saturation=saturation), self.report_path)
        self.terminal.say(f"7  wrote {self.report_path}; open it in a browser")

    def latency(self, quantized: QuantizedModel) -> dict[str, Any] | None:
        """Time every ratio, and draw accuracy against latency; None without the CPU engine, which alone claims speed."""
        if self.missing:
            return None
        from bitdial.benchmarking.latency import measure_latency
        from bitdial.benchmarking.timing import Plan
        from bitdial.cli.benchmark import describe_machine, latency_report, machine_line
        from bitdial.report.drawing import check_plot_path, write_plot
        from bitdial.report.latency import latency_chart

        plan = Plan(repeats=5 if self.quick else 15, budget=LATENCY_BUDGET, seed=self.seed)
        with self.step("latency", "measuring latency"), self.terminal.progress() as progress:
            rows = measure_latency(
                quantized.program, self.engine, batches=LATENCY_BATCHES, plan=plan, seed=self.seed, progress=progress
            )
        here = describe_machine()
        self._print_latency(rows, machine_line(self.engine, here, rows))
        said = verdict(rows)
        self.terminal.say(f"   {said}")
        picture: str | None = None
        try:
            check_plot_path(self.picture_path)
            batch = LATENCY_BATCHES[-1]  # one line: two would leave no room between the points
            drawn = [row for row in rows if row.batch == batch]
            report = latency_report(f"zoo:{self.network}, batch {batch}", self.engine, here, drawn)
            write_plot(latency_chart(report), self.picture_path)
            picture = str(self.picture_path)
            self.terminal.say(f"   wrote {picture}: accuracy against latency at batch {batch}")
        except ConfigError as error:  # matplotlib is not there
            self.terminal.say(f"   no picture: {error}")
        return {"rows": [row.as_json() for row in rows], "verdict": said, "picture": picture}

    def _print_latency(self, rows: Sequence[LatencyRow], where: str) -> None:
        columns = ["setting", "accuracy"]
        for batch in LATENCY_BATCHES:
            columns += [f"ms, batch {batch}", "speed"]
        lines = []
        for ratio in dict.fromkeys(row.ratio for row in rows):
            own = [row for row in rows if row.ratio == ratio]
            cells = [f"ratio {ratio_name(ratio)}", percent(own[0].quality.get("accuracy"))]
            for row in own:
                cells += [f"{row.milliseconds:.3f}", "-" if row.vs_base is None else f"{1 / row.vs_base:.2f}x"]
            lines.append(cells)
        self.terminal.table(columns, lines, f"8  accuracy and latency: {where}")

    def burst(self) -> dict[str, Any] | None:
        """Serve the model under a burst; None without the CPU engine or what serving needs."""
        if self.missing:
            return None
        missing = [name for name in ("fastapi", "uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]
        if missing:
            self.terminal.say(f"9  no server: {', '.join(missing)} is missing; pip install bitdial[serve]")
            return None
        from bitdial.loadtest import summarize
        from bitdial.report.loadtest import load_report
        from bitdial.report.loadtest_page import render_load_html
        from burst import IMAGES, LEAST_GAIN, run_burst

        with self.step("burst", "serving under a burst"), self.terminal.progress() as progress:
            found = run_burst(self.model_path, (1.0, 2.0) if self.quick else (3.0, 6.0), self.seed, progress)
        lines = []
        for name, result in found.results.items():
            figures = summarize(result)
            p99, accuracy = figures["latency_ms"]["p99"], figures["expected_accuracy"]
            lines.append([
                name, percent(figures["attainment"], 1), "-" if p99 is None else f"{p99:.1f}", percent(accuracy),
                ratio_name(round(figures["mean_ratio"] or 0.0, 3)), str(figures["counts"]["shed"] + figures["counts"]["expired"]),
            ])  # fmt: skip
        calm, burst = found.rates
        self.terminal.table(
            ["bitdial serve", f"within {1000 * found.slo:.0f} ms", "p99 ms", "accuracy", "mean ratio", "turned away"],
            lines,
            f"9  a burst: {calm:.0f} requests/s of {IMAGES} images, then {burst:.0f}, then {calm:.0f} again "
            f"(8 bits carry {found.carried[0]:.0f})",
        )
        if found.gain < LEAST_GAIN:
            self.terminal.say(
                f"   the dial buys {found.gain:.2f}x here: too little to help this network on this machine"
            )
        report = load_report(list(found.results.values()), title="A burst, without and with the dial")
        write_atomically(self.burst_path, render_load_html(report).encode())
        self.terminal.say(f"   wrote {self.burst_path}: load, latency, ratio and accuracy over time")
        return found.as_json()

    def commands(self) -> list[str]:
        """Commands that go on from here, as they can be typed in this folder."""
        bitdial, model, other = (
            _program(),
            shlex.quote(str(self.model_path)),
            shlex.quote(str(self.out / "digits-3bit.bitdial")),
        )
        weights = shlex.quote(str(self.weights_path))
        split = f" --split-seed {self.seed}" if self.seed else ""
        compiled = [
            f"{bitdial} inspect {model} --engine cpu --batch 16",
            f"{bitdial} benchmark {model} --batch 1,16 --html {shlex.quote(str(self.out / 'latency.html'))}",
            f"{bitdial} serve {model} --slo-ms 50   # and open the address it prints",
        ]
        return [
            f"{bitdial} inspect {model} --layers",
            *([] if self.missing else compiled),
            f"{bitdial} evaluate {model} --data digits --ratios 0,50,100",
            f"{bitdial} quantize --model zoo:{self.network} --weights {weights} --data digits{split} --low-bits 3 "
            f"--selector greedy --force -o {other}",
            f"{bitdial} compare {model} {other}",
            f"{bitdial} quantize --help",
        ]

    def farewell(self, commands: list[str]) -> None:
        self.terminal.say()
        self.terminal.say("Try next:")
        for command in commands:
            self.terminal.say(f"  {command}")
        self.terminal.say("or in Python:")
        self.terminal.say("  import bitdial")
        self.terminal.say(f"  qm = bitdial.load({str(self.model_path)!r}, engine={self.engine!r})")
        self.terminal.say("  qm.set_ratio(0.5)   # half of the eligible multiplies at low precision; qm(x) runs it")


def verdict(rows: Sequence[LatencyRow]) -> str:
    """One sentence on what the largest ratio bought, from measured rows of one or more batch sizes."""
    last = [row for row in rows if row.ratio == rows[-1].ratio]
    gains = [0.0 if row.vs_base is None else 1.0 / row.vs_base for row in last]
    speeds = " and ".join(f"{gain:.2f} times at batch {row.batch}" for gain, row in zip(gains, last, strict=True))
    ends = f"Ratio {ratio_name(last[0].ratio)} against {ratio_name(rows[0].ratio)}: {speeds} the speed"
    if max(gains) < WORTH:
        return f"{ends}. This network is too small for low bits to pay on this machine; the README has larger ones."
    before, after = rows[0].quality.get("accuracy"), last[0].quality.get("accuracy")
    cost = "" if before is None or after is None else f", {100 * (after - before):+.2f} points of accuracy"
    return f"{ends}{cost}."


def _program() -> str:
    """How to call the command line from here: its script if it is installed beside this Python, else the module."""
    script = Path(sys.executable).with_name("bitdial")
    if shutil.which("bitdial") is not None and Path(str(shutil.which("bitdial"))).absolute() == script.absolute():
        return "bitdial"
    if script.is_file():
        below = script.absolute().is_relative_to(Path.cwd())
        return shlex.quote(str(script.absolute().relative_to(Path.cwd()) if below else script))
    return f"{shlex.quote(sys.executable)} -m bitdial.cli"
