"""`python -m flexiq.demo`: the whole way on handwritten digits, from training to a file, a table and a report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexiq.cli import machine
from flexiq.cli.terminal import STAGES, Terminal, duration, size_name
from flexiq.errors import FlexiqError

if TYPE_CHECKING:
    import torch

    from flexiq.api import QuantizedModel
    from flexiq.quantization.config import QuantizeConfig

CALIBRATION_IMAGES = 256
BATCH = 120
# Smaller than the defaults (50 x 50 on 256 images) so that the demo is quick; the digits need no more.
SEARCH = {"population": 32, "generations": 30, "search_images": 128}
QUICK = {"population": 8, "generations": 3, "search_images": 64}
QUICK_EPOCHS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="demo",
        description="Trains (or loads) a small network on handwritten digits, quantizes it once, and shows what each "
        "setting of its dial costs. Writes digits.flexiq and report.html.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of training, data split and search (default: 0)")
    parser.add_argument("--quick", action="store_true", help="train and search less: seconds, and worse accuracies")
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
    except FlexiqError as error:
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
        self.terminal, self.out, self.seed, self.quick = terminal, out, seed, quick
        machine.set_threads(threads)
        self.seconds: dict[str, float] = {}

    @property
    def weights_path(self) -> Path:
        return self.out / ("digits-quick.safetensors" if self.quick else "digits.safetensors")

    @property
    def model_path(self) -> Path:
        return self.out / "digits.flexiq"

    @property
    def report_path(self) -> Path:
        return self.out / "report.html"

    def run(self) -> dict[str, Any]:
        """All steps; returns what --json prints. Raises FlexiqError."""
        import torch

        from flexiq.cli.files import make_folder

        make_folder(self.out, "--out")
        started = time.perf_counter()
        self.terminal.say(f"on {machine.cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        network = self.train()
        calibration, test = self.images()
        quantized = self.quantize(network, calibration)
        curve, baselines = self.measure(quantized, network, calibration, test)
        identical = self.save(quantized, test)
        self.report(quantized, baselines, test)
        self.seconds["total"] = time.perf_counter() - started
        self.terminal.say(f"took {duration(self.seconds['total'])} in all")
        commands = self.commands()
        self.farewell(commands)
        return {
            "command": "demo",
            "model": str(self.model_path),
            "report": str(self.report_path),
            "weights": str(self.weights_path),
            "curve": curve,
            "baselines": baselines,
            "search": quantized.program.provenance["search"],
            "loaded_model_is_bit_identical": identical,
            "seconds": self.seconds,
            "next": commands,
        }

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
        from flexiq.zoo.digits import DEFAULT_EPOCHS, train_digits

        epochs = QUICK_EPOCHS if self.quick else DEFAULT_EPOCHS
        trained: list[int] = []
        with self.step("train", "training"), self.terminal.progress() as progress:
            progress("training", 0.0)

            def after_epoch(epoch: int, count: int, loss: float) -> None:
                trained.append(epoch)
                progress("training", epoch / count)

            network = train_digits(self.seed, epochs, after_epoch, cache_path=self.weights_path)
        how = f"trained {len(trained)} epochs in {duration(self.seconds['train'])}" if trained else "taken from"
        where = "" if trained else f" {self.weights_path}"
        self.terminal.say(f"1  network: zoo:digits, {how}{where}")
        return network

    def images(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Calibration images of the train part, and the test part in batches."""
        import torch

        from flexiq.cli.data import Batches
        from flexiq.zoo.datasets import load_dataset

        train = load_dataset("digits", "train", seed=self.seed)
        test = load_dataset("digits", "test", seed=self.seed)
        calibration = torch.from_numpy(train.calibration_subset(CALIBRATION_IMAGES, self.seed).array())
        self.terminal.say(
            f"2  images: scikit-learn's digits, {len(train)} to train on ({len(calibration)} of these calibrate), "
            f"{len(test)} to test on"
        )
        return calibration, list(Batches(test, BATCH))

    def config(self) -> QuantizeConfig:
        from flexiq.quantization.config import QuantizeConfig

        sizes = QUICK if self.quick else SEARCH
        return QuantizeConfig(selector="evolutionary", seed=self.seed, **sizes)

    def quantize(self, network: torch.nn.Module, calibration: torch.Tensor) -> QuantizedModel:
        """One file's worth of model, with an evolutionary search for the low groups."""
        from flexiq.api import quantize

        told: set[str] = set()
        with self.step("quantize", "quantizing"), self.terminal.progress() as progress:

            def report(stage: str, share: float) -> None:
                progress(stage, share)
                if not self.terminal.shows_progress and stage in ("calibrate", "search", "bias") and stage not in told:
                    self.terminal.note(f"  {STAGES[stage]} ...")
                    told.add(stage)

            quantized = quantize(network, calibration, self.config(), progress=report)
        program = quantized.program
        program.provenance["cpu"] = machine.cpu_model()
        program.provenance["source"] = {
            "model": "zoo:digits",
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
        from flexiq.cli.measure import measure_baselines, measure_curve, naive_program, print_curve

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
            self.terminal, curve, baselines, title=f"4  on {images} test images ({duration(self.seconds['measure'])})"
        )
        self.terminal.say(
            f"   one image is {100 / images:.2f} points. Agreement and distance (of soft labels) are against the 8-bit "
            "model; naive always takes the top four bits."
        )
        return curve, baselines

    def save(self, quantized: QuantizedModel, test: list[Any]) -> bool:
        """Write the file, load it, and compare all outputs. Raises ArtifactError if they differ."""
        import torch

        from flexiq.api import load
        from flexiq.errors import ArtifactError

        with self.step("save", "saving and loading"):
            summary = quantized.save(self.model_path)
            loaded = load(self.model_path)
            identical = all(
                torch.equal(quantized(inputs, ratio), loaded(inputs, ratio))
                for ratio in quantized.ratios
                for inputs, _ in test
            )
        if not identical or loaded.ratios != quantized.ratios:
            raise ArtifactError(
                f"{self.model_path}: the loaded model's outputs differ from the saved one's; please report it"
            )
        self.terminal.say(
            f"5  saved {self.model_path} ({size_name(summary.total)}), loaded again: outputs bit-identical at "
            f"{len(loaded.ratios)} ratios"
        )
        return identical

    def report(self, quantized: QuantizedModel, baselines: list[dict[str, Any]], test: list[Any]) -> None:
        """One self-contained HTML file."""
        from flexiq.cli.report import build_report, count_saturated, write_report

        program = quantized.program
        with self.step("report", "writing the report"), self.terminal.progress() as progress:
            saturation = count_saturated(program, test, progress)
            title = "Handwritten digits: one model, one dial"
            write_report(build_report(program, title, baselines=baselines, saturation=saturation), self.report_path)
        self.terminal.say(f"6  wrote {self.report_path}; open it in a browser")

    def commands(self) -> list[str]:
        """Commands that go on from here, as they can be typed in this folder."""
        flexiq, model, other = (
            _program(),
            shlex.quote(str(self.model_path)),
            shlex.quote(str(self.out / "digits-3bit.flexiq")),
        )
        weights = shlex.quote(str(self.weights_path))
        split = f" --split-seed {self.seed}" if self.seed else ""
        return [
            f"{flexiq} inspect {model} --layers",
            f"{flexiq} evaluate {model} --data digits --ratios 0,50,100",
            f"{flexiq} quantize --model zoo:digits --weights {weights} --data digits{split} --low-bits 3 "
            f"--selector greedy --force -o {other}",
            f"{flexiq} compare {model} {other}",
            f"{flexiq} quantize --help",
        ]

    def farewell(self, commands: list[str]) -> None:
        self.terminal.say()
        self.terminal.say("Try next:")
        for command in commands:
            self.terminal.say(f"  {command}")
        self.terminal.say("or in Python:")
        self.terminal.say("  import flexiq")
        self.terminal.say(f"  qm = flexiq.load({str(self.model_path)!r})")
        self.terminal.say("  qm.set_ratio(0.5)   # half of the eligible multiplies at low precision; qm(x) runs it")


def _program() -> str:
    """How to call the command line from here: its script if it is installed beside this Python, else the module."""
    script = Path(sys.executable).with_name("flexiq")
    if shutil.which("flexiq") is not None and Path(str(shutil.which("flexiq"))).absolute() == script.absolute():
        return "flexiq"
    if script.is_file():
        below = script.absolute().is_relative_to(Path.cwd())
        return shlex.quote(str(script.absolute().relative_to(Path.cwd()) if below else script))
    return f"{shlex.quote(sys.executable)} -m flexiq.cli"


if __name__ == "__main__":
    sys.exit(main())
