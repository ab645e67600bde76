"""What a batch costs on a worker, by ratio and size: measured through `Worker.run`, so that it is what serving will see. Where
an engine's time is modelled, what the model says.

Results are remembered per model file and machine, beside the engine's own choices (`bitdial.engines.cpu.tuning`): a restarted
server knows its table at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter as clock

import numpy as np

from bitdial._version import __version__
from bitdial.errors import ConfigError, InputError, OutputError
from bitdial.files import write_atomically
from bitdial.processor import usable_cores
from bitdial.serving.control import ServiceTable
from bitdial.serving.worker.base import Array, Worker
from bitdial.serving.worker.info import ModelInfo

FORMAT = 1
SECONDS = 4.0
MOST = 15  # runs of one cell
TRUSTED = 1.2  # factor by which remembered times may be off
SPARE = 4.0  # times what a request costs here that modelled time leaves it: the machine may be busy
HANDLING = 0.001  # seconds that server and load generator together take for a request, roughly
Progress = Callable[[float, str], None]
Cell = tuple[int, int]  # ratio index, samples


async def measure_table(
    worker: Worker,
    max_batch: int,
    progress: Progress | None = None,
    seconds: float = SECONDS,
    *,
    remember: bool = True,
) -> ServiceTable:
    """The service table of an idle worker: medians of several runs, in rounds over all ratios so that a machine that changes
    pace does so for all of them.

    Sizes are 1, 2, 4, ... and max_batch. `seconds` is what the measurement may take, roughly: where more would be needed, the
    first and the last ratio are measured at fewer sizes (always at 1 and, if max_batch allows, at one larger), and other ratios
    lie between them as they do at the nearest size at which they were measured.

    progress: called with a share in 0..1 and a text. remember: read and write the cache (a few batches check that what it says
    still holds: it may be of a time when the machine was busy). Raises as `Worker.run`. Modelled times are not measured.
    """
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise ConfigError(f"max_batch must be a positive whole number, got {max_batch!r}")
    if not seconds > 0:
        raise ConfigError(f"the time for measuring must be positive, got {seconds!r}")
    tell = progress or (lambda share, text: None)
    if worker.info.modelled:
        tell(1.0, "service times modelled")
        return modelled_table(worker.info, max_batch)
    path = cache_path(worker.info, max_batch) if remember else None
    if path is not None:
        table = read_cache(path, worker.info)
        if table is not None and await _still_true(worker, table):
            tell(1.0, "service times known from an earlier start")
            return table
    times = await _Measurement(worker, max_batch, tell, seconds).run()
    table = make_table(worker.info, times)
    if path is not None:
        with contextlib.suppress(OSError, OutputError):  # what cannot be remembered is measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(table.as_json(), indent=1).encode())
    tell(1.0, "service times measured")
    return table


def modelled_table(info: ModelInfo, max_batch: int) -> ServiceTable:
    """The service table of a model whose time is modelled."""
    times = {(i, n): n * s for i, s in enumerate(info.modelled) for n in batch_sizes(max_batch)}
    return make_table(info, times)


async def measure_dilation(worker: Worker, max_batch: int) -> float:
    """Seconds of the wall clock that one modelled second should take for what this machine does in it to hardly count: at least
    1, with two digits. `SPARE` times what requests of one sample and the largest batch take here at both ends of the dial, with
    `HANDLING`, over what the model says. Raises as `Worker.run`."""
    info, worst = worker.info, 0.0
    for samples in {1, max_batch}:
        request = random_request(info, samples)
        for index in {0, len(info.ratios) - 1}:
            times = []
            for _ in range(3):
                begin = clock()
                await worker.run([request], index)
                times.append(clock() - begin)
            worst = max(worst, (HANDLING + statistics.median(times)) / (samples * info.modelled[index]))
    wanted = SPARE * worst
    if wanted <= 1.0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(wanted)) - 1)
    return float(f"{math.ceil(wanted / unit - 1e-9) * unit:.2g}")


async def _still_true(worker: Worker, table: ServiceTable) -> bool:
    """Whether the largest batch takes about as long as the table says, at both ends of the dial."""
    samples = table.batches[-1]
    request = random_request(worker.info, samples)
    for index in sorted({0, len(table.ratios) - 1}):
        known = table.latency(index, samples)
        runs = 1 if known > 0.2 else 5
        times = []
        for _ in range(runs + 1):  # the first warms up
            begin = clock()
            await worker.run([request], index)
            times.append(clock() - begin)
        if not 1.0 / TRUSTED <= min(times) / known <= TRUSTED:
            return False
    return True


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and max_batch."""
    sizes = [1]
    while sizes[-1] * 2 <= max_batch:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == max_batch else [*sizes, max_batch]


def random_request(info: ModelInfo, samples: int, seed: int = 0) -> list[Array]:
    """One array per input: standard normal floats, or zeros and ones."""
    generator = np.random.default_rng(seed)
    arrays: list[Array] = []
    for tensor in info.inputs:
        dtype, shape = np.dtype(tensor.dtype), tensor.of(samples)
        if dtype.kind == "f":
            arrays.append(generator.standard_normal(shape, np.float32).astype(dtype, copy=False))
        else:
            arrays.append(generator.integers(0, 2, shape).astype(dtype))
    return arrays


class _Measurement:
    """One run of the plan in `measure_table`."""

    def __init__(self, worker: Worker, max_batch: int, tell: Progress, seconds: float) -> None:
        self.worker, self.max_batch, self.tell, self.budget = worker, max_batch, tell, seconds
        self.times: dict[Cell, list[float]] = {}
        self.requests: dict[int, list[Array]] = {}
        self.begin = clock()
        self.pace: dict[int, float] = {}  # expected seconds per sample, by ratio index

    def left(self) -> float:
        return self.budget - (clock() - self.begin)

    async def once(self, cell: Cell, keep: bool = True) -> float:
        """One round trip."""
        index, samples = cell
        if samples not in self.requests:
            self.requests[samples] = random_request(self.worker.info, samples)
        begin = clock()
        result = await self.worker.run([self.requests[samples]], index)
        seconds = clock() - begin
        if result.checked[0]:
            raise InputError(f"the model refuses what it was measured with: {result.checked[0]}")
        if keep:
            self.times.setdefault(cell, []).append(seconds)
            self.pace[index] = min(self.pace.get(index, seconds), seconds / samples)
        share = min(0.99, 1.0 - self.left() / self.budget)
        self.tell(share, f"measuring service times: ratio {self.worker.info.ratios[index]:g}, {samples} samples")
        return seconds

    def cost(self, cell: Cell) -> float:
        """Expected seconds of a run."""
        known = self.times.get(cell)
        return min(known) if known else cell[1] * self.pace.get(cell[0], max(self.pace.values()))

    async def run(self) -> dict[Cell, float]:
        """Median seconds by cell."""
        last = len(self.worker.info.ratios) - 1
        ends, cold = sorted({0, last}), list[Cell]()
        between = [i for i in range(last + 1) if i not in ends]
        sizes = batch_sizes(self.max_batch)
        for index in ends:
            await self.once((index, 1), keep=False)
        await self._rounds([(i, 1) for i in ends], 3, 0.2)
        if len(sizes) > 1:
            # One larger size at both ends in any case: the largest that fits, and it may take half of the time.
            fitting = [n for n in sizes[1:] if sum(2 * self.cost((i, n)) for i in ends) <= 0.5 * self.left()]
            cold = [(i, fitting[-1] if fitting else sizes[1]) for i in ends]
            await self._rounds(cold, 2, 0.5, least=1)
        wanted = [(i, 1) for i in between]
        rest = sorted((n for n in sizes if (0, n) not in self.times), reverse=True)
        for n in (n for n in sizes if (0, n) in self.times and n > 1):
            wanted += [(i, n) for i in between]
        for n in rest:
            wanted += [(i, n) for i in ends]
        for n in rest:
            wanted += [(i, n) for i in between]
        chosen, planned = list(self.times), 0.0
        for cell in wanted:
            need = 3 * self.cost(cell)  # a run to warm up, two to count
            if planned + need <= 0.9 * self.left():
                chosen.append(cell)
                planned += need
        for n in sizes[1:]:  # a size counts where both ends are measured
            if any((i, n) not in chosen for i in ends):
                chosen = [c for c in chosen if c[1] != n]
        chosen.sort(key=lambda c: (c[1], c[0]))
        for cell in chosen:
            if cell not in self.times:
                await self.once(cell, keep=False)
        await self._rounds(chosen, MOST, 1.0, least=1)
        # The first run of a cell that was not warmed up counts only where there is no other.
        return {c: statistics.median(s[1:] if c in cold and len(s) > 1 else s) for c, s in self.times.items()}

    async def _rounds(self, cells: Sequence[Cell], rounds: int, share: float, least: int = 2) -> None:
        """Run cells in turn, until each has run `rounds` times or the share of the time left is used; each gets `least`."""
        until = clock() + share * self.left()
        for _ in range(rounds):
            for cell in cells:
                have = len(self.times.get(cell, ()))
                if have < least or (have < rounds and clock() + self.cost(cell) <= until):
                    await self.once(cell)


def make_table(info: ModelInfo, times: dict[Cell, float]) -> ServiceTable:
    """A full table from the cells measured: the first and the last ratio at every size that occurs, others where they are."""
    last = len(info.ratios) - 1
    sizes = sorted({n for i, n in times if (0, n) in times and (last, n) in times})
    rows = []
    for index in range(last + 1):
        row = []
        for n in sizes:
            if (index, n) in times:
                row.append(times[index, n])
                continue
            share = _share(info, times, sizes, index, n)
            row.append((1.0 - share) * times[0, n] + share * times[last, n])
        rows.append(tuple(row))
    about = {
        "model": info.name,
        "digest": info.digest,
        "engine": dict(info.engine),
        "measured_cells": 0 if info.modelled else len(times),
        "interpolated_cells": len(sizes) * (last + 1) - sum(n in sizes for _, n in times),
    }
    return info.judge(ServiceTable(info.ratios, tuple(sizes), tuple(rows), info.accuracy, about))


def _share(info: ModelInfo, times: dict[Cell, float], sizes: Sequence[int], index: int, samples: int) -> float:
    """How far a ratio lies from the first to the last in time: as at the nearest size at which it was measured and at which
    the two differ (by 5 % at least), else in proportion to the ratio."""
    last = len(info.ratios) - 1
    for n in sorted(sizes, key=lambda n: abs(np.log(n / samples))):
        if (index, n) in times and abs(times[last, n] - times[0, n]) > 0.05 * times[0, n]:
            share = (times[index, n] - times[0, n]) / (times[last, n] - times[0, n])
            return float(np.clip(share, 0.0, 1.0))
    return (info.ratios[index] - info.ratios[0]) / (info.ratios[last] - info.ratios[0])


# ---- cache -----------------------------------------------------------------------------------------------------------------


def cache_path(info: ModelInfo, max_batch: int) -> Path:
    """File of a model's table: everything that its times depend on is in the name's digest."""
    # Here and not above: it brings the compiled engine's module, which a server with known times does not need otherwise.
    from bitdial.files import cache_folder

    stated = [FORMAT, __version__, _build(), np.__version__, platform.python_version(), usable_cores()]
    model = [info.digest, list(info.ratios), max_batch, info.engine]
    key = json.dumps([stated, model], sort_keys=True)
    return cache_folder() / "service" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _build() -> list[int]:
    """What tells one build of the compiled engine from another of the same version."""
    try:
        found = importlib.util.find_spec("bitdial.engines.cpu._native")
        status = os.stat(found.origin) if found is not None and found.origin is not None else None
    except (ImportError, OSError, ValueError):
        status = None
    return [] if status is None else [status.st_size, status.st_mtime_ns]


def read_cache(path: Path, info: ModelInfo) -> ServiceTable | None:
    """A table of an earlier start, or None if there is none that fits."""
    try:
        table = ServiceTable.from_json(path.read_bytes(), str(path))
    except (OSError, ConfigError, UnicodeDecodeError):
        return None
    if table.ratios != info.ratios or table.about.get("digest") != info.digest:
        return None
    return info.judge(table)
