"""Language model and SmoothQuant-style migration: perplexity at every ratio, with and without smoothing.

A character transformer is trained (`language_model_training`; once, its weights are kept in a cache folder) and quantized with
different smoothing strengths; calibration windows come from the training part of the text, perplexity from the whole
validation part, in windows without overlap. The ViT of the data folder answers the same question for images. Every
figure comes from the integer-exact reference engine. Seeds change the calibration sample and the search; rows that one
table compares share theirs.
"""

from __future__ import annotations

import base64
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from accuracy_rows import preparation_key
from bitdial.benchmarking.perplexity import perplexity, sequence_losses
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError, DataError
from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.zoo.image_files import cache_directory
from common import (
    PAPER,
    Options,
    Progress,
    calibration_images,
    data_folder,
    file_digest,
    machine_caption,
    make_parser,
    note,
    open_results,
    print_table,
    read_options,
    run_command,
    test_images,
    trained_network,
    weights_file,
)
from language.text import load_text
from language_model_training import trained_model
from measure import TestBench, unpack_flags

TEXT, VIT = "text", "vit"
CURVE, ENDS, THREE = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 1.0), (0.0, 0.5, 1.0)
SEEDS = (0, 1, 2)
ALPHAS = (0.5, 0.3, 0.7)
MORE_ALPHAS = (0.1, 0.9)  # at the ends of the dial only, which need no search
CALIBRATION_WINDOWS = 64
SEARCH_WINDOWS = 16
BATCH = 64
STEPS = 2400
POPULATION, GENERATIONS = 10, 5
# One setting changed at a time, without and with smoothing: is it that what smoothing can stand in for, or add to?
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dynamic extraction": {"extraction": "dynamic"},
    "no bias correction": {"bias_correction": False},
    "channels unsorted": {"sort_channels": False},
}
VARIANT_ALPHAS = (None, 0.5)
Losses = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One quantization. changes: settings that differ from the default, `smooth` and `seed` aside."""

    network: str
    variant: str
    alpha: float | None
    seed: int
    ratios: tuple[float, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.network}.{self.variant}.{alpha_text(self.alpha)}.seed{self.seed}"


def alpha_text(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"


def rows_of(network: str, seeds: Sequence[int]) -> list[Row]:
    """In the order of work: the first seed's rows, its variants too, then the other seeds', and their variants last."""
    if network == VIT:
        return [Row(network, "default", alpha, seed, THREE) for seed in seeds for alpha in (None, *ALPHAS)]
    rows: list[Row] = []
    later: list[Row] = []
    for seed in seeds:
        for alpha in (None, *ALPHAS, *MORE_ALPHAS):
            rows.append(Row(network, "default", alpha, seed, ENDS if alpha in MORE_ALPHAS else CURVE))
            if alpha in VARIANT_ALPHAS:
                variants = [Row(network, name, alpha, seed, ENDS, changes) for name, changes in VARIANTS.items()]
                (rows if seed == seeds[0] else later).extend(variants)
    return rows + later


def pack(losses: Losses) -> str:
    """Loss per window as text, so that any two rows can be compared window by window."""
    return base64.b64encode(losses.astype("<f4").tobytes()).decode("ascii")


def unpack(text: str) -> Losses:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def standard_error(values: npt.NDArray[Any]) -> float:
    """Of the mean over windows or seeds; 0 for a single one."""
    n = len(values)
    return float(values.astype(np.float64).std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


class _Run:
    """Rows of one network: prepares a program per row; preparations are shared among rows that allow it."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options = network, options
        self.file = open_results(options, f"language_model.{network}", "language_model")
        self._prepared: tuple[str, Prepared] | None = None  # rows that share one follow each other

    def config(self, row: Row) -> QuantizeConfig:
        searched = {"population": self.options.population, "generations": self.options.generations}
        settings = {"population": POPULATION, "generations": GENERATIONS, **{k: v for k, v in searched.items() if v}}
        settings["survivors"] = max(1, min(6, settings["population"] - 1))
        if self.network == TEXT:
            settings |= {"search_images": SEARCH_WINDOWS, "batch_size": 32}
        return QuantizeConfig(**PAPER, ratios=row.ratios, seed=row.seed, smooth=row.alpha, **settings, **row.changes)

    def calibration(self, seed: int) -> torch.Tensor:
        raise NotImplementedError

    def model(self) -> nn.Module:
        raise NotImplementedError

    def common_settings(self) -> dict[str, Any]:
        """What every figure depends on."""
        raise NotImplementedError

    def figures(self, program: Program, ratios: Sequence[float], progress: Progress) -> dict[str, Any]:
        raise NotImplementedError

    def float_figures(self, progress: Progress) -> dict[str, Any]:
        raise NotImplementedError

    def measure_all(self, rows: Sequence[Row]) -> None:
        progress = Progress(f"{self.network} float32")
        self.file.measure(
            f"{self.network}.float32", self.common_settings(), lambda: self.float_figures(progress),
            changed=self.options.changed,
        )  # fmt: skip
        for row in rows:
            self.measure(row)

    def measure(self, row: Row) -> None:
        config = self.config(row)
        settings = {**self.common_settings(), "config": config.model_dump(mode="json"), "calibration_seed": row.seed}
        progress = Progress(row.name)
        found, now = self.file.measure(
            row.name, settings, lambda: self.quantize_and_measure(row, config, progress), changed=self.options.changed
        )
        if now:
            progress.done(f"{found['prepare_seconds'] + found['quantize_seconds']:.0f} s to quantize")

    def quantize_and_measure(self, row: Row, config: QuantizeConfig, progress: Progress) -> dict[str, Any]:
        key = preparation_key(config, row.seed)
        started = time.perf_counter()
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, prepare(self.model(), [self.calibration(row.seed)], config, progress=progress)
        prepared = self._prepared[1]
        between = time.perf_counter()
        program = quantize_prepared(prepared, config, progress=progress)
        done = time.perf_counter()
        frozen = prepared.layout.frozen if prepared.layout is not None else ()
        return {
            **self.figures(program, row.ratios, progress),
            "prepare_seconds": between - started,
            "quantize_seconds": done - between,
            "channels_kept_in_order": {f.layer: f.reason for f in frozen},
        }


class TextRun(_Run):
    """The character model: mean loss per window of the validation part."""

    def __init__(self, options: Options) -> None:
        super().__init__(TEXT, options)
        path = data_folder() / "text" / "tinyshakespeare.txt"
        if not path.is_file():
            raise DataError(f"the text is missing: {path} does not exist; complete the data folder")
        self.training, self.validation = load_text(path)

    @cached_property
    def trained(self) -> tuple[nn.Module, str, dict[str, Any]]:
        extra = self.options.extra
        progress = Progress("language model")
        found = trained_model(self.training, self.validation, extra.steps, extra.training_seed, extra.cache, progress)
        report = found[2]
        note(
            f"language model: {report['parameters']:,} parameters, {report['steps']} steps in {report['seconds']:.0f} s "
            f"({report['threads']} threads), loss {report['training_loss']:.3f} on training text, "
            f"{report['validation_loss']:.3f} on validation text (nats per character)"
        )
        return found

    def model(self) -> nn.Module:
        return self.trained[0]

    def calibration(self, seed: int) -> torch.Tensor:
        return torch.from_numpy(self.training.sample(self.context, CALIBRATION_WINDOWS, seed)[0])

    @property
    def context(self) -> int:
        length = self.trained[0].context
        assert isinstance(length, int)
        return length

    @cached_property
    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.validation.chunks(self.context, self.options.extra.windows)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def common_settings(self) -> dict[str, Any]:
        return {
            "network": TEXT,
            "weights": self.trained[1],
            "windows": self.options.extra.windows,
            "calibration_windows": CALIBRATION_WINDOWS,
        }

    def float_figures(self, progress: Progress) -> dict[str, Any]:
        losses = self._losses(lambda x: self.model()(x), "float32", progress)
        return {
            **_loss_figures(losses),
            "windows_measured": len(losses),
            "characters": len(losses) * self.context,
            "characters_of": len(self.validation),
            "training": self.trained[2],
        }

    def figures(self, program: Program, ratios: Sequence[float], progress: Progress) -> dict[str, Any]:
        engine = ReferenceEngine(program, check_finite=False)
        entries = []
        started = time.perf_counter()
        for ratio in ratios:
            losses = self._losses(lambda x, r=ratio: engine.run(x, r), f"evaluate at {100 * ratio:.0f} %", progress)
            entries.append(
                {
                    "ratio": ratio,
                    **_loss_figures(losses),
                    "low_share": program.low_share(program.ratios.index(ratio)),
                }
            )
        return {"ratios": entries, "evaluation_seconds": time.perf_counter() - started}

    def _losses(self, run: Any, stage: str, progress: Progress) -> Losses:
        inputs, targets = self.windows
        parts = []
        with torch.no_grad():
            for start in range(0, len(inputs), BATCH):
                parts.append(sequence_losses(run(inputs[start : start + BATCH]), targets[start : start + BATCH]))
                progress(stage, start / len(inputs))
        return torch.cat(parts).numpy().astype(np.float32)


def _loss_figures(losses: Losses) -> dict[str, Any]:
    loss = float(losses.astype(np.float64).mean())
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "loss_standard_error": standard_error(losses),
        "window_losses": pack(losses),
    }


class VitRun(_Run):
    """The ViT: top-1 accuracy on test images."""

    def __init__(self, options: Options) -> None:
        super().__init__(VIT, options)
        self.weights = file_digest(weights_file(VIT))

    @cached_property
    def bench(self) -> TestBench:
        return TestBench(self.model(), test_images(self.options.images))

    def model(self) -> nn.Module:
        return trained_network(VIT)

    def calibration(self, seed: int) -> torch.Tensor:
        return calibration_images(seed)

    def common_settings(self) -> dict[str, Any]:
        return {"network": VIT, "weights": self.weights, "images": self.options.images}

    def float_figures(self, progress: Progress) -> dict[str, Any]:
        return self.bench.float_figures(progress)

    def figures(self, program: Program, ratios: Sequence[float], progress: Progress) -> dict[str, Any]:
        return self.bench.figures(program, ratios, progress)


Rows = Mapping[str, Mapping[str, Any]]


def _entry(rows: Rows, name: str, ratio: float) -> Mapping[str, Any] | None:
    found = rows.get(name)
    return None if found is None else next((e for e in found["ratios"] if math.isclose(e["ratio"], ratio)), None)


def values_of(rows: Rows, network: str, variant: str, alpha: float | None, ratio: float) -> dict[int, Losses]:
    """Seed -> loss per window (text), or 1 per image that is right (vit), of the rows that are there."""
    found: dict[int, Losses] = {}
    for seed in SEEDS:
        name = Row(network, variant, alpha, seed, ()).name
        entry = _entry(rows, name, ratio)
        if entry is None:
            continue
        if network == TEXT:
            found[seed] = unpack(entry["window_losses"])
        else:
            found[seed] = unpack_flags(entry["correct"], int(rows[name]["samples"])).astype(np.float32)
    return found


def paired(one: Mapping[int, Losses], other: Mapping[int, Losses]) -> tuple[float, float, float, int] | None:
    """(mean difference, its standard error over windows or images, over seeds, seeds): seeds that both have.

    Means over seeds are taken first, so that the first error says what other text of this kind would change, the second
    what other calibration samples would.
    """
    seeds = [s for s in one if s in other]
    if not seeds:
        return None
    differences = np.stack([one[s].astype(np.float64) - other[s] for s in seeds])
    return float(differences.mean()), standard_error(differences.mean(axis=0)), standard_error(
        differences.mean(axis=1)
    ), len(seeds)  # fmt: skip


def _cell(found: Mapping[int, Losses], text: bool) -> str:
    if not found:
        return "-"
    mean = float(np.mean([v.astype(np.float64).mean() for v in found.values()]))
    return f"{perplexity(mean):.3f}" if text else f"{100 * mean:.2f}"


def _difference_cell(one: Mapping[int, Losses], other: Mapping[int, Losses], text: bool) -> str:
    """In percent of the perplexity, or points of accuracy: difference ± error over windows/images (over seeds)."""
    found = paired(one, other)
    if found is None:
        return "-"
    difference, over_samples, over_seeds, n = found
    value = 100 * math.expm1(difference) if text else 100 * difference
    spread = f", seeds ± {100 * over_seeds:.2f}" if n > 1 else ""
    return f"{value:+.2f} ± {100 * over_samples:.2f}{spread}"


def main_table(rows: Rows, network: str) -> list[list[str]]:
    """Smoothing strength by ratio: the value (mean over seeds), and below it the difference to no smoothing."""
    text = network == TEXT
    ratios = CURVE if text else THREE
    alphas = sorted((*ALPHAS, *MORE_ALPHAS) if text else ALPHAS)
    plain = {r: values_of(rows, network, "default", None, r) for r in ratios}
    lines = [["none", *(_cell(plain[r], text) for r in ratios)]]
    for alpha in alphas:
        smoothed = {r: values_of(rows, network, "default", alpha, r) for r in ratios}
        if any(smoothed.values()):
            lines.append([f"alpha {alpha:g}", *(_cell(smoothed[r], text) for r in ratios)])
            lines.append(["  against none", *(_difference_cell(smoothed[r], plain[r], text) for r in ratios)])
    return lines


def variant_table(rows: Rows) -> list[list[str]]:
    """Per variant: 8-bit and 100 % without and with smoothing, smoothing's effect, the variant's own without smoothing."""
    lines = []
    base = values_of(rows, TEXT, "default", None, 1.0)
    for variant in ("default", *VARIANTS):
        cells = {(a, r): values_of(rows, TEXT, variant, a, r) for a in VARIANT_ALPHAS for r in ENDS}
        if not any(cells.values()):
            continue
        plain, smoothed = VARIANT_ALPHAS
        lines.append(
            [
                variant,
                *(_cell(cells[a, r], True) for a in VARIANT_ALPHAS for r in ENDS),
                _difference_cell(cells[smoothed, 1.0], cells[plain, 1.0], True),
                "" if variant == "default" else _difference_cell(cells[plain, 1.0], base, True),
            ]
        )
    return lines


def _tables(rows: Rows, network: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, lines) of the tables of one network."""
    reference = rows.get(f"{network}.float32")
    if reference is None:
        return []
    if network == TEXT:
        training = reference["training"]
        title = (
            f"Perplexity per character on {reference['characters']:,} of {reference['characters_of']:,} validation "
            f"characters; float32 {reference['perplexity']:.3f} (loss {reference['loss']:.4f}; trained "
            f"{training['steps']} steps in {training['seconds']:.0f} s, training loss {training['training_loss']:.3f}). "
            "Against none: percent of perplexity ± standard error over windows"
        )
        columns = ["smoothing", "8-bit", *(f"{100 * r:.0f} %" for r in CURVE[1:])]
        second = [
            f"{'no smoothing' if a is None else f'alpha {a:g}'}, {n}"
            for a in VARIANT_ALPHAS
            for n in ("8-bit", "100 %")
        ]
        return [
            (title, columns, main_table(rows, TEXT)),
            (
                "One setting changed",
                ["setting", *second, "smoothing at 100 %, %", "setting at 100 %, %"],
                variant_table(rows),
            ),
        ]
    title = (
        f"ViT, top-1 % on {reference['samples']:,} test images; float32 {100 * reference['accuracy']:.2f}. Against none: "
        "points ± standard error over images"
    )
    return [(title, ["smoothing", "8-bit", "50 %", "100 %"], main_table(rows, VIT))]


def show(rows: Rows, network: str, markdown: bool) -> None:
    for title, columns, lines in _tables(rows, network):
        if markdown:
            head = "| " + " | ".join(columns) + " |\n|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|\n"
            sys.stdout.write(f"{title}\n\n{head}" + "".join("| " + " | ".join(c) + " |\n" for c in lines) + "\n")
        else:
            print_table(title, columns, lines, machine_caption(next(iter(rows.values()))["machine"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("language_model", __doc__, (TEXT, VIT), 3000)
    add = parser.add_argument
    add("--seeds", type=int, default=len(SEEDS), help="calibration samples, 1 to 3 (default: %(default)s)")
    add("--windows", type=int, help="validation windows, spread evenly (default: all)")
    add("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    add("--training-seed", type=int, default=0, help="of initial weights and batches (default: %(default)s)")
    add("--cache", type=Path, default=cache_directory(), help="folder of trained weights (default: %(default)s)")
    add("--table", action="store_true", help="print the tables of stored results and stop")
    add("--markdown", action="store_true", help="print stored results in Markdown and stop")
    options = read_options(parser, arguments, (TEXT, VIT))
    extra = options.extra
    if not 1 <= extra.seeds <= len(SEEDS):
        raise ConfigError(f"--seeds is {extra.seeds}; give 1 to {len(SEEDS)}")
    stored = extra.table or extra.markdown
    for network in options.networks:
        if stored:
            rows = open_results(options, f"language_model.{network}", "language_model").rows
        else:
            run = TextRun(options) if network == TEXT else VitRun(options)
            run.measure_all(rows_of(network, SEEDS[: extra.seeds]))
            rows = run.file.rows
        show(rows, network, extra.markdown)


if __name__ == "__main__":
    run_command(main)
