"""What the search costs and brings: time, multiplies, shared prefixes, memory, fitness; and what nesting costs.

The deviation of the search's fast evaluation from the exact engine is measured on the sets that the search chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from accuracy_table import seed_mean
from bitdial.engines.reference.prediction import predict
from bitdial.engines.reference.search import CandidateEvaluator
from bitdial.errors import DataError
from bitdial.pipeline import (
    Chosen,
    LowTables,
    Prepared,
    choose,
    eight_bit_program,
    low_tables,
    prepare,
    quantize_prepared,
)
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
    percent,
    print_table,
    read_options,
    run_command,
    test_images,
    trained_network,
    weights_file,
)
from machine import reset_peak_memory, resident_memory
from measure import TestBench
from real_networks_data import NETWORKS as REAL_NETWORKS
from results import ResultFile
from scores import spearman

RATIOS = (0.25, 0.5, 0.75)
NESTING_RATIOS = (0.3, 0.4, 0.5)
SEEDS = (0, 1, 2)
RANDOM_DRAWS = 10
UNSEEN = 2048  # images that no choice has seen, for the ranking (a few may be calibration images too: both are drawn at random)
REAL_UNSEEN = 256  # photographs or sentences of the test part, where the network is none of CIFAR-10's
FEW = 64  # samples
CHOSEN = ("evolutionary", "evolutionary, predicted", "greedy", "greedy, predicted")


def measure_search(
    prepared: Prepared, config: QuantizeConfig, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """The cost of one evolutionary search over all its ratios, by running every candidate and by predicted errors; the exact
    fitness of what they, greedy and random choose; and how predicted distances rank against exact ones.

    Peak memory is the process's resident peak during the exact search; `memory_before` is what calibration data, network and
    libraries held before it.
    """
    program = eight_bit_program(prepared, config)
    tables = low_tables(prepared, program, config)

    def timed(**changes: Any) -> tuple[Chosen, float]:
        started = time.perf_counter()
        chosen = choose(prepared, program, tables, config.updated(**changes), progress=progress)
        return chosen, time.perf_counter() - started

    predicted, predicted_seconds = timed(search="predicted")
    greedy, greedy_seconds = timed(search="predicted", selector="greedy")
    reset = reset_peak_memory()
    before = resident_memory()
    chosen, seconds = timed(search="exact")
    after = resident_memory()
    evaluator, n = _evaluator(prepared, program, tables, chosen.layers, config)
    exact_greedy, exact_greedy_seconds = timed(search="exact", selector="greedy")
    drawn, draws = _random_fitness(prepared, program, tables, evaluator, n, config, progress)
    ranked = np.concatenate([drawn, *(c.result.masks for c in (predicted, greedy, chosen, exact_greedy))])
    prediction = predict(prepared.graph, program, chosen.layers, evaluator.inputs, tables.mean_shifts, seed=config.seed)
    return {
        "seconds": seconds,
        "predicted_seconds": predicted_seconds,
        "greedy_seconds": {"predicted": greedy_seconds, "exact": exact_greedy_seconds},
        "search": {**chosen.result.summary(), **chosen.statistics},
        "deviation": evaluator.deviation(chosen.result.masks),
        "memory_before": before["now"],
        "memory_peak": after["peak"],
        "memory_peak_is_of_the_search": reset,
        "targets": list(chosen.result.targets),
        "shares": chosen.result.shares.tolist(),
        "fitness": {
            "evolutionary": evaluator(chosen.result.masks, n).tolist(),
            "greedy": evaluator(exact_greedy.result.masks, n).tolist(),
            "evolutionary, predicted": evaluator(predicted.result.masks, n).tolist(),
            "greedy, predicted": evaluator(greedy.result.masks, n).tolist(),
            "random": draws,
        },
        "rank_correlation": spearman(prediction(ranked), evaluator(ranked, n)),
        "ranked_candidates": len(ranked),
    }


def measure_ranking(
    prepared: Prepared, config: QuantizeConfig, unseen: Sequence[Any], progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """How distances on the calibration samples, predicted and exact, rank sets of groups by their exact distance on samples that
    nothing was fitted to: over all sets, and among those of one ratio. Sets: random ones, and what predictions choose."""
    program = eight_bit_program(prepared, config)
    tables = low_tables(prepared, program, config)
    started = time.perf_counter()
    chosen = choose(prepared, program, tables, config.updated(selector="evolutionary"), progress=progress)
    seconds = time.perf_counter() - started
    sets = [chosen.result.masks, choose(prepared, program, tables, config.updated(selector="greedy")).result.masks]
    for seed in range(RANDOM_DRAWS):
        sets.append(choose(prepared, program, tables, config.updated(selector="random", seed=seed)).result.masks)
    masks = np.concatenate(sets)
    evaluator, n = _evaluator(prepared, program, tables, chosen.layers, config)
    prediction = predict(prepared.graph, program, chosen.layers, evaluator.inputs, tables.mean_shifts, seed=config.seed)
    evaluator.cache_limit = 0
    found = {f"predicted from {count}": prediction(masks, count) for count in (n, FEW)}
    found[f"exact on {n}"] = evaluator(masks, n)
    progress("unseen", 0.0)
    truth = CandidateEvaluator(program, chosen.layers, unseen, tables.mean_shifts, cache_limit=0)(masks)
    rows = np.arange(len(masks)).reshape(-1, len(config.ratios) - 1)
    places = [np.arange(len(masks)), *rows.T]
    return {
        "seconds": seconds,
        "sets": len(masks),
        "unseen_samples": len(unseen[0]),
        "targets": list(chosen.result.targets),
        "rank_correlation": {name: [spearman(d[p], truth[p]) for p in places] for name, d in found.items()},
        "unseen_distance": {
            "evolutionary": truth[rows[0]].tolist(),
            "greedy": truth[rows[1]].tolist(),
            "random": truth[rows[2:]].tolist(),
        },
    }


def _evaluator(
    prepared: Prepared, program: Program, tables: LowTables, layers: Sequence[str], config: QuantizeConfig
) -> tuple[CandidateEvaluator, int]:
    n = min(config.search_images, prepared.samples)
    return CandidateEvaluator(program, layers, [x[:n] for x in prepared.inputs], tables.mean_shifts), n


def _random_fitness(
    prepared: Prepared,
    program: Program,
    tables: LowTables,
    evaluator: CandidateEvaluator,
    n_images: int,
    config: QuantizeConfig,
    progress: Callable[[str, float], None],
) -> tuple[Any, list[list[float]]]:
    """Nested random sets, bool [draws * ratios, groups], and [draw][ratio] their exact fitness."""
    masks, result = [], []
    for seed in range(RANDOM_DRAWS):
        drawn = choose(prepared, program, tables, config.updated(selector="random", seed=seed))
        masks.append(drawn.result.masks)
        result.append([float(f) for f in evaluator(drawn.result.masks, n_images)])
        progress("random sets", (seed + 1) / RANDOM_DRAWS)
    return np.concatenate(masks), result


def measure_nesting(
    prepared: Prepared, config: QuantizeConfig, bench: TestBench, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Fitness on calibration data and accuracy on test images at the ratios of a nested or independent choice."""
    started = time.perf_counter()
    program = quantize_prepared(prepared, config, progress=progress)
    search = program.provenance["search"]
    return {
        "quantize_seconds": time.perf_counter() - started,
        "fitness": search["fitness"],
        "greedy_fitness": search["greedy_fitness"],
        "shares": search["shares"],
        "nested_as_it_turned_out": program.nested,
        **bench.figures(program, [r for r in program.ratios if r > 0.0], progress),
    }


class SearchRun:
    """One network; the preparation of seed 0 serves the search and the nesting rows, other seeds draw other images."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options = network, options
        self.file: ResultFile = open_results(options, "search", "search")
        self.weights = file_digest(weights_file(network)) if network in NETWORKS else REAL_NETWORKS[network].digest()
        self._prepared: dict[int, Prepared] = {}
        self._bench: TestBench | None = None

    def prepared(self, seed: int, config: QuantizeConfig, progress: Progress) -> Prepared:
        if seed not in self._prepared:
            model, samples = self.model(seed)
            self._prepared[seed] = prepare(model, samples, config, progress=progress)
        return self._prepared[seed]

    def model(self, seed: int) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        """The float network and its calibration samples."""
        if self.network in NETWORKS:
            return trained_network(self.network), [calibration_images(seed)]
        network = REAL_NETWORKS[self.network]
        return network.load(), [torch.from_numpy(x) for x in network.samples(network.calibration)]

    def unseen(self) -> list[torch.Tensor]:
        """Samples for the ranking that nothing is fitted to."""
        if self.network in NETWORKS:
            return [calibration_images(1, UNSEEN)]
        return [torch.from_numpy(x[:REAL_UNSEEN]) for x in REAL_NETWORKS[self.network].tests(REAL_UNSEEN)[0]]

    def settings(self, config: QuantizeConfig, seed: int, images: int | None) -> dict[str, Any]:
        return {
            "network": self.network,
            "weights": self.weights,
            "config": config.model_dump(mode="json"),
            "calibration_seed": seed,
            "calibration_images": CALIBRATION_IMAGES if self.network in NETWORKS else REAL_NETWORKS[self.network].calibration,
            "images": images,
        }

    def search(self) -> dict[str, Any]:
        """The row "NETWORK.search"; its threads are among its settings, since it is about time."""
        config = self.options.config(ratios=RATIOS, selector="evolutionary")
        settings = {**self.settings(config, 0, 0), "threads": self.file.machine["threads"]}
        progress = Progress(f"{self.network} search")
        row, now = self.file.measure(
            f"{self.network}.search",
            settings,
            lambda: measure_search(self.prepared(0, config, progress), config, progress),
            changed=self.options.changed,
        )
        if now:
            progress.done(f"{row['seconds']:.0f} s")
        return row

    def ranking(self) -> dict[str, Any]:
        """The row "NETWORK.ranking"."""
        config = self.options.config(ratios=RATIOS, selector="evolutionary")
        progress = Progress(f"{self.network} ranking")
        row, now = self.file.measure(
            f"{self.network}.ranking",
            {**self.settings(config, 0, 0), "unseen": UNSEEN if self.network in NETWORKS else REAL_UNSEEN},
            lambda: measure_ranking(self.prepared(0, config, progress), config, self.unseen(), progress),
            changed=self.options.changed,
        )
        if now:
            progress.done("")
        return row

    def nesting(self, seed: int, nested: bool) -> dict[str, Any]:
        config = self.options.config(ratios=NESTING_RATIOS, selector="evolutionary", nested=nested, seed=seed)
        name = f"{self.network}.{'nested' if nested else 'independent'}.seed{seed}"
        progress = Progress(name)
        row, now = self.file.measure(
            name,
            self.settings(config, seed, self.options.images),
            lambda: measure_nesting(self.prepared(seed, config, progress), config, self.bench(), progress),
            changed=self.options.changed,
        )
        if now:
            progress.done(", ".join(f"{100 * e['ratio']:.0f} %: {100 * e['accuracy']:.2f}" for e in row["ratios"]))
        return row

    def bench(self) -> TestBench:
        if self._bench is None:
            self._bench = TestBench(trained_network(self.network), test_images(self.options.images))
        return self._bench


def cost_rows(row: dict[str, Any]) -> list[list[str]]:
    """Name and value of what a search cost."""
    search, config, deviation = row["search"], row["settings"]["config"], row["deviation"]
    lookups = max(1, int(search["cache_lookups"]))
    hits = percent(search["cache_hits"] / lookups, 1)
    return [
        ["population x generations", f"{config['population']} x {config['generations']}"],
        ["seconds, all ratios, every candidate run", f"{row['seconds']:.1f}"],
        ["seconds by predicted errors", f"{row['predicted_seconds']:.1f}"],
        ["seconds of greedy, layers run / predicted", "{exact:.1f} / {predicted:.1f}".format(**row["greedy_seconds"])],
        [
            f"rank correlation of predicted and exact distances, {row['ranked_candidates']} candidates",
            f"{row['rank_correlation']:.3f}",
        ],
        ["candidates scored", f"{search['evaluations']:,}"],
        ["candidates proposed again", f"{search['remembered_candidates']:,}"],
        ["candidate images", f"{search['candidate_images']:,}"],
        ["multiplies done", f"{search['multiplies']:.3e}"],
        ["multiplies saved by shared prefixes", f"{percent(search['multiplies_saved_share'], 1)} %"],
        ["prefix cache hits", f"{search['cache_hits']:,} of {lookups:,} ({hits} %)"],
        ["memory before / peak", f"{row['memory_before'] / 2**20:.0f} / {row['memory_peak'] / 2**20:.0f} MiB"],
        ["largest soft-label deviation from the exact engine", f"{deviation['largest_soft_label_difference']:.2e}"],
    ]


def fitness_rows(row: dict[str, Any]) -> list[list[str]]:
    """Per ratio: what the searches chose, and random sets (mean and standard deviation over draws)."""
    fitness = row["fitness"]
    draws = np.array(fitness["random"])
    return [
        [
            f"{100 * target:.0f} %",
            *(f"{fitness[name][i]:.4f}" for name in CHOSEN),
            f"{draws[:, i].mean():.4f} ± {draws[:, i].std(ddof=1):.4f}",
        ]
        for i, target in enumerate(row["targets"])
    ]


def ranking_rows(row: dict[str, Any]) -> list[list[str]]:
    """Rank correlations by where distances come from, and the distances of what was chosen."""
    lines = [
        [f"rank correlation, {name} samples", *(f"{v:.2f}" for v in values)]
        for name, values in row["rank_correlation"].items()
    ]
    for name, values in row["unseen_distance"].items():
        by_ratio = np.atleast_2d(np.array(values)).mean(axis=0)
        lines.append([f"distance, {name}", "", *(f"{v:.4f}" for v in by_ratio)])
    return lines


def nesting_rows(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[list[str]]:
    """Per ratio, mean and standard error over seeds: fitness and accuracy, nested and independent."""
    lines = []
    for i, entry in enumerate(pairs[0][0]["ratios"]):
        fitness = np.array([[row["fitness"][i] for row in pair] for pair in pairs])
        accuracy = np.array([[row["ratios"][i]["accuracy"] for row in pair] for pair in pairs]) * 100
        lines.append(
            [
                f"{100 * entry['ratio']:.0f} %",
                seed_mean(fitness[:, 0], 4),
                seed_mean(fitness[:, 1], 4),
                seed_mean(fitness[:, 0] - fitness[:, 1], 4),
                seed_mean(accuracy[:, 0], 2),
                seed_mean(accuracy[:, 1], 2),
                seed_mean(accuracy[:, 0] - accuracy[:, 1], 2),
            ]
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("search", __doc__, ("resnet20",), None)
    parser.add_argument("--part", choices=("all", "search", "nesting", "ranking"), default="all")
    options = read_options(parser, arguments, tuple(dict.fromkeys((*NETWORKS, *REAL_NETWORKS))))
    data_folder()
    for network in options.networks:
        if network not in NETWORKS and (options.extra.part != "ranking" or REAL_NETWORKS[network].missing()):
            raise DataError(f"{network}: {REAL_NETWORKS[network].missing() or 'only --part ranking measures it'}")
        run = SearchRun(network, options)
        caption = machine_caption(run.file.machine)
        if options.extra.part in ("all", "ranking"):
            row = run.ranking()
            print_table(
                f"Ranking of {row['sets']} sets on {network}, by exact distance on {row['unseen_samples']:,} other samples",
                ["", "all", *(f"{100 * t:.0f} %" for t in row["targets"])],
                ranking_rows(row),
                machine_caption(row["machine"]),
            )
        if options.extra.part in ("all", "search"):
            row = run.search()
            caption = machine_caption(row["machine"])
            print_table(f"Search on {network}, {CALIBRATION_IMAGES} images", ["", "value"], cost_rows(row), caption)
            print_table(
                f"Distance to the 8-bit model's soft labels on {CALIBRATION_IMAGES} calibration images",
                ["ratio", *CHOSEN, f"random, {RANDOM_DRAWS} draws"],
                fitness_rows(row),
                caption,
            )
        if options.extra.part in ("all", "nesting"):
            pairs = [(run.nesting(seed, True), run.nesting(seed, False)) for seed in SEEDS]
            samples = pairs[0][0]["samples"]
            print_table(
                f"Nested against independent on {network}, {len(SEEDS)} seeds, {samples:,} test images",
                ["ratio", "fitness nested", "independent", "difference", "top-1 % nested", "independent", "difference"],
                nesting_rows(pairs),
                caption,
            )


if __name__ == "__main__":
    run_command(main)
