"""How much of the noise that a layer adds reaches the network's outputs, estimated from noise measured in the two runs.

Local metrics look at a layer's own output. What counts is the output of the network, and layers differ in how much of their
noise gets there: by orders of magnitude where residuals, strides and normalization lie between. The two runs hold the
answer: they give the noise of every value of interest, hence how much of it every operation passes on. Gains are multiplied
from the outputs backwards, once, in time linear in the number of values.

The method is ours; QuantuneV2 (arXiv 2501.07161) uses local metrics. Assumed: noises of different origin do not correlate, so
that their energies add, and an operation passes the same share of any small noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Where what is carried is taken as the rest of measured noise, it may come out too small, or even negative, since own noise is
# measured on other samples. At least this share of a value's noise counts as carried to it (assumed).
LEAST_CARRIED = 0.05


@dataclass(frozen=True)
class Energy:
    """Per sample: sum of squares of a value in the float run, and of its differences between the two runs."""

    signal: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.noise / self.signal if self.signal > 0.0 else 0.0


@dataclass(frozen=True)
class Flow:
    """A measured value and the measured values that it is computed from.

    sources    value -> share of its energy that is read (less than 1 behind a slice)
    residual   the same, for what is added before the fused activation
    joins      sources are added or joined as they are (add, concat): they pass on alike
    passing    share of the outputs that the fused activation does not clip; 1 without one
    carried    noise energy that arrives from the sources, where it was measured by itself; None: the rest of the value's noise
    """

    value: str
    sources: Mapping[str, float]
    residual: Mapping[str, float] = field(default_factory=dict)
    joins: bool = False
    passing: float = 1.0
    carried: float | None = None


def source_gains(flow: Flow, energies: Mapping[str, Energy], own: float) -> dict[str, float]:
    """Source -> noise energy at the flow's value per noise energy at the source.

    own: noise energy that the operation adds by itself. The noise that arrives from the sources (`carried`, or what own noise
    and residuals leave of the value's) is shared among them by their relative noise (by energy, for joins). Residuals
    pass the activation and nothing else.
    """
    total = max(energies[flow.value].noise - own, LEAST_CARRIED * energies[flow.value].noise)
    beside = sum(flow.passing * share * energies[s].noise for s, share in flow.residual.items())
    arriving = max(total - beside, LEAST_CARRIED * energies[flow.value].noise) if flow.carried is None else flow.carried
    # Noises on the two ways are not independent after all: together they have to be what was measured.
    both = beside + arriving
    scale = total / both if flow.carried is not None and both > 0.0 else 1.0
    gains: dict[str, float] = {}
    for source, share in flow.residual.items():
        gains[source] = gains.get(source, 0.0) + scale * flow.passing * share
    noisy = {s: share for s, share in flow.sources.items() if energies[s].noise > 0.0 and share > 0.0}
    weights = {s: share * energies[s].noise if flow.joins else energies[s].ratio for s, share in noisy.items()}
    whole = sum(weights.values())
    for source in noisy:
        if whole > 0.0:
            gains[source] = gains.get(source, 0.0) + scale * arriving * weights[source] / whole / energies[source].noise
    return gains


def output_gains(
    flows: Sequence[Flow], energies: Mapping[str, Energy], own: Mapping[str, float], outputs: Sequence[str]
) -> dict[str, float]:
    """Value -> noise over signal at the network's outputs (their sum) per noise energy at the value.

    flows: in topological order. energies: of every value that they name. own: noise energy that an operation adds by itself;
    0 where none is given. outputs: those of the network that were measured. Values that reach no output have no entry.
    """
    gains: dict[str, float] = {}
    for value in outputs:
        if energies[value].signal > 0.0:
            gains[value] = gains.get(value, 0.0) + 1.0 / energies[value].signal
    for flow in reversed(flows):
        above = gains.get(flow.value, 0.0)
        if above == 0.0:
            continue
        for source, gain in source_gains(flow, energies, own.get(flow.value, 0.0)).items():
            gains[source] = gains.get(source, 0.0) + above * gain
    return gains
