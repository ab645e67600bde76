"""What the ways of extracting low bits cost in the CPU engine, interleaved in one run: shifts chosen at run time (dynamic) and
low weights derived from the 8-bit ones, each over the default, static shifts and low weights of their own.

    python benchmarks/extraction.py
    python benchmarks/extraction.py --networks vit_s --batches 8 --repeats 5

One file serves all: the programs are the same but for where shifts and low weights come from, and every engine picks its kernels
by timing. Shares are medians over rounds of time over time.
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
from bitdial.quantization.program import Program
from bitdial.quantization.weights import bound_accumulators
from common import RESULTS, ROOT, Progress, data_folder, machine_caption, print_table, run_command
from machine import describe_machine
from peers.models import ModelFiles
from peers.networks import input_batch
from results import ResultFile

NETWORKS = "resnet18,resnet50,mobilenet_v2,vit_s"
RATIOS = (0.0, 0.5, 1.0)


def variants(program: Program) -> dict[str, Program]:
    """The program as it is, with dynamic shifts, and with low weights that are derived."""
    layers = {n: replace(layer, low_weight=None) for n, layer in program.layers.items()}
    for name, layer in layers.items():
        if layer.weight is not None:
            bound_accumulators(layer, program.qparams[program.instruction(name).inputs[0]])
    return {"static": program, "dynamic": replace(program, extraction="dynamic"), "derived": program.with_layers(layers)}


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
    results = ResultFile(options.results / f"extraction.{machine['kind']}.json", "extraction", machine)
    rows = []
    for network in options.networks.split(","):
        progress = Progress(network)
        program = load_program(ModelFiles(options.cache, data_folder(), progress).artifact(network))
        for batch in map(int, options.batches.split(",")):
            inputs = input_batch(network, batch)
            x = inputs[0] if len(inputs) == 1 else inputs
            engines = {
                kind: CpuEngine(own, isa=options.isa, threads=options.threads, batch_hint=batch)
                for kind, own in variants(program).items()
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
            over = {
                kind: {str(r): time_ratio(samples[f"{kind} {r}"], samples[f"static {r}"]) for r in RATIOS}
                for kind in ("dynamic", "derived")
            }
            results.put(
                f"{network}/{batch}/{options.threads}/{isa}", settings,
                {
                    "dynamic_over_static": over["dynamic"], "derived_over_stored": over["derived"],
                    "cases": {name: s.summary() for name, s in samples.items()},
                },
            )  # fmt: skip
            milliseconds = [f"{1e3 * samples[f'static {r}'].median:.2f}" for r in RATIOS]
            shares = (" / ".join(f"{own[str(r)]:.3f}" for r in RATIOS) for own in over.values())
            rows.append([network, str(batch), " / ".join(milliseconds), *shares])
        progress.done("measured")
    columns = ["network", "batch", "default, ms", "dynamic over it", "derived over it"]
    print_table("Ways of extraction at 0 / 50 / 100 % low", columns, rows, machine_caption(machine))


if __name__ == "__main__":
    run_command(main)
