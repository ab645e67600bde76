"""What commands write: tables and JSON to standard output, notes and progress to standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from bitdial.finetuning.trainer import TrainingProgress

PLAIN_WIDTH = 132  # columns of a table that goes to a file or pipe

# What the pipeline calls its stages -> what the progress bar says.
STAGES = {
    "capture": "capturing the network",
    "calibrate": "calibrating",
    "8-bit model": "making the 8-bit model",
    "values": "collecting 8-bit values",
    "shifts": "choosing shifts, scoring groups",
    "sensitivity": "measuring layers",
    "search": "searching",
    "bias": "correcting the bias table",
    "tune": "tuning low weights",
    "export": "making the trained model",
    "float run": "running the float network",
    "quantize": "quantizing",
    "quantized run": "running the quantized network",
    "score": "scoring layers",
    "plan": "planning",
    "accuracy": "measuring accuracy",
    "done": "done",
}


class Terminal:
    """Where one command writes.

    as_json: only the object given to `emit` reaches standard output. quiet: no notes, no progress.
    `interrupted` makes what Ctrl-C prints: commands set it as their work proceeds.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.interrupted: Callable[[], str] = lambda: "stopped; nothing was written"
        self._out: TextIO = sys.stdout

    @property
    def shows_progress(self) -> bool:
        return not self.quiet and not self.as_json and sys.stderr.isatty()

    def emit(self, content: Mapping[str, Any]) -> None:
        """With --json: the command's one object. Numbers that JSON lacks become null."""
        if self.as_json:
            print(json.dumps(plain(content), allow_nan=False, indent=2), file=self._out)
            self._out.flush()

    def say(self, text: str = "") -> None:
        """A line of the result (not with --json)."""
        if not self.as_json:
            print(safe(text), file=self._out)

    def note(self, text: str) -> None:
        """A remark on standard error."""
        if not self.quiet:
            print(safe(text), file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> None:
        """A table (not with --json); the first `left` columns are flush left, the others right."""
        if self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(safe(title)) if title else None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(safe(cell)) for cell in row))
        width = None if self._out.isatty() else PLAIN_WIDTH
        Console(file=self._out, width=width, highlight=False).print(table)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, float], None]]:
        """A callback (stage, share done) that draws a bar with the time left of the stage."""
        if not self.shows_progress:
            yield lambda stage, share: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=120)
        current: dict[str, Any] = {}

        def report(stage: str, share: float) -> None:
            if current.get("stage") != stage:
                if "task" in current:
                    bar.remove_task(current["task"])
                current.update(stage=stage, task=bar.add_task(STAGES.get(stage, stage), total=1.0))
            bar.update(current["task"], completed=share)

        with bar:
            yield report

    @contextlib.contextmanager
    def training(self) -> Iterator[Callable[[TrainingProgress], None]]:
        """A callback for every update of a training: a bar with epoch, loss, validation accuracies and time left; without a
        terminal, a note after every evaluation.
        """
        shown: tuple[float, ...] | None = None

        def note(at: TrainingProgress) -> None:
            nonlocal shown
            if at.accuracies != shown or at.update == at.updates:
                shown = at.accuracies
                self.note(f"{_update_name(at)}{_training_state(at)}{_left(at)}")

        if not self.shows_progress:
            yield note
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}", markup=False),
        )
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task("training", total=None, state="")

        def report(at: TrainingProgress) -> None:
            state = f"{_training_state(at)}{_left(at)}".removeprefix(", ")
            name = f"epoch {min(at.epoch + 1, at.epochs)}/{at.epochs}"
            bar.update(task, total=at.updates, completed=at.update, description=name, state=state)

        with bar:
            yield report

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a command's work: Ctrl-C says how to go on; warnings become notes; with --json, what others print goes
        to standard error.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)  # torch's remarks to its own developers
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = lambda message, *_: self.note(f"note: {message}")
            if self.as_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            try:
                yield
            except KeyboardInterrupt:
                message = self.interrupted()
                print(f"\n{safe(message)}", file=sys.stderr)
                self.emit({"error": message, "type": "KeyboardInterrupt"})
                raise typer.Exit(130) from None


def _update_name(at: TrainingProgress) -> str:
    return f"epoch {min(at.epoch + 1, at.epochs)}/{at.epochs}, update {at.update}/{at.updates}"


def _training_state(at: TrainingProgress) -> str:
    accuracies = " ".join(f"{100 * a:.1f}" for a in at.accuracies)
    return f", loss {at.loss:.4g}" + (f", validation {accuracies} %" if accuracies else "")


def _left(at: TrainingProgress) -> str:
    return "" if at.remaining is None or at.update == at.updates else f", {duration(at.remaining)} left"


def safe(text: str) -> str:
    """Text without control characters: names come from model files, and a terminal obeys what it is sent."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def plain(value: Any) -> Any:
    """`value` with NumPy scalars, tuples and paths turned into what JSON has, NaN and infinity into null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def percent(value: float | None, digits: int = 2) -> str:
    """0.8787 -> "87.87 %"; None -> "-"."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def ratio_name(ratio: float) -> str:
    """0.125 -> "12.5 %"."""
    return f"{100 * ratio:.4g} %"


def size_name(size: int) -> str:
    """Bytes in words."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def count_name(count: float) -> str:
    """1234567 -> "1.23 M"."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {suffix}"
    return f"{count:.4g}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
