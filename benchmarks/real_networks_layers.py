"""Which layers hold the loss at 100 %: every low layer alone is put back to 8 bits, and the outputs' error is measured again.

A layer that is put back takes its bias of 8 bits; layers behind it keep low weights and biases that were solved with it low, for
errors that are then gone. So shares are rather too small, and negative where that outweighs what the layer itself had lost; they
do not add up to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitdial.quantization.program import Program, QuantizedLayer
from scores import Outputs

SAMPLES = 256  # the first test samples
SHOWN_LAYERS = 8

Run = Callable[[Program], Outputs]


def raised(program: Program, name: str) -> Program:
    """The program with one layer at 8 bits at every ratio."""
    layer = program.layers[name]
    bias = np.repeat(layer.bias[:1], len(layer.bias), axis=0)
    changed: QuantizedLayer = replace(layer, low=np.zeros_like(layer.low), bias=bias)
    return program.with_layers({name: changed})


def relative_error(outputs: Outputs, exact: Outputs) -> float:
    """Squared error as a share of the exact outputs' squared deviation from their mean."""
    spread = np.square(exact - exact.mean(axis=0), dtype=np.float64).sum()
    return float(np.square(outputs - exact, dtype=np.float64).sum() / spread)


def layer_losses(program: Program, run: Run, exact: Outputs, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """{"error": at 100 %, "error_8bit", "layers": what goes of the former with each low layer at 8 bits, largest share first}.

    run: outputs of a program at its last ratio. exact: the float network's.
    """
    names = [n for n, layer in program.layers.items() if layer.n_groups and layer.low[-1].any()]
    low = relative_error(run(program), exact)
    eight = program.with_layers({n: raised(program, n).layers[n] for n in names})
    macs = {n: int(program.layers[n].group_macs.sum()) for n in names}
    found = []
    for i, name in enumerate(names):
        layer = program.layers[name]
        assert layer.weight is not None
        error = relative_error(run(raised(program, name)), exact)
        found.append(
            {
                "layer": name, "share": 1.0 - error / low, "macs": macs[name] / sum(macs.values()),
                "weight": list(layer.weight.shape), "place": i, "kind": layer.kind,
            }
        )  # fmt: skip
        progress("layers", (i + 1) / len(names))
    found.sort(key=lambda entry: -float(entry["share"]))
    return {"error": low, "error_8bit": relative_error(run(eight), exact), "layers": found}


def layer_lines(row: Mapping[str, Any], shown: int = SHOWN_LAYERS) -> list[list[str]]:
    """name, place among the low layers, weight, share of the multiplies, share of the error that goes with it."""
    return [
        [
            str(entry["layer"]), f"{entry['place'] + 1} of {len(row['layers'])}", "x".join(map(str, entry["weight"])),
            f"{100 * entry['macs']:.1f}", f"{100 * entry['share']:+.1f}",
        ]
        for entry in row["layers"][:shown]
    ]  # fmt: skip


def layers_markdown(network: str, row: Mapping[str, Any]) -> Sequence[str]:
    head = f"{network}: low layer", "place", "weight", "% of the low multiplies", "% of the error that goes at 8 bits"
    lines = ["| " + " | ".join(line) + " |" for line in layer_lines(row)]
    return ["| " + " | ".join(head) + " |", "|---|---|---|---:|---:|", *lines, ""]
