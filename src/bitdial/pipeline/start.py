"""The start of a finetuning run: a quantized program, checked against the float network it is said to come from.

A .bitdial file holds 8-bit weights in the order of the layout pass. Finetuning needs the float weights in that same order, so
the float network is calibrated and laid out again with the settings and the images of the quantization, and compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitdial._version import __version__
from bitdial.errors import DataError
from bitdial.layout import group_bounds
from bitdial.pipeline.preparing import Prepared
from bitdial.quantization.build import build_program
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program

__all__ = ["check_start", "start_config"]

# Another number of threads or another processor sums in another order, which moves ranges by about 1e-6 of their size.
TOLERANCE = 1e-3
_ANEW = "leave the quantized model out to quantize anew"


def start_config(start: Program, name: str = "the model") -> QuantizeConfig:
    """The settings a program was quantized with, for finetuning it.

    Widths that were chosen per layer stay those of the program: low_bits = "auto" becomes 4 here, and latency_gain 0, since
    the latency table is not part of a file. Raises DataError, naming the model, where it cannot be a start.
    """
    provenance = start.provenance
    if "finetuning" in provenance:
        raise DataError(
            f"{name} was finetuned already, so that its weights are no longer those of the float network; start from the "
            "model that was finetuned"
        )
    if "band" in provenance or not start.ratios or start.ratios[0] != 0.0:
        raise DataError(
            f"{name} was saved for a band of ratios and has lost the others; finetune the model with all its ratios, and "
            "save the band afterwards"
        )
    stored = provenance.get("config")
    if not isinstance(stored, dict) or "seed" not in stored:
        raise DataError(f"{name} does not tell the settings it was quantized with; {_ANEW}")
    values: dict[str, Any] = {"lift": False, **stored, "latency_table": None, "latency_gain": 0.0}  # `lift` came later
    values.pop("rounding_slack", None)  # a setting of former versions
    if values.get("low_bits") == "auto":
        values["low_bits"] = 4
    config = QuantizeConfig(**values)
    if list(config.ratios) != list(start.ratios):
        raise DataError(f"{name} has other ratios than its settings say; {_ANEW}")
    return config


def check_start(start: Program, prepared: Prepared, config: QuantizeConfig, name: str = "the model") -> None:
    """Raise DataError unless `start` is what quantizing `prepared` with `config` begins with.

    Compared: names and operators, bounds of groups, 8-bit weight scales, weights (which former versions moved by a
    share of a low step, `rounding_slack`) and scales of values. The message says whether network, weights or calibration data
    differ.
    """
    expected = build_program(prepared.graph, prepared.statistics, config, group_bounds)
    if not _same_network(start, expected):
        raise DataError(
            f"{name} was made from another network than this one: give the network and the settings it was quantized "
            f"from, or {_ANEW}{_versions(start)}"
        )
    # then weights depend on the images too
    moved = config.equalize is not None or (config.smooth and any(n.op == "layer_norm" for n in prepared.graph.nodes))
    for layer_name, layer in expected.layers.items():
        if layer.weight is None:
            continue
        own = start.layers[layer_name]
        if not _close(np.sort(own.weight_scale), np.sort(layer.weight_scale)):
            what = "the weights or the calibration images are others" if moved else "the weights are others"
            raise DataError(
                f"{name} was not made from these weights: {what} (8-bit scales of layer '{layer_name}' differ); give the "
                f"weights it was quantized from, or {_ANEW}{_versions(start)}"
            )
    reason = _other_order(start, expected)
    if reason:
        raise DataError(
            f"{name} was calibrated on other images than these ({reason}), so that its channels lie in another order; give "
            f"the data, split and preprocessing it was quantized with, or {_ANEW}{_versions(start)}"
        )


def _same_network(a: Program, b: Program) -> bool:
    if [(s.name, s.operation) for s in a.instructions] != [(s.name, s.operation) for s in b.instructions]:
        return False
    if list(a.layers) != list(b.layers) or set(a.qparams) != set(b.qparams):
        return False
    for name, layer in a.layers.items():
        other = b.layers[name]
        if (layer.weight is None) != (other.weight is None):
            return False
        if layer.weight is not None and other.weight is not None and layer.weight.shape != other.weight.shape:
            return False
        if not np.array_equal(layer.group_bounds, other.group_bounds) or layer.eligible != other.eligible:
            return False
    return True


def _other_order(start: Program, expected: Program) -> str:
    """What shows that channels are in another order or ranges are others; "" if nothing does."""
    slack = float(start.provenance.get("config", {}).get("rounding_slack", 0.0))
    for name, layer in expected.layers.items():
        own = start.layers[name]
        if layer.weight is None or own.weight is None:
            continue
        if not _close(own.weight_scale, layer.weight_scale):
            return f"outputs of layer '{name}'"
        steps = 1.0 + slack * 2.0 ** float(own.weight_shift.max(initial=0))
        apart = np.abs(own.weight.astype(np.int16) - layer.weight.astype(np.int16))
        if float(apart.max(initial=0)) > steps:
            return f"weights of layer '{name}'"
    for name, encoding in expected.qparams.items():
        if not _close(np.array([start.qparams[name].scale]), np.array([encoding.scale])):
            return f"range of '{name}'"
    return ""


def _close(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return bool(np.allclose(a, b, rtol=TOLERANCE, atol=0.0))


def _versions(start: Program) -> str:
    """What to say about versions: another one may choose scales or the layout in another way."""
    made = {k: start.provenance.get(k) for k in ("bitdial", "torch")}
    here = {"bitdial": __version__, "torch": torch.__version__}
    other = [f"{k} {made[k]} (here {here[k]})" for k in here if made[k] is not None and made[k] != here[k]]
    return f". It was made with {' and '.join(other)}, which may be why" if other else ""
