"""What choosing shifts at run time costs in the CPU engine: dynamic over static extraction, interleaved in one run.

    python benchmarks/dynamic_extraction.py
    python benchmarks/dynamic_extraction.py --networks vit_s --batches 8 --repeats 5

One file serves both: the programs are the same but for how shifts are found, and every engine picks its kernels by timing. Shares
are medians over rounds of time over time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bitdial.artifact import load_program
from bitdial.benchmarking.timing import Case, Plan, measure_interleaved, time_ratio, timed
from bitdial.engines.cpu.engine import CpuEngine
from common import RESULTS, ROOT, Progress, data_folder, machine_caption, print_table, run_command
from machine import describe_machine
from peers.models import ModelFiles
from peers.networks import input_batch
from results import ResultFile

NETWORKS = "resnet18,resnet50,mobilenet_v2,vit_s"
RATIOS = (0.0, 0.5, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=None, help="instruction set (default: the best that this machine has)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache", help="folder of the models made")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    results = ResultFile(options.results / f"dynamic_extraction.{machine['kind']}.json", "dynamic_extraction", machine)
    rows = []
    for network in options.networks.split(","):
        progress = Progress(network)
        program = load_program(ModelFiles(options.cache, data_folder(), progress).artifact(network))
        for batch in map(int, options.batches.split(",")):
            inputs = input_batch(network, batch)
            x = inputs[0] if len(inputs) == 1 else inputs
            engines = {
                kind: CpuEngine(
                    replace(program, extraction=kind), isa=options.isa, threads=options.threads, batch_hint=batch
                )
                for kind in ("static", "dynamic")
            }
            cases = [
                Case(f"{kind} {ratio}", timed(partial(engine.run, x, ratio)))
                for kind, engine in engines.items() for ratio in RATIOS
            ]  # fmt: skip
            samples = measure_interleaved(cases, Plan(repeats=options.repeats, seed=0))
            isa = engines["static"].isa
            settings = {
                "network": network, "batch": batch, "threads": options.threads, "isa": isa, "repeats": options.repeats
            }  # fmt: skip
            over = {str(r): time_ratio(samples[f"dynamic {r}"], samples[f"static {r}"]) for r in RATIOS}
            results.put(
                f"{network}/{batch}/{options.threads}/{isa}", settings,
                {"dynamic_over_static": over, "cases": {name: s.summary() for name, s in samples.items()}},
            )  # fmt: skip
            milliseconds = [f"{1e3 * samples[f'static {r}'].median:.2f}" for r in RATIOS]
            rows.append([network, str(batch), *milliseconds, *(f"{over[str(r)]:.3f}" for r in RATIOS)])
        progress.done("measured")
    columns = ["network", "batch", *(f"{r:.0%}, ms" for r in RATIOS), *(f"{r:.0%}, dynamic / static" for r in RATIOS)]
    print_table("Dynamic over static extraction", columns, rows, machine_caption(machine))


if __name__ == "__main__":
    run_command(main)
