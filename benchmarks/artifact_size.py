"""Sizes of .bitdial files and the time to load them: whole, for a band of ratios, and for 100 % low alone.

The trained networks, and larger ones with random weights where torchvision or timm is installed (sizes do not depend on
training: weights are stored as they are). Groups are chosen greedily for the trained networks and at random for the
large ones: sizes depend on how many groups are low, hardly on which.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdial.artifact import load_program, save_program
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.zoo.registry import build_model
from common import (
    CALIBRATION_IMAGES,
    NETWORKS,
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
    trained_network,
    weights_file,
)

BANDS: dict[str, tuple[float, float] | None] = {"whole": None, "50..100 %": (0.5, 1.0), "100 %": (1.0, 1.0)}
LOADS = 5
RANDOM_IMAGES = 8


@dataclass(frozen=True)
class Large:
    """A network with random weights. library: what must be installed."""

    spec: str
    library: str
    size: int  # height and width of the input


LARGE = {
    "resnet18": Large("torchvision:resnet18", "torchvision", 64),
    "vit_small": Large("timm:vit_small_patch16_224", "timm", 224),
}


def installed(network: str) -> bool:
    large = LARGE.get(network)
    return large is None or all(importlib.util.find_spec(name) for name in {large.library, "torchvision"})


def network_and_inputs(network: str) -> tuple[nn.Module, Tensor]:
    """(network, calibration images float32 [n, 3, H, W]); random weights and images for the large ones, by a seed."""
    large = LARGE.get(network)
    if large is None:
        return trained_network(network), calibration_images()
    torch.manual_seed(0)
    return build_model(large.spec), torch.randn(RANDOM_IMAGES, 3, large.size, large.size)


def measure_sizes(network: str, config: QuantizeConfig, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Per band: bytes of the parts of the file, and the median time of loading it (from the page cache)."""
    model, images = network_and_inputs(network)
    program = quantize_prepared(prepare(model, [images], config, progress=progress), config, progress=progress)
    bands = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, band in BANDS.items():
            path = Path(folder) / "model.bitdial"
            summary = save_program(program, path, band=band)
            seconds = []
            for _ in range(LOADS):
                started = time.perf_counter()
                load_program(path)
                seconds.append(time.perf_counter() - started)
            sizes = {k: v for k, v in asdict(summary).items() if k != "path"}
            bands[name] = {
                **sizes,
                "to_int8_weights": summary.total / max(1, summary.int8_weights),
                "overhead": summary.overhead,
                "load_seconds": statistics.median(seconds),
                "load_seconds_all": seconds,
            }
    return {"bands": bands, "layers": len(program.layers), "ratios": list(program.ratios)}


def table_rows(network: str, row: dict[str, Any]) -> list[list[str]]:
    """One line per band; sizes in KiB."""
    return [
        [
            f"{network}, {name}",
            *(f"{band[part] / 1024:,.1f}" for part in ("weights", "tables", "manifest", "float_leftovers", "total")),
            f"{band['int8_weights'] / 1024:,.1f}",
            f"{band['to_int8_weights']:.3f}",
            f"{band['overhead']:.3f}",
            f"{1000 * band['load_seconds']:.1f}",
        ]
        for name, band in row["bands"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table. Raises BitdialError."""
    known = (*NETWORKS, *LARGE)
    parser = make_parser("artifact_size", __doc__, known, 0)
    options = read_options(parser, arguments, known)
    if set(options.networks) & set(NETWORKS):
        data_folder()
    file = open_results(options, "artifact_size", "artifact_size")
    lines: list[list[str]] = []
    machine = file.machine
    for network in options.networks:
        if not installed(network):
            note(f"{network} left out: {LARGE[network].library} is not installed")
            continue
        trained = network in NETWORKS
        config = options.config(selector="greedy" if trained else "random")
        settings = {
            "network": network if trained else asdict(LARGE[network]),
            "weights": file_digest(weights_file(network)) if trained else "random, seed 0",
            "config": config.model_dump(mode="json"),
            "calibration_images": CALIBRATION_IMAGES if trained else RANDOM_IMAGES,
            "bands": {name: list(band) if band else None for name, band in BANDS.items()},
        }
        progress = Progress(network)
        row, now = file.measure(
            network,
            settings,
            lambda network=network, config=config, progress=progress: measure_sizes(network, config, progress),  # type: ignore[misc]
            changed=options.changed,
        )
        if now:
            progress.done(f"{row['bands']['whole']['total']:,} bytes")
        machine = row["machine"]
        lines += table_rows(network, row)
    columns = [
        "network, ratios kept", "weights", "tables", "manifest", "float", "total", "int8 weights", "total / int8",
        "total / (int8 + float)", "load, ms",
    ]  # fmt: skip
    print_table("Sizes of .bitdial files, KiB", columns, lines, machine_caption(machine))


if __name__ == "__main__":
    run_command(main)
