"""The CPU engine under several threads, several engines, forks and long use; and what its counters say was executed."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_networks import (
    NETWORKS,
    QUICK,
    Floats,
    Network,
    outputs_of,
    quantized,
    reference_outputs,
    same_bits,
    samples,
)

import bitdial
from bitdial.artifact import save_program
from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.graph.ir import Graph
from bitdial.quantization.program import Program

ISAS = native.isas() if not native.missing() else []
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)
METHODS = ["direct", "fip", "winograd", "winograd_fip", "narrow"]
Quantized = tuple[Program, Floats, list[list[Floats]]]


@functools.cache
def program_of(name: str) -> Program:
    return quantized(NETWORKS[name](), QUICK.updated(bias_correction=False, low_weights="derived"))


@pytest.fixture(scope="module")
def residual() -> Quantized:
    program = program_of("residual")
    x = samples(program.graph, 5)
    return program, x, reference_outputs(program, x)


# ---- threads ---------------------------------------------------------------------------------------------------------------


def hammer(engines: list[CpuEngine], x: Floats, expected: list[list[Floats]], calls: int, callers: int = 8) -> None:
    """`callers` threads run batches and turn the dials at random; every output must be that of the ratio its call reports.
    They go on until every one has made `calls` calls and every ratio was met, asked for and by the dial."""
    ratios = engines[0].ratios
    wanted = {r: e[0] for r, e in zip(ratios, expected, strict=True)}
    begun = time.monotonic()
    problems: list[str] = []
    seen: set[tuple[float, bool]] = set()
    counts = [0] * callers

    def enough() -> bool:
        return min(counts) >= calls and len(seen) == 2 * len(ratios)

    def caller(index: int) -> None:
        rng = np.random.default_rng(index)
        try:
            while not enough() and not problems and time.monotonic() < begun + 600:
                engine = engines[int(rng.integers(len(engines)))]
                order = rng.permutation(len(x))[: int(rng.integers(1, len(x) + 1))]
                asked = [None, None, float(rng.choice(ratios))][int(rng.integers(3))]
                if rng.integers(2):
                    turned = engine.set_ratio(float(rng.choice(ratios)))
                    assert turned in wanted
                result, said = engine.run_with_ratio(x[order], asked)
                if asked is not None and said != asked:
                    problems.append(f"asked for {asked}, ran at {said}")
                if not same_bits(result, wanted[said][order]):
                    problems.append(f"thread {index}, batch {len(order)}: not the outputs of ratio {said}")
                seen.add((said, asked is None))
                counts[index] += 1
        except Exception as error:  # pragma: no cover - a failure in a thread must reach the test
            problems.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(700)
        assert not thread.is_alive(), "a caller hangs"
    assert not problems, problems[:3]
    assert enough(), (counts, seen)


@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_run_and_turn_the_dial(residual: Quantized, threads: int) -> None:
    program, x, expected = residual
    hammer([CpuEngine(program, threads=threads, kernels="fixed")], x, expected, 200)


@pytest.mark.slow
def test_eight_threads_run_and_turn_the_dial_for_long(residual: Quantized) -> None:
    program, x, expected = residual
    for threads, isa in ((2, ISAS[0]), (3, ISAS[0]), (2, ISAS[-1])):
        hammer([CpuEngine(program, isa=isa, threads=threads)], x, expected, 5000)


def test_several_engines_at_once(residual: Quantized) -> None:
    """Engines of one program with other kernels, instruction sets and threads, used, made and dropped side by side."""
    program, x, expected = residual
    engines = [
        CpuEngine(program, isa=isa, threads=threads, kernels=kernels)
        for isa, threads, kernels in ((ISAS[0], 2, "fixed"), (ISAS[-1], 3, "direct"), (ISAS[0], 1, "narrow"))
    ]
    done = threading.Event()
    failures: list[str] = []

    def come_and_go() -> None:
        while not done.is_set():
            engine = CpuEngine(program, threads=2, kernels="fixed")
            if not same_bits(engine.run(x, 1.0), expected[-1][0]):
                failures.append("a new engine gives other outputs")
            del engine

    maker = threading.Thread(target=come_and_go)
    maker.start()
    try:
        hammer(engines, x, expected, 50, callers=5)
    finally:
        done.set()
        maker.join()
    assert not failures


def test_runs_with_operators_elsewhere_are_safe_too() -> None:
    """Programs that leave the compiled steps hold a context of their own per call."""
    b = Network(3, 6, 6, seed=11)
    x = b.conv("x", 16)
    y = b.elsewhere(b.conv(x, 16))
    program = quantized(b.done(b.head(b.conv(y, 16, residual=x))), QUICK.updated(bias_correction=False))
    data = samples(program.graph, 5)
    engine = CpuEngine(program, threads=2)
    assert engine.compiled.reasons
    # it may differ in its last bit by the place in the batch: compare with this engine's own answers, made one by one
    alone = {r: np.concatenate([engine.run(data[i : i + 1], r) for i in range(5)]) for r in engine.ratios}
    problems: list[str] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            i = int(rng.integers(5))
            engine.set_ratio(float(rng.choice(engine.ratios)))
            got, said = engine.run_with_ratio(data[i : i + 1])
            if not same_bits(got, alone[said][i : i + 1]):
                problems.append(f"sample {i}, ratio {said}")

    threads = [threading.Thread(target=caller, args=(s,)) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


# ---- forks -----------------------------------------------------------------------------------------------------------------

FORKS = """
    import os, sys, threading, time, warnings
    import numpy as np
    import bitdial

    warnings.simplefilter("ignore")  # newer Pythons warn of every fork in a process with threads
    model = bitdial.load(sys.argv[1], engine="cpu", kernels="fixed", threads=2)
    x, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
    busy, rounds = sys.argv[4] == "busy", int(sys.argv[5])

    def right(ratio=None):
        out, said = model.engine.run_with_ratio(x, ratio)
        return bool((out == expected[model.ratios.index(said)]).all())

    def workers_of_this_process():
        return len(os.listdir("/proc/self/task"))

    assert right(1.0) and workers_of_this_process() == 2
    stop = threading.Event()
    wrong = []

    def hammer():
        while not stop.is_set():
            if not right():
                wrong.append("parent")

    threads = [threading.Thread(target=hammer) for _ in range(3 if busy else 0)]
    for t in threads:
        t.start()
    for i in range(rounds):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                good = all(right(r) for r in model.ratios)
                if not busy and workers_of_this_process() != 2:  # the child has a pool of its own again
                    code = 3
                elif good:
                    answers = []
                    many = [threading.Thread(target=lambda: answers.append(right(0.5))) for _ in range(4)]
                    [t.start() for t in many]
                    [t.join() for t in many]
                    grandchild = os.fork()
                    if grandchild == 0:
                        os._exit(0 if right(0.75) else 1)
                    _, status = os.waitpid(grandchild, 0)
                    code = 0 if all(answers) and len(answers) == 4 and status == 0 else 2
            finally:
                os._exit(code)
        deadline = time.monotonic() + 120
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise SystemExit(f"the child of fork {i} hangs")
            time.sleep(0.002)
        if status != 0:
            raise SystemExit(f"the child of fork {i} ended with {os.waitstatus_to_exitcode(status)}")
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and right(1.0)
    print("forks are safe")
"""


def run_forks(residual: Quantized, folder: Path, mode: str, rounds: int) -> None:
    program, x, expected = residual
    save_program(program, folder / "net.bitdial")
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", np.stack([e[0] for e in expected]))
    script = folder / "forks.py"
    script.write_text(textwrap.dedent(FORKS))
    paths = [
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        str(Path(bitdial.__file__).parent.parent),
    ]
    done = subprocess.run(
        [sys.executable, str(script), *(str(folder / n) for n in ("net.bitdial", "x.npy", "y.npy")), mode, str(rounds)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "forks are safe" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("mode", "rounds"), [("idle", 3), ("busy", 15)])
def test_forks(residual: Quantized, tmp_path: Path, mode: str, rounds: int) -> None:
    """A child of a process whose pool is alive computes right, with threads of its own; also from the middle of runs."""
    run_forks(residual, tmp_path, mode, rounds)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_many_forks_from_the_middle_of_runs(residual: Quantized, tmp_path: Path) -> None:
    run_forks(residual, tmp_path, "busy", 250)


# ---- memory ----------------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the resident set from")
def test_memory_is_stable_over_runs_and_batch_sizes(residual: Quantized) -> None:
    """Contexts are kept for the next run and reused; many batch sizes do not pile up."""
    program, x, _ = residual
    engine = CpuEngine(program, threads=2, kernels="fixed")
    many = np.repeat(x, 8, axis=0)
    for n in range(1, 41):
        engine.run(many[:n])
    gc.collect()
    before, contexts = resident(), engine.native.context_bytes()
    for _ in range(3):
        for n in range(1, 41):
            for ratio in (0.0, 1.0):
                engine.run(many[:n], ratio)
    for _ in range(300):
        engine.run(many[:4], 0.5)
    gc.collect()
    assert engine.native.context_bytes() <= max(contexts, 8 * engine.native.arena_bytes(40) + 8 * 256)
    assert resident() - before < 8 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the resident set from")
def test_engines_give_their_memory_back(residual: Quantized) -> None:
    program, x, _ = residual

    def once() -> None:
        CpuEngine(program, threads=3, kernels="fixed").run(x)

    for _ in range(10):
        once()
    gc.collect()
    before = resident()
    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    for _ in range(60):
        once()
    gc.collect()
    assert resident() - before < 8 << 20
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == threads  # no workers left behind


# ---- the dial --------------------------------------------------------------------------------------------------------------


def test_turning_the_dial_is_cheap(residual: Quantized, capsys: pytest.CaptureFixture[str]) -> None:
    """One atomic store: 100,000 turns allocate nothing that stays. The time is printed; a busy machine may stretch it."""
    engine = CpuEngine(residual[0], kernels="fixed")
    ratios = engine.ratios
    turn = engine.set_ratio
    for r in ratios:
        turn(r)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        turn(0.5)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2000
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(2000):
            turn(0.0)
            turn(0.25)
            turn(0.5)
            turn(0.75)
            turn(1.0)
        best = min(best, (time.perf_counter() - begin) / 10_000)
    with capsys.disabled():
        print(f"\nset_ratio: {best * 1e9:.0f} ns a call on {native.cpu_name()}")
    assert engine.ratio == 1.0 and turn(0.26) == 0.25


# ---- counters --------------------------------------------------------------------------------------------------------------


def expected_macs(program: Program, name: str, index: int, batch: int) -> tuple[int, int]:
    """(low, high) multiply-accumulates of a layer, from its shape and its low groups alone."""
    layer, node = program.layers[name], program.graph.node(name)
    assert layer.weight is not None
    positions = int(np.prod([int(d) for d in program.graph.types[name].shape[2:]])) if node.op == "conv" else 1
    taps = int(np.prod(layer.weight.shape[2:]))
    rows = len(layer.weight) // layer.conv_groups  # outputs that read a channel
    low = sum(int(w) for w, on in zip(np.diff(layer.group_bounds), layer.low[index], strict=True) if on)
    every = int(layer.group_bounds[-1]) if layer.n_groups else 0
    return batch * positions * taps * rows * low, batch * positions * taps * rows * (every - low)


def counted(engine: CpuEngine) -> dict[str, dict[str, Any]]:
    rows = {row["layer"]: row for row in engine.counters()}
    assert len(rows) == len(engine.counters())
    return rows


@EVERY_ISA
@pytest.mark.parametrize("name", ["residual", "grouped", "mobile"])
def test_counters_report_what_was_executed(isa: str, name: str) -> None:
    """Per layer and ratio low and high sums are exact, for every kernel; forcing a kernel changes which one is reported
    and how many products it issued, and nothing else."""
    program = program_of(name)
    x = samples(program.graph, 3)
    issued: dict[str, dict[str, int]] = {}
    for kernels in ("fixed", "direct", "fip", "winograd", "narrow"):
        engine = CpuEngine(program, isa=isa, threads=2, kernels=kernels)
        assert engine.counters() == []
        for index, ratio in enumerate(program.ratios):
            engine.reset_counters()
            engine.run(x, ratio)
            engine.run(x[:1], ratio)
            rows = counted(engine)
            assert set(rows) == set(program.layers)
            for layer_name, row in rows.items():
                low, high = expected_macs(program, layer_name, index, len(x) + 1)
                assert (row["low_macs"], row["high_macs"]) == (low, high), (kernels, ratio, layer_name)
                assert low + high == program.layers[layer_name].macs * (len(x) + 1)
                assert row["runs"] == 2 and row["multiplications"] > 0
                if row["kernel"] in ("direct", "narrow", "depthwise"):
                    assert row["multiplications"] == low + high
                if low == 0:
                    assert row["kernel"] in ("direct", "depthwise")
                elif kernels in ("direct", "fip", "winograd", "narrow"):
                    why = engine.native.methods(layer_name)[METHODS.index(kernels)]
                    assert (row["kernel"] == kernels) == (why == "")
        issued[kernels] = {n: r["multiplications"] for n, r in counted(engine).items() if r["kernel"] == kernels}
        engine.reset_counters()
        assert engine.counters() == []
    for method in ("fip", "winograd"):
        for layer_name, products in issued[method].items():
            direct = issued["direct"].get(layer_name)
            assert direct is not None and products != direct
            if method == "fip":
                assert products < direct
    total = sum(layer.macs for layer in program.layers.values())
    assert program.low_share(len(program.ratios) - 1) * total > 0


def test_counters_add_up_over_threads(residual: Quantized) -> None:
    """Nothing is lost when several callers run at once."""
    program, x, _ = residual
    engine = CpuEngine(program, threads=2, kernels="fixed")
    callers = [threading.Thread(target=lambda: [engine.run(x, 1.0) for _ in range(20)]) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    rows = counted(engine)
    for name, row in rows.items():
        low, high = expected_macs(program, name, len(program.ratios) - 1, 6 * 20 * len(x))
        assert (row["low_macs"], row["high_macs"], row["runs"]) == (low, high, 120)


def test_a_mixed_network_counts_by_ratio(residual: Quantized) -> None:
    """Runs at several ratios add up, and rows of one layer differ by kernel only."""
    program, x, _ = residual
    engine = CpuEngine(program, kernels="fixed")
    for ratio in program.ratios:
        engine.run(x, ratio)
    low = sum(row["low_macs"] for row in engine.counters())
    high = sum(row["high_macs"] for row in engine.counters())
    total = sum(layer.macs for layer in program.layers.values())
    assert low + high == total * len(x) * len(program.ratios)
    shares = sum(program.low_share(i) for i in range(len(program.ratios)))
    assert low == round(shares * total * len(x))
    keys = [(row["layer"], row["kernel"]) for row in engine.counters()]
    assert len(keys) == len(set(keys))
    outputs = outputs_of(engine.run(x, 0.0))
    assert len(outputs) == 1 and isinstance(program.graph, Graph)
