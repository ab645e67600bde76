"""Would 2 bits pay on the NPU? Accuracy of trained networks with and without finetuning, cycles and area, beside 4 bits.

    python benchmarks/two_bits.py
    python benchmarks/two_bits.py --networks resnet20,vit --images 2000
    python benchmarks/two_bits.py --networks resnet20 --more tuned,finetuned    # and trained on, ten minutes of a core a width

Accuracy: the trained networks of the data folder, quantized as by default, top-1 on CIFAR-10's test images, low products of
4-bit activations and weights, of 4-bit activations and 2-bit weights, and of 2 and 2 bits; groups of 64 for two values a lane,
of 128 for four. Finetuned: 8-bit weights, from which low ones are derived, by the defaults of FinetuneConfig on the training
images, the last state; "rows learned": one epoch in which shifts stay and bias rows are parameters. Tuned: low weights of
their own, towards the float network's outputs on the calibration images (effort="high"). Rows that the result file has are not
measured again. Cycles: the model of benchmarks/npu_networks.py at 100 % low, where a chunk of 2 bits holds twice the channels
of one of 4 bits (2-bit weights with 4-bit activations take the lanes of 4 bits, and save weight memory alone).
Area: benchmarks/npu_area.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitdial
from bitdial.engines.npu.costs import Machine, layer_cost, total
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import SampledBatches, flip_and_crop
from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.pipeline.finetuning import finetune_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.zoo.datasets import load_dataset
from common import RESULTS, Progress, data_folder, machine_caption, print_table, run_command
from finetuning import show_training
from machine import describe_machine
from npu_networks import DESIGN, NETWORKS, Layers, plans
from real_networks_data import NETWORKS as TRAINED
from results import ResultFile
from scores import TopOne

WIDTHS = {"4 x 4": (4, 4, 64), "4 x 2": (4, 2, 64), "2 x 2": (2, 2, 128)}  # activations, weights, group
RATIOS = (0.0, 0.5, 1.0)
TUNED = "tuned"
FINETUNED = {  # the last state, since the networks know all training images by heart
    "finetuned": FinetuneConfig(keep="last"),
    "rows learned": FinetuneConfig(keep="last", epochs=1, bias="learned", rederivations=0),
}


@dataclass
class Start:
    """A quantized network before training."""

    prepared: Prepared
    program: Program
    config: QuantizeConfig


def start(name: str, widths: tuple[int, int, int], progress: Progress, tuned: bool = False) -> Start:
    """A trained network, quantized with low products of such widths; `tuned`: with effort="high"."""
    network, (activations, weights, group) = TRAINED[name], widths
    config = QuantizeConfig(
        target="npu", ratios=RATIOS, low_bits=activations, low_bits_weights=weights, group_size=group, keep_answers=0.0,
        calibration_images=network.calibration, effort="high" if tuned else "normal",
    )  # fmt: skip
    samples = [torch.from_numpy(x) for x in network.samples(network.calibration)]
    prepared = prepare(network.load(), samples, config, progress=progress)
    return Start(prepared, quantize_prepared(prepared, config, progress=progress), config)


def accuracies(name: str, images: int | None, program: Program) -> dict[str, Any]:
    """Top-1 by ratio and of the float network."""
    engine, (inputs,), score = bitdial.QuantizedModel(program).engine, *TRAINED[name].tests(images)
    assert isinstance(score, TopOne)
    found = {}
    for ratio in RATIOS:
        parts = [engine.run(np.ascontiguousarray(inputs[i : i + 100]), ratio) for i in range(0, len(inputs), 100)]
        found[str(ratio)] = float(np.mean(np.concatenate(parts).argmax(-1) == score.labels))
    with torch.no_grad():
        float_model = TRAINED[name].load()
        answers = torch.cat([float_model(torch.from_numpy(inputs[i : i + 100])).argmax(-1) for i in range(0, len(inputs), 100)])
    found["float"] = float(np.mean(answers.numpy() == score.labels))
    return {"accuracy": found, "images": len(inputs)}


def trained_on(begin: Start, finetune: FinetuneConfig, checkpoint: Path, progress: Progress) -> tuple[Program, dict[str, Any]]:
    """(program after finetuning, what that took)."""
    images = load_dataset(data_folder() / "cifar10", "train")
    batches = SampledBatches(len(images), images.tensors, finetune.batch_size, finetune.seed, flip_and_crop)
    done = finetune_prepared(
        begin.prepared, begin.program, begin.config, finetune, batches, progress=show_training(progress), checkpoint=checkpoint
    )
    checkpoint.unlink(missing_ok=True)
    return done.program, {"training": done.program.provenance["finetuning"]}


def halved(layers: Layers) -> Layers:
    """Layers whose low chunks hold twice the channels, as layers of half as many; first, last and depthwise ones stay."""
    last = len(layers) - 1
    kept = [i in (0, last) or g.conv_groups > 1 for i, (_, g) in enumerate(layers)]
    return [(n, g if k else replace(g, channels=-(-g.channels // 2))) for k, (n, g) in zip(kept, layers, strict=True)]


def cycles(name: str) -> dict[str, int]:
    layers, machine = NETWORKS[name](), Machine(DESIGN)

    def at(shapes: Layers, index: int) -> int:
        return total([layer_cost(plan, machine, index) for plan in plans(shapes, 64)]).cycles

    return {"8": at(layers, 0), "4": at(layers, 4), "2": at(halved(layers), 4)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet20,resnet56,vgg,vit", help="comma-separated (default: %(default)s)")
    parser.add_argument("--images", type=int, default=None, help="test images (default: all 10,000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--widths", default=",".join(WIDTHS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--more", default="", help=f"comma-separated, of {', '.join((TUNED, *FINETUNED))}")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    results = ResultFile(options.results / f"two_bits.{machine['kind']}.json", "two_bits", machine)
    rows = []
    for name in options.networks.split(","):
        if missing := TRAINED[name].missing():
            raise SystemExit(f"error: {missing}")
        for width in options.widths.split(","):
            progress, begin, own = Progress(f"{name} {width}"), None, WIDTHS[width]
            for how in ("", *filter(None, options.more.split(","))):
                row = f"{name}/{width}/{how}".rstrip("/")
                settings: dict[str, Any] = {"network": name, "widths": own, "images": options.images}
                if how == TUNED:
                    settings["effort"] = "high"
                elif how:
                    settings["finetune"] = FINETUNED[how].model_dump(mode="json", exclude={"device", "checkpoint_seconds"})
                found = results.find(row, settings)
                if found is None:
                    if how == TUNED:
                        program, cost = start(name, own, progress, tuned=True).program, {}
                    else:
                        begin = begin or start(name, own, progress)
                        program, cost = begin.program, {}
                    if how in FINETUNED:
                        checkpoint = options.results / f"{row.replace('/', '.').replace(' ', '')}.checkpoint.tmp"
                        program, cost = trained_on(begin, FINETUNED[how], checkpoint, progress)
                    found = results.put(row, settings, {**accuracies(name, options.images, program), **cost})
                share = found["accuracy"]
                progress.done("measured")
                lost = [f"{100 * (share[str(r)] - share['float']):+.2f}" for r in RATIOS]
                rows.append([name, width, str(own[2]), how or "as quantized", f"{100 * share['float']:.2f}", *lost])
    columns = ["network", "activations x weights", "group", "", "float, %", *(f"{r:.0%}, points" for r in RATIOS)]
    print_table("Low products of 4 and 2 bits", columns, rows, machine_caption(machine))
    table = []
    for name in NETWORKS:
        own_cycles = cycles(name)
        results.put(f"cycles/{name}", {"network": name}, {"cycles": own_cycles})
        table.append([name, *(f"{100 * own_cycles[b] / own_cycles['8']:.0f} %" for b in ("4", "2"))])
    print_table("Cycles at 100 % low over 8 bits, 32 x 32", ["network", "4 bits", "2 bits"], table, "model, layer shapes only")


if __name__ == "__main__":
    run_command(main)
