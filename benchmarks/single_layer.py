"""The single-layer check: relative output error of one wide layer, half of it low, with and without effective bits.

The layer sees the 8-bit model's own activations on test images. The groups of the smallest product of activation range
(on calibration images) and weight range run low, the same ones for all ways of extraction; half of them is the paper's
case. Errors are L2 norms over all outputs before bias, without bias correction: ||y - y_ref|| / ||y_ref||, once against
the layer in float on the same inputs, once against the layer at 8 bits. Accumulators are the reference engine's exact
ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.engines.reference.executor import Executor
from bitdial.errors import ConfigError
from bitdial.graph.ir import Graph, Node
from bitdial.pipeline import eight_bit_program, low_tables, prepare
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.zoo.datasets import ImageSet
from common import (
    CALIBRATION_IMAGES,
    NETWORKS,
    Options,
    Progress,
    batches,
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

SHARES = (0.25, 0.5, 0.75, 1.0)
_PLAIN, _SQUARES = ({"extraction": "static", "shift_choice": choice} for choice in ("plain", "least_squares"))
# How low values are extracted -> settings. Weight shifts are per output channel and group, or per group alone.
EXTRACTIONS: dict[str, dict[str, Any]] = {
    "naive": {"extraction": "naive"},
    "plain, per output": {**_PLAIN, "weight_granularity": "output"},
    "plain, per group": {**_PLAIN, "weight_granularity": "group"},
    "least squares, per output": {**_SQUARES, "weight_granularity": "output"},
    "least squares, per group": {**_SQUARES, "weight_granularity": "group"},
    "dynamic, per output": {**_SQUARES, "extraction": "dynamic", "weight_granularity": "output"},
}
LAYOUTS = {"sorted": True, "unsorted": False}


def widest_layer(program: Program) -> str:
    """The last one among the low-eligible layers with most feature channels. Raises ConfigError if none is eligible."""
    widths = {
        name: len(layer.channel_groups()) for name, layer in program.layers.items() if layer.eligible and layer.n_groups
    }
    if not widths:
        raise ConfigError("no layer of this network may run low")
    return [name for name, width in widths.items() if width == max(widths.values())][-1]


def find_layer(program: Program, pattern: str | None) -> str:
    """The low-eligible layer of that node name or module path; None: the widest. Raises ConfigError."""
    if pattern is None:
        return widest_layer(program)
    for name, layer in program.layers.items():
        if layer.eligible and pattern in (name, program.instruction(name).source):
            return name
    names = [program.instruction(n).source or n for n, layer in program.layers.items() if layer.eligible]
    raise ConfigError(f"--layer {pattern} is not a low-eligible layer; choose one of {', '.join(names)}")


def range_scores(layer: QuantizedLayer, channel_max: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64 [n_groups]: largest activation (8-bit steps) times largest weight (real units) of each group.

    For layers without convolution groups.
    """
    assert layer.weight is not None
    weight = np.abs(layer.weight.astype(np.float64)) * layer.weight_scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    per_channel = weight.transpose(1, 0, *range(2, weight.ndim)).reshape(weight.shape[1], -1).max(axis=1)
    starts = layer.group_bounds[:-1].astype(np.int64)
    result: npt.NDArray[np.float64] = np.maximum.reduceat(channel_max.astype(np.float64), starts) * np.maximum.reduceat(
        per_channel, starts
    )
    return result


def lowest(scores: npt.NDArray[np.float64], macs: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """bool [n_groups]: groups of the smallest scores, as many as come nearest `share` of the layer's multiplies."""
    order = np.argsort(scores, kind="stable")
    reached = np.concatenate([[0], np.cumsum(macs[order])]) / macs.sum()
    count = int(np.argmin(np.abs(reached - share)))
    mask = np.zeros(len(scores), dtype=np.bool_)
    mask[order[:count]] = True
    return mask


@dataclass
class _Error:
    """Sums of squares over batches: of the difference to each reference, and of the references."""

    to_float: float = 0.0
    to_eight: float = 0.0


def float_layer(node: Node, graph: Graph, x: Tensor) -> Tensor:
    """The layer in float64, without bias, residual and activation. graph: the float graph that holds its weight."""
    assert node.weight is not None
    weight = torch.from_numpy(graph.constants[node.weight]).double()
    if node.op == "linear":
        return F.linear(x.double(), weight)
    a = node.attrs
    return F.conv2d(x.double(), weight, None, a["stride"], a["padding"], a["dilation"], a["groups"])


def measure_layer(
    network: str, layout: bool, layer_name: str | None, config: QuantizeConfig, images: ImageSet,
    progress: Callable[[str, float], None],
) -> dict[str, Any]:  # fmt: skip
    """Relative errors per share and way of extraction, of one layer under one layout."""
    started = time.perf_counter()
    config = config.updated(sort_channels=layout)
    prepared = prepare(trained_network(network), [calibration_images()], config, progress=progress)
    eight_bit = eight_bit_program(prepared, config)
    programs: dict[str, Program] = {}
    for name, changes in EXTRACTIONS.items():
        own = config.updated(**changes, bias_correction=False)  # nothing below looks at the mean shifts of groups
        programs[name] = deepcopy(eight_bit)
        programs[name].extraction = own.extraction
        tables = low_tables(prepared, programs[name], own)
        progress("programs", len(programs) / len(EXTRACTIONS))
    program = programs["naive"]
    target = find_layer(program, layer_name)
    layer, step = program.layers[target], program.instruction(target)
    if layer.conv_groups != 1:
        raise ConfigError(f"layer {target} has {layer.conv_groups} convolution groups; choose one with a single group")
    source = step.inputs[0]
    scores = range_scores(layer, tables.values[source].channel_max)
    masks = {share: lowest(scores, layer.group_macs, share) for share in SHARES}
    executors = {name: Executor(p) for name, p in programs.items()}
    scale = program.qparams[source].scale
    unit = torch.from_numpy(layer.weight_scale.astype(np.float64) * scale)
    unit = unit.reshape([1, -1, *[1] * (len(program.types[target].shape) - 2)] if layer.kind == "conv" else [-1])
    zero = torch.zeros(len(layer.weight_scale), dtype=torch.float64)
    errors = {(name, share): _Error() for name in EXTRACTIONS for share in SHARES}
    eight_error, float_norm, eight_norm, done = 0.0, 0.0, 0.0, 0
    for x, _ in batches(images):
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            if name == source:
                seen[name] = value

        with torch.no_grad():
            first = executors["naive"]
            first.run([x], first.settings(0), observe=observe)
            reference = float_layer(prepared.graph.node(target), prepared.graph, seen[source]) * scale
            eight = _output(first, target, seen, np.zeros(layer.n_groups, np.bool_), zero, len(x), unit)
            float_norm += _square(reference)
            eight_norm += _square(eight)
            eight_error += _square(eight - reference)
            for (name, share), error in errors.items():
                y = _output(executors[name], target, seen, masks[share], zero, len(x), unit)
                error.to_float += _square(y - reference)
                error.to_eight += _square(y - eight)
        done += len(x)
        progress("images", done / len(images))
    return {
        "layer": target,
        "source": step.source,
        "shape": list(layer.weight.shape) if layer.weight is not None else None,
        "groups": layer.n_groups,
        "samples": len(images),
        "eight_bit_error_to_float": math.sqrt(eight_error / float_norm),
        "errors": [
            {
                "extraction": name,
                "share": share,
                "share_reached": float(layer.group_macs[masks[share]].sum() / layer.group_macs.sum()),
                "to_float": math.sqrt(error.to_float / float_norm),
                "to_8bit": math.sqrt(error.to_eight / eight_norm),
            }
            for (name, share), error in errors.items()
        ],
        "seconds": time.perf_counter() - started,
    }


def _output(
    executor: Executor, name: str, values: dict[str, Tensor], low: npt.NDArray[np.bool_], bias: Tensor, batch: int,
    unit: Tensor,
) -> Tensor:  # fmt: skip
    """float64 outputs of the layer in real units, from exact accumulators, without bias."""
    setting = executor.layers[name].setting(torch.from_numpy(low), bias)
    return executor.accumulators(executor.instructions[name], values, setting, batch).double() * unit


def _square(x: Tensor) -> float:
    return float(x.double().pow(2).sum())


def run_row(file: Any, network: str, layout: str, options: Options) -> dict[str, Any]:
    """The row "NETWORK.LAYOUT"."""
    config = options.config(selector="greedy", ratios=(0.0, 1.0))  # groups are chosen here, by range
    settings = {
        "network": network,
        "weights": file_digest(weights_file(network)),
        "layout": layout,
        "layer": options.extra.layer,
        "images": options.images,
        "config": config.model_dump(mode="json"),
        "extractions": EXTRACTIONS,
        "calibration_images": CALIBRATION_IMAGES,
    }
    progress = Progress(f"{network} {layout}")
    row: dict[str, Any]
    row, now = file.measure(
        f"{network}.{layout}" + (f".{options.extra.layer}" if options.extra.layer else ""),
        settings,
        lambda: measure_layer(
            network, LAYOUTS[layout], options.extra.layer, config, test_images(options.images), progress
        ),
        changed=options.changed,
    )
    if now:
        progress.done(f"{row['seconds']:.0f} s")
    return row


def table_rows(network: str, layout: str, row: dict[str, Any], reference: str) -> list[list[str]]:
    """One line per way of extraction: relative error in percent at each share."""
    lines = []
    for name in EXTRACTIONS:
        own = {e["share"]: e[reference] for e in row["errors"] if e["extraction"] == name}
        label = f"{network}, {row['source'] or row['layer']}, {layout}"
        lines.append([label, name, *(percent(own[share]) for share in SHARES)])
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("single_layer", __doc__, ("vgg", "resnet56"), 1000)
    parser.add_argument("--layer", help="node name or module path (default: the last of the widest eligible layers)")
    options = read_options(parser, arguments, NETWORKS)
    data_folder()
    file = open_results(options, "single_layer", "single_layer")
    rows = {(n, layout): run_row(file, n, layout, options) for n in options.networks for layout in LAYOUTS}
    samples = next(iter(rows.values()))["samples"]
    for reference, name in (("to_float", "the layer in float"), ("to_8bit", "the layer at 8 bits")):
        print_table(
            f"Relative output error, %, against {name}; {samples:,} test images",
            ["layer, channels", "extraction", *(f"{100 * s:.0f} % low" for s in SHARES)],
            [line for (n, layout), row in rows.items() for line in table_rows(n, layout, row, reference)],
            machine_caption(next(iter(rows.values()))["machine"]),
        )


if __name__ == "__main__":
    run_command(main)
