"""Accuracy of the trained networks: float32, the whole dial, and what each setting is worth.

Every figure is that of the integer-exact reference engine (see `measure`). Each network has its own result file, so that two
processes may work on different networks at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from accuracy_rows import Row, accuracy_rows, choose_rows, preparation_key
from accuracy_table import markdown, table_rows
from bitdial.errors import BitdialError, SelectionError
from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from common import (
    CALIBRATION_IMAGES,
    NETWORKS,
    Options,
    Progress,
    calibration_images,
    data_folder,
    file_digest,
    machine_caption,
    make_parser,
    open_results,
    print_table,
    read_options,
    run_command,
    test_images,
    trained_network,
    weights_file,
)
from machine import describe_machine
from measure import TestBench
from results import ResultFile, read_rows, settings_hash

# Parts of a program's provenance that belong beside its accuracy.
_SEARCH_KEYS = (
    "selector", "nested", "targets", "shares", "fitness", "greedy_fitness", "evaluations", "multiplies",
    "multiplies_saved_share", "seconds", "peak_memory_bytes", "deviation",
)  # fmt: skip


class NetworkRun:
    """The rows of one network; images, float outputs and preparations are made when a row first needs them."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options = network, options
        self.file = open_results(options, f"accuracy.{network}", "accuracy")
        self.weights = file_digest(weights_file(network))
        self._bench: TestBench | None = None
        self._prepared: dict[str, tuple[Prepared, float]] = {}

    def settings(self, row: Row | None) -> dict[str, Any]:
        """What a row's figures depend on. None: the float network."""
        common: dict[str, Any] = {
            "network": self.network,
            "weights": self.weights,
            "images": self.options.images,
        }
        if row is None:
            return common
        return {
            **common,
            "config": self.config(row).model_dump(mode="json"),
            "ratios": list(row.ratios),
            "calibration_seed": row.seed,
            "calibration_images": CALIBRATION_IMAGES,
        }

    def config(self, row: Row) -> QuantizeConfig:
        return self.options.config(**{"ratios": row.ratios, "seed": row.seed, **row.changes})

    def bench(self) -> TestBench:
        if self._bench is None:
            self._bench = TestBench(trained_network(self.network), test_images(self.options.images))
        return self._bench

    def prepared(self, row: Row, progress: Progress) -> tuple[Prepared, float, bool]:
        """(preparation, its seconds, whether it was made now)."""
        config = self.config(row)
        key = preparation_key(config, row.seed)
        made = key not in self._prepared
        if made:
            images = calibration_images(row.seed)
            started = time.perf_counter()
            prepared = prepare(trained_network(self.network), [images], config, progress=progress)
            self._prepared[key] = (prepared, time.perf_counter() - started)
        return *self._prepared[key], made

    def measure_float(self) -> None:
        progress = Progress(f"{self.network} float32")
        row, now = self.file.measure(
            "float32",
            self.settings(None),
            lambda: self.bench().float_figures(progress),
            changed=self.options.changed,
        )
        if now:
            progress.done(f"{100 * row['accuracy']:.2f} %")

    def measure_row(self, row: Row) -> None:
        """Quantize and evaluate, unless the file has the row."""
        settings = self.settings(row)
        if self.file.find(row.name, settings, changed=self.options.changed) is not None:
            return
        progress = Progress(f"{self.network} {row.name}")
        prepared, prepare_seconds, made = self.prepared(row, progress)
        config = self.config(row)
        started = time.perf_counter()
        program, resumed = self.quantize(prepared, config, row, settings, progress)
        seconds = time.perf_counter() - started
        figures = self.bench().figures(program, row.ratios, progress)
        search = {k: v for k, v in program.provenance["search"].items() if k in _SEARCH_KEYS}
        self.file.put(
            row.name,
            settings,
            {
                **figures,
                "prepare_seconds": prepare_seconds,
                "prepare_shared": not made,
                "quantize_seconds": seconds,
                "search_resumed": resumed,
                "search": search,
            },
        )
        shown = ", ".join(f"{100 * e['ratio']:.0f} %: {100 * e['accuracy']:.2f}" for e in figures["ratios"])
        progress.done(f"{shown} ({seconds:.0f} s to quantize, {figures['evaluation_seconds']:.0f} s to evaluate)")

    def quantize(
        self, prepared: Prepared, config: QuantizeConfig, row: Row, settings: dict[str, Any], progress: Progress
    ) -> tuple[Program, bool]:
        """(program, whether an interrupted search was continued). The checkpoint lies beside the results meanwhile."""
        digits = settings_hash({**settings, "code": self.file.code})
        checkpoint = self.options.results / f"accuracy.{self.network}.{digits}.checkpoint.tmp"
        self.options.results.mkdir(parents=True, exist_ok=True)
        resumed = checkpoint.exists()
        try:
            program = quantize_prepared(prepared, config, progress=progress, checkpoint=checkpoint)
        except SelectionError:
            if not resumed:
                raise
            checkpoint.unlink()  # of another problem after all: start the search anew
            resumed = False
            program = quantize_prepared(prepared, config, progress=progress, checkpoint=checkpoint)
        checkpoint.unlink(missing_ok=True)
        return program, resumed


def stored(options: Options) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> rows of the result files of this machine's kind."""
    kind = describe_machine()["kind"]
    found = {}
    for network in options.networks:
        path = options.results / f"accuracy.{network}.{kind}.json"
        if path.exists():
            found[network] = read_rows(path, "accuracy")
    return found


def sample_note(networks: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Number of test images and of search generations behind the rows; tells a quick look from the real thing."""
    rows = [row for found in networks.values() for row in found.values()]
    samples = sorted({int(row["samples"]) for row in rows if "samples" in row})
    searches = sorted(
        {
            f"{config['population']} x {config['generations']}"
            for config in (row["settings"].get("config") for row in rows)
            if config is not None
        }
    )
    counts = ", ".join(f"{n:,}" for n in samples)
    return f"{counts} test images; population x generations of the search: {', '.join(searches) or 'none'}"


def show(options: Options) -> None:
    networks = stored(options)
    if not networks:
        raise BitdialError("there are no results to show yet; run without --markdown first")
    note = sample_note(networks)
    if options.extra.markdown:
        sys.stdout.write(markdown(networks, note))
        return
    machine = next(iter(next(iter(networks.values())).values()))["machine"]
    print_table(
        "Top-1 accuracy, %; low widths of 4 bits unless said otherwise",
        ["configuration", *networks],
        table_rows(networks),
        f"{note}; {machine_caption(machine)}",
    )


def list_rows() -> None:
    rows = [
        [
            row.name,
            ", ".join(f"{k} = {v}" for k, v in row.changes.items()),
            " ".join(f"{100 * r:.0f}" for r in row.ratios),
            str(row.seed),
        ]
        for row in accuracy_rows()
    ]
    print_table("Rows, in the order of work", ["row", "changed settings", "ratios, %", "seed"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table. Raises BitdialError."""
    parser = make_parser("accuracy", __doc__, NETWORKS, None)
    parser.add_argument("--rows", help="comma-separated names (default: all; float32 is always measured)")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--markdown", action="store_true", help="print stored results in Markdown and stop")
    parser.add_argument("--table", action="store_true", help="print the table of stored results and stop")
    options = read_options(parser, arguments, NETWORKS)
    if options.extra.list:
        list_rows()
        return
    if not (options.extra.markdown or options.extra.table):
        rows = choose_rows(options.extra.rows)
        data_folder()
        for network in options.networks:
            run = NetworkRun(network, options)
            run.measure_float()
            for row in rows:
                run.measure_row(row)
    show(options)


__all__ = ["NetworkRun", "ResultFile", "main"]

if __name__ == "__main__":
    run_command(main)
