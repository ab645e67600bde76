"""Distribution shift: what happens on images that calibration has not seen the like of.

Noise, dimming and contrast change the pixels (rounded and clipped to 0..255, as a camera would give them) before
normalisation; calibration stays as it was. Static shifts were chosen on clean images, dynamic ones follow the sample.
"Saturated" are activations that the low range clips: |a| / 2^shift reaches the largest low magnitude plus a half.
Least-squares shifts clip some on clean images on purpose, and dynamic ones the few next to a power of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.benchmarking.saturation import count_saturation
from bitdial.errors import DataError
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.zoo.datasets import FloatImages, ImageSet
from bitdial.zoo.image_files import ArrayPixels
from common import (
    BATCH,
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
from measure import TestBench, paired_difference, unpack_flags

RATIOS = (0.0, 0.5, 1.0)
EXTRACTIONS = ("static", "dynamic")
NOISE_SEED = 0
Pixels = npt.NDArray[np.uint8]
Change = Callable[[npt.NDArray[np.float64], np.random.Generator], npt.NDArray[np.float64]]


def _noise(sigma: float) -> Change:
    return lambda x, rng: x + rng.normal(0.0, sigma, x.shape)


def _contrast(factor: float) -> Change:
    """About the mean of each image over all its pixels and colours."""

    def change(x: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
        mean: npt.NDArray[np.float64] = x.mean(axis=(1, 2, 3), keepdims=True)
        return mean + factor * (x - mean)

    return change


# Each maps float64 pixels [N, H, W, C] on the scale 0..255.
CONDITIONS: dict[str, Change] = {
    "clean": lambda x, rng: x,
    "noise, sigma 8": _noise(8.0),
    "noise, sigma 16": _noise(16.0),
    "dimmed x 0.5": lambda x, rng: 0.5 * x,
    "contrast x 1.5": _contrast(1.5),
    "contrast x 0.6": _contrast(0.6),
}


def changed_pixels(pixels: Pixels, condition: str, seed: int = NOISE_SEED) -> Pixels:
    """uint8 [N, H, W, C] under a condition: rounded half to even, clipped to 0..255; deterministic for a seed."""
    result = CONDITIONS[condition](pixels.astype(np.float64), np.random.default_rng(seed))
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def changed_images(images: ImageSet, condition: str) -> ImageSet:
    """The image set under a condition, pixels in memory. Raises DataError for sets that hold no pixels."""
    if isinstance(images.source, FloatImages):
        raise DataError(f"{images.name} holds ready inputs, not pixels; use a set of pictures")
    pixels = changed_pixels(images.source.read(images.indices), condition)
    return replace(images, source=ArrayPixels(pixels), indices=np.arange(len(images), dtype=np.int64))


def inputs(images: ImageSet) -> Iterator[Tensor]:
    for array, _ in images.batches(BATCH):
        yield torch.from_numpy(array)


def saturation(program: Program, images: ImageSet, ratio: float) -> dict[str, Any]:
    """{"saturated", "total", "share", "layers": {name: [saturated, total]}} at a ratio of the program's table."""
    rows = count_saturation(program, inputs(images), program.ratios.index(ratio))
    saturated, total = sum(int(r["saturated"]) for r in rows), sum(int(r["total"]) for r in rows)
    return {
        "saturated": saturated,
        "total": total,
        "share": saturated / total if total else 0.0,
        "layers": {r["layer"]: [r["saturated"], r["total"]] for r in rows},
    }


class ShiftRun:
    """One network: the test images under every condition, and a row per extraction."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options = network, options
        self.file = open_results(options, f"shift.{network}", "shift")
        self.weights = file_digest(weights_file(network))
        self._benches: dict[str, TestBench] | None = None

    def benches(self) -> dict[str, TestBench]:
        if self._benches is None:
            model, clean = trained_network(self.network), test_images(self.options.images)
            self._benches = {name: TestBench(model, changed_images(clean, name)) for name in CONDITIONS}
        return self._benches

    def config(self, extraction: str) -> QuantizeConfig:
        return self.options.config(ratios=RATIOS, extraction=extraction)

    def row(self, extraction: str) -> dict[str, Any]:
        config = self.config(extraction)
        settings = {
            "network": self.network,
            "weights": self.weights,
            "images": self.options.images,
            "config": config.model_dump(mode="json"),
            "calibration_images": CALIBRATION_IMAGES,
            "noise_seed": NOISE_SEED,
            "conditions": list(CONDITIONS),
        }
        progress = Progress(f"{self.network} {extraction}")
        row, now = self.file.measure(
            extraction, settings, lambda: self.measure(config, progress), changed=self.options.changed
        )
        if now:
            progress.done(f"{row['seconds']:.0f} s")
        return row

    def measure(self, config: QuantizeConfig, progress: Progress) -> dict[str, Any]:
        started = time.perf_counter()
        prepared = prepare(trained_network(self.network), [calibration_images()], config, progress=progress)
        program = quantize_prepared(prepared, config, progress=progress)
        conditions = {}
        for name, bench in self.benches().items():
            progress(name, 0.0)
            figures = bench.figures(program, RATIOS, progress)
            counts = {str(r): saturation(program, bench.images, r) for r in RATIOS if r > 0.0}
            conditions[name] = {"float32": bench.float_figures(), **figures, "saturation": counts}
        samples = len(next(iter(self.benches().values())).labels)
        return {"conditions": conditions, "samples": samples, "seconds": time.perf_counter() - started}


def table_rows(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Per condition: float, 8-bit, both ratios static and dynamic, their paired difference, saturated shares."""
    lines = []
    static, dynamic = rows["static"], rows["dynamic"]
    n = int(static["samples"])
    for name in static["conditions"]:
        a, b = static["conditions"][name], dynamic["conditions"][name]
        difference, error = paired_difference(
            unpack_flags(b["ratios"][2]["correct"], n), unpack_flags(a["ratios"][2]["correct"], n)
        )
        lines.append(
            [
                name,
                percent(a["float32"]["accuracy"]),
                percent(a["ratios"][0]["accuracy"]),
                *(percent(x["ratios"][i]["accuracy"]) for i in (1, 2) for x in (a, b)),
                f"{100 * difference:+.2f} ± {100 * error:.2f}",
                percent(a["saturation"]["1.0"]["share"], 3),
                percent(b["saturation"]["1.0"]["share"], 3),
            ]
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("shift", __doc__, ("resnet20", "vgg"), 2000)
    options = read_options(parser, arguments, NETWORKS)
    data_folder()
    for network in options.networks:
        run = ShiftRun(network, options)
        rows = {extraction: run.row(extraction) for extraction in EXTRACTIONS}
        print_table(
            f"{network} on {rows['static']['samples']:,} changed images: top-1 %, saturated low activations at 100 %",
            [
                "images", "float32", "8-bit", "50 % static", "50 % dynamic", "100 % static", "100 % dynamic",
                "dynamic - static, 100 %", "saturated % static", "dynamic",
            ],
            table_rows(rows),
            machine_caption(rows["static"]["machine"]),
        )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
