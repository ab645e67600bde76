"""What the benchmark commands share: options, data, trained networks, progress, and how they end."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bitdial.errors import BitdialError, ConfigError, DataError
from bitdial.quantization.config import QuantizeConfig
from bitdial.zoo.datasets import ImageSet, load_dataset
from bitdial.zoo.registry import build_model
from machine import describe_machine
from results import ResultFile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = ("resnet20", "resnet56", "vgg", "vit")
CALIBRATION_IMAGES = 256
BATCH = 100
PAPER = {"target": "paper", "low_bits": 4}  # 4 bits everywhere, where the package's own default depends on the machine
TEST_ORDER_SEED = 0  # the test set is sorted by class; a part of it must not be


def data_folder() -> Path:
    """The folder of trained networks and images: BITDIAL_DATA, else ../shared/data. Raises DataError if absent."""
    folder = Path(os.environ.get("BITDIAL_DATA", ROOT.parent / "shared" / "data")).expanduser()
    for needed in ("cifar10/train.zip", "cifar10/test.zip", "weights"):
        if not (folder / needed).exists():
            raise DataError(
                f"DATA FOLDER MISSING: {folder / needed} does not exist; set BITDIAL_DATA to the folder that holds "
                "cifar10/ and weights/"
            )
    return folder


def weights_file(network: str) -> Path:
    """The trained weights of a network. Raises DataError where they are absent."""
    path = data_folder() / "weights" / f"{network}_cifar10_jpeg.safetensors"
    if not path.is_file():
        raise DataError(f"weights of {network} are missing: {path} does not exist; complete the data folder")
    return path


def trained_network(network: str) -> nn.Module:
    """A trained network of the zoo, in evaluation mode."""
    return build_model(f"zoo:{network}", weights_file(network))


def file_digest(path: Path) -> str:
    """16 hex digits over a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def calibration_images(seed: int = 0, n: int = CALIBRATION_IMAGES) -> Tensor:
    """float32 [n, 3, 32, 32]: training images drawn by a seed."""
    train = load_dataset(data_folder() / "cifar10", "train")
    return torch.from_numpy(train.calibration_subset(n, seed).array())


def test_images(n: int | None) -> ImageSet:
    """The test set, or n of its images, in an order that mixes the classes."""
    return load_dataset(data_folder() / "cifar10", "test").shuffled(TEST_ORDER_SEED).head(n)


def batches(images: Any, size: int = BATCH) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
    """Batches of an `ImageSet`, or of what has `batches` like it."""
    for array, labels in images.batches(size):
        yield torch.from_numpy(array), labels


@dataclass(frozen=True)
class Options:
    """What every command takes. images None: all test images."""

    networks: tuple[str, ...]
    images: int | None
    threads: int | None
    population: int | None
    generations: int | None
    fresh: bool
    changed: bool
    results: Path
    extra: argparse.Namespace

    def config(self, **changes: Any) -> QuantizeConfig:
        """The paper's configuration with some settings changed, and --population and --generations on top."""
        given = {"population": self.population, "generations": self.generations}
        return QuantizeConfig(**{**PAPER, **changes}, **{k: v for k, v in given.items() if v is not None})


def make_parser(
    name: str, description: str | None, networks: Sequence[str], images: int | None
) -> argparse.ArgumentParser:
    """The options of every command; a command adds its own.

    networks: the default choice. images: default number of test images, None for all, 0 for a command that uses none.
    """
    parser = argparse.ArgumentParser(prog=f"python benchmarks/{name}.py", description=description)
    parser.add_argument("--networks", default=",".join(networks), help="comma-separated (default: %(default)s)")
    if images != 0:
        parser.add_argument("--images", type=int, default=images, help=f"test images (default: {images or 'all'})")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--population", type=int, help="of the search, for a quick look; recorded in the row")
    parser.add_argument("--generations", type=int, help="of the search, for a quick look; recorded in the row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="keep rows measured under the same settings (the default)")
    again.add_argument("--changed", action="store_true", help="measure rows of other package sources again")
    again.add_argument("--fresh", action="store_true", help="start over")
    return parser


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, known: Sequence[str]) -> Options:
    """Parse and check. known: names that --networks may hold. Sets torch's threads. Raises ConfigError."""
    given = parser.parse_args(arguments)
    networks = tuple(dict.fromkeys(n.strip() for n in given.networks.split(",") if n.strip()))
    unknown = [n for n in networks if n not in known]
    if unknown or not networks:
        raise ConfigError(f"--networks: {', '.join(unknown) or 'nothing'} is not among {', '.join(known)}")
    images = getattr(given, "images", None)
    for option, value in (("images", images), ("threads", given.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}; give at least 1")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    return Options(
        networks, images, given.threads, given.population, given.generations, given.fresh, given.changed,
        given.results, given,
    )  # fmt: skip


def open_results(options: Options, stem: str, benchmark: str) -> ResultFile:
    """The file STEM.KIND.json of this machine's kind; says on stderr how many of its rows are of other code."""
    machine = describe_machine()
    file = ResultFile(options.results / f"{stem}.{machine['kind']}.json", benchmark, machine, fresh=options.fresh)
    stale = file.stale()
    if stale:
        what = "will be measured again if asked for" if options.changed else "are kept; --changed measures them again"
        note(f"{file.path.name}: {len(stale)} of {len(file.rows)} rows are of other package sources and {what}")
    return file


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Progress of one row on stderr: one rewritten line on a terminal, else a line every half minute."""

    def __init__(self, label: str) -> None:
        self.label, self.last, self.stage = label, 0.0, ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, stage: str, share: float) -> None:
        now = time.monotonic()
        pause = 0.2 if self.terminal else 30.0
        if now - self.last < pause and not (self.terminal and stage != self.stage):
            return
        self.last, self.stage = now, stage
        text = f"{self.label}: {stage} {100 * min(1.0, share):.0f} %"
        if self.terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            note(text)

    def done(self, text: str) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr)
        note(f"{self.label}: {text}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table on stdout; numbers to the right."""
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def machine_caption(machine: dict[str, Any]) -> str:
    """What belongs beside every figure."""
    return f"{machine['cpu']} ({machine['kind']}), {machine['threads']} threads, torch {machine['torch']}"


def run_command(main: Callable[[], None]) -> None:
    """Run a command; our errors end it with their message and status 2, an interruption with status 130."""
    try:
        main()
    except BitdialError as error:
        note(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        note("interrupted; rows that were finished are kept, the same command goes on from there")
        raise SystemExit(130) from None
