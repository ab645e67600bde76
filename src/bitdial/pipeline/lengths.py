"""The float network once more for shorter sequences: captured again, since positions and masks are constants of a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdial.errors import CalibrationError, CaptureError, GraphError
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.verify import verify
from bitdial.quantization.lengths import AXIS, check_same

SAMPLES = 8  # of the calibration data, to see whether padding matters
TOLERANCE = 1e-3  # of the norm of an output: float sums over more zeros may round in another way


def shorter_graphs(
    graph: Graph, inputs: Sequence[Tensor], lengths: Sequence[int], capture: Callable[[Sequence[Tensor]], Graph]
) -> dict[int, Graph]:
    """The network of each of the lengths.

    graph: of the full length, which is the largest axis 1 of `inputs`, calibration data. capture: gives the network for other
    inputs, changed as `graph` was. Raises CalibrationError for a length that is none, or where padding changes answers;
    CaptureError where the network is another one.
    """
    result = {}
    full = max((x.shape[AXIS] for x in inputs if x.dim() > AXIS), default=0)
    for length in lengths:
        if length >= full:
            raise CalibrationError(
                f"lengths: {length} is not shorter than the calibration data, whose axis 1 has {full}: leave it out"
            )
        cut = [x[:, :length] if x.dim() > AXIS and x.shape[AXIS] == full else x for x in inputs]
        try:
            own = capture(cut)
            verify(own)
        except (CaptureError, GraphError, KeyError) as error:
            raise CaptureError(
                f"lengths: with inputs of length {length} the network is another one than at its full length {full} ({error})"
            ) from error
        before, now = ([(n.name, n.op, tuple(n.inputs)) for n in g.nodes] for g in (graph, own))
        check_same(before, now, length)
        _check_padding(graph, own, inputs, cut, length)
        result[length] = own
    return result


def _check_padding(
    graph: Graph, shorter: Graph, inputs: Sequence[Tensor], cut: Sequence[Tensor], length: int
) -> None:
    """Raise CalibrationError if zeros behind shorter sequences change the float network's answers."""
    few = [part[:SAMPLES] for part in cut]
    padded = [
        part if part.shape[1:] == x.shape[1:] else torch.cat([part, torch.zeros_like(x[:SAMPLES, length:])], AXIS)
        for x, part in zip(inputs, few, strict=True)
    ]
    with torch.no_grad():
        pairs = zip(run_graph(graph, padded), run_graph(shorter, few), strict=True)
        for number, (whole, short) in enumerate(pairs):
            own = whole[tuple(slice(n) for n in short.shape)].double()
            apart = float((own - short.double()).norm()) / max(float(short.double().norm()), 1e-30)
            if not apart < TOLERANCE:
                raise CalibrationError(
                    f"lengths: zeros behind sequences of length {length} change output {number} by {100 * apart:.2g} %, in float "
                    "already: give the network a mask that takes padding out, or leave lengths out"
                )
