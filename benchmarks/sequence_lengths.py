"""One text encoder for several lengths: what shorter sentences cost, beside the same model for the full length alone.

    python benchmarks/sequence_lengths.py
    python benchmarks/sequence_lengths.py --lengths 8,16,24,32 --batches 1,8 --repeats 9

MiniLM-L6 (48 tokens), quantized once with these lengths (by the greedy selector: which groups are low does not change times).
Sentences of the STS test part, padded to 48 tokens as clients do; per length those that fill at most so many places. Both engines
run the same batches, interleaved, and must give the same bits. Shares are medians over rounds of time over time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bitdial
from bitdial.artifact import load_program, save_program
from bitdial.benchmarking.timing import Case, Plan, measure_interleaved, time_ratio, timed
from bitdial.engines.base import create_engine
from common import RESULTS, Progress, machine_caption, print_table, run_command
from machine import describe_machine
from real_networks_data import MINILM
from results import ResultFile

RATIOS = (0.0, 0.5, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8,16,24,32", help="beside 48 (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    results = ResultFile(options.results / f"sequence_lengths.{machine['kind']}.json", "sequence_lengths", machine)
    if missing := MINILM.missing():
        raise SystemExit(f"error: {missing}")
    progress = Progress("minilm_l6")
    lengths = tuple(int(n) for n in options.lengths.split(","))
    config = bitdial.QuantizeConfig(lengths=lengths, selector="greedy", calibration_images=MINILM.calibration)
    calibration = tuple(torch.from_numpy(x) for x in MINILM.samples(MINILM.calibration))
    quantized = bitdial.quantize(MINILM.load(), [calibration], config, engine="reference")
    with tempfile.TemporaryDirectory() as folder:
        several = save_program(quantized.program, Path(folder) / "several.bitdial")
        one = save_program(replace(quantized.program, lengths={}), Path(folder) / "one.bitdial")
        program = load_program(Path(folder) / "several.bitdial")
    engines = {
        "full": create_engine(replace(program, lengths={}), "cpu", threads=options.threads),
        "lengths": create_engine(program, "cpu", threads=options.threads),
    }
    ids, mask = MINILM.tests(None)[0]
    filled = mask.sum(axis=1)
    rows = []
    for batch in map(int, options.batches.split(",")):
        for low, high in zip((0, *lengths), (*lengths, mask.shape[1]), strict=True):
            chosen = np.flatnonzero((filled > low) & (filled <= high))[:batch]
            if len(chosen) < batch:
                continue
            x = [ids[chosen], mask[chosen]]
            for ratio in RATIOS:
                if not np.array_equal(engines["full"].run(x, ratio), engines["lengths"].run(x, ratio)):
                    raise SystemExit(f"error: at length {high} and ratio {ratio} the answers differ")
            cases = [
                Case(f"{kind} {ratio}", timed(partial(engine.run, x, ratio)))
                for kind, engine in engines.items() for ratio in RATIOS
            ]  # fmt: skip
            samples = measure_interleaved(cases, Plan(repeats=options.repeats, seed=0))
            share = {str(r): time_ratio(samples[f"lengths {r}"], samples[f"full {r}"]) for r in RATIOS}
            results.put(
                f"{batch}/{high}/{options.threads}",
                {"batch": batch, "length": high, "lengths": lengths, "threads": options.threads, "repeats": options.repeats},
                {"share_of_full": share, "cases": {name: s.summary() for name, s in samples.items()},
                 "file_bytes": {"lengths": several.total, "full": one.total}},
            )  # fmt: skip
            share_here = f"{(filled <= high).mean() - (filled <= low).mean():.0%}"
            milliseconds = [f"{1e3 * samples[f'{kind} {r}'].median:.2f}" for r in RATIOS for kind in engines]
            rows.append([str(batch), str(high), share_here, *milliseconds, *(f"{share[str(r)]:.2f}" for r in RATIOS)])
    progress.done("measured")
    columns = ["batch", "tokens up to", "of sentences"]
    columns += [f"{r:.0%}, {kind}, ms" for r in RATIOS for kind in ("48", "lengths")] + [f"{r:.0%}, share" for r in RATIOS]
    print_table("MiniLM-L6, shorter sentences over 48 tokens", columns, rows, machine_caption(machine))
    print(f"file {several.total / 2**20:.1f} MiB with lengths {options.lengths}, {one.total / 2**20:.1f} without")


if __name__ == "__main__":
    run_command(main)
