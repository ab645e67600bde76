"""One cell of the latency benchmark: a network at a batch size and a number of threads, all contestants in lock-step."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitdial.benchmarking.timing import Case, Plan, Samples, measure_interleaved, time_ratio
from peers.contestants import Contestant, low_precision_share
from peers.inputs import read_inputs
from peers.models import ModelFiles
from peers.networks import float_network
from peers.protocol import PeerError, Worker

Report = Callable[[str, float], None]
CHECKED = 2  # images of the batch whose outputs are compared with torch float32
# Least signal-to-noise ratio of the outputs, in dB: whoever is below does not run the same network.
LEAST_SNR = {"float32": 60.0, "bfloat16": 20.0, "int8": 5.0}  # enough to tell it from another network


def ratio_name(contestant: str, ratio: float) -> str:
    return f"{contestant}/{100 * ratio:.4g} %"


def snr_db(exact: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    """10 log10(sum exact^2 / sum (exact - got)^2), at most 200."""
    noise = float(((exact.astype(np.float64) - got) ** 2).sum())
    signal = float((exact.astype(np.float64) ** 2).sum())
    return min(200.0, 10.0 * math.log10(signal / noise)) if noise > 0.0 and signal > 0.0 else 200.0


class FloatAnswers:
    """Outputs of the float32 network on the first images of a batch; computed once per network."""

    def __init__(self, data: Path | None) -> None:
        self.data = data
        self._known: dict[str, npt.NDArray[np.float32]] = {}

    def __call__(self, network: str, inputs: Path) -> npt.NDArray[np.float32]:
        """float32 [min(batch, CHECKED), classes]."""
        samples = [x[:CHECKED] for x in read_inputs(inputs)]
        key = f"{network}/{len(samples[0])}/{inputs.name}"
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = float_network(network, self.data)(*map(torch.from_numpy, samples)).numpy()
        return self._known[key]


@contextlib.contextmanager
def workers(
    contestants: Sequence[Contestant],
    files: ModelFiles,
    network: str,
    batch: int,
    threads: int,
    report: Report,
    environment: dict[str, str],
) -> Iterator[tuple[dict[str, Worker], dict[str, dict[str, Any]], dict[str, str]]]:
    """(workers that loaded, {name: {"info", "seconds"}}, {name: why it did not}); all end with the block."""
    ready: dict[str, Worker] = {}
    loads: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    inputs = files.inputs(network, batch)
    with contextlib.ExitStack() as stack:
        for number, contestant in enumerate(contestants):
            report(f"loading {contestant.name}", number / len(contestants))
            try:
                settings = contestant.load_settings(files, network, inputs, threads)
                log = files.folder / "logs" / f"{contestant.name.replace('/', '-').replace(' ', '-')}.log"
                worker = Worker(contestant.adapter, log, environment=environment)
                stack.callback(worker.close)
                loads[contestant.name] = worker.ask("load", **settings)
                ready[contestant.name] = worker
            except PeerError as error:
                failed[contestant.name] = str(error)
            except Exception as error:  # what another library's quantizer raises is its own failure, not the cell's
                failed[contestant.name] = f"{contestant.name}: making its model: {type(error).__name__}: {error}"
        yield ready, loads, failed


def check_output(worker: Worker, contestant: Contestant, exact: npt.NDArray[np.float32], **arguments: Any) -> float:
    """SNR in dB of a contestant's outputs. Raises PeerError where they are not those of the network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.npy"
        worker.ask("output", path=str(path), **arguments)
        snr = snr_db(exact, np.load(path)[: len(exact)])
    if arguments.get("ratio", 0.0) == 0.0 and snr < LEAST_SNR[contestant.precision]:
        raise PeerError(
            f"{contestant.name} answers with {snr:.1f} dB of the float network's signal; "
            f"{LEAST_SNR[contestant.precision]:.0f} dB are expected of {contestant.precision}"
        )
    return snr


def measure_cell(
    contestants: Sequence[Contestant],
    files: ModelFiles,
    answers: FloatAnswers,
    network: str,
    batch: int,
    threads: int,
    plan: Plan,
    report: Report,
    environment: dict[str, str],
) -> dict[str, Any]:
    """A row: {"cases": {name: figures}, "loads", "failed"}. Cases of bitdial are named NAME/RATIO %."""
    exact = answers(network, files.inputs(network, batch))
    with workers(contestants, files, network, batch, threads, report, environment) as (ready, loads, failed):
        cases: list[Case] = []
        figures: dict[str, dict[str, Any]] = {}
        for contestant in contestants:
            worker = ready.get(contestant.name)
            if worker is None:
                continue
            try:
                mine, own = contestant_cases(contestant, worker, loads[contestant.name]["info"], exact)
            except PeerError as error:
                failed[contestant.name] = str(error)
                continue
            cases += mine
            figures |= own
        samples = measure_interleaved(cases, plan, lambda share: report("measuring", share)) if cases else {}
        for name, worker in ready.items():
            loads[name] |= worker.ask("memory")
    for name, own in samples.items():
        figures[name] |= own.summary() | {"images_per_second": batch / own.median}
    add_ratios(figures, samples)
    return {"cases": figures, "loads": loads, "failed": failed}


def contestant_cases(
    contestant: Contestant, worker: Worker, info: dict[str, Any], exact: npt.NDArray[np.float32]
) -> tuple[list[Case], dict[str, dict[str, Any]]]:
    """(cases to time, {case name: what is known of it}) of a loaded contestant. Raises PeerError."""
    ratios = info.get("ratios")
    if ratios is None:
        known = {
            "contestant": contestant.name,
            "precision": contestant.precision,
            "snr_db": check_output(worker, contestant, exact),
            "layers_in_precision": low_precision_share(contestant, info),
        }
        return [Case(contestant.name, worker.calls)], {contestant.name: known}
    cases, figures = [], {}
    for ratio in ratios:
        name = ratio_name(contestant.name, ratio)
        snr = check_output(worker, contestant, exact, ratio=ratio)
        executed = worker.ask("ask", what="executed", ratio=ratio)
        figures[name] = {
            "contestant": contestant.name, "precision": contestant.precision, "ratio": ratio, "snr_db": snr, **executed
        }  # fmt: skip
        cases.append(Case(name, lambda n, ratio=ratio: worker.calls(n, ratio=ratio)))  # type: ignore[misc]
    return cases, figures


def add_ratios(figures: dict[str, dict[str, Any]], samples: dict[str, Samples]) -> None:
    """Add each case's time relative to bitdial at ratio 0 (its first contestant's: the best instruction set), to its own
    contestant's ratio 0, and to the fastest int8 peer; round by round, None where there is no such case."""
    bases = {f["contestant"]: name for name, f in figures.items() if f.get("ratio") == 0.0 and name in samples}
    base = next(iter(bases.values()), None)
    peer = fastest_peer({name: {**figures[name], "median_ms": 1e3 * s.median} for name, s in samples.items()}, "int8")

    def relative(name: str, reference: str | None) -> float | None:
        if reference is None:
            return None
        value = time_ratio(samples[name], samples[reference])
        return value if math.isfinite(value) else None

    for name in samples:
        own = figures[name]
        own["to_bitdial_0"] = relative(name, base)
        own["to_own_0"] = relative(name, bases.get(own["contestant"]) if "ratio" in own else None)
        own["to_int8_peer"] = relative(name, peer)
        own["to_bitdial_0_and_int8_peer_are"] = [base, peer]


def fastest_peer(cases: dict[str, dict[str, Any]], precision: str | None = None) -> str | None:
    """Name of the fastest case that is not bitdial's (of one precision), None if there is none."""
    found = [
        (f["median_ms"], name)
        for name, f in cases.items()
        if "ratio" not in f and "median_ms" in f and precision in (None, f["precision"])
    ]
    return min(found)[1] if found else None
