"""Targets: which widths of low operands a kind of machine computes at the speed of 4 bits, without a measured table.

An exact kernel is as fast at its widest operands as at its narrowest, so a layer may be as wide as its fastest kernel allows
(`width.py` says more, and does the same from times that were measured on a machine at hand). A target is an ordered list of
mechanisms (names of `exactness.py`) that the kernels of `csrc/cpu` offer there, fastest first, each with the layers for which
it was found to be worth it: faster than what lies behind it by more than about a tenth. Where none is at 4 bits, low operands
buy no time, and the layer takes the widest there are, 7 bits.

Sources: (1) benchmarks/results/cpu_kernels.amd-zen4.avx512vnni.json and cpu_plans.amd-zen4.json; (2) the table of mechanisms
in the design notes, section 4 (Zen 4, Sapphire Rapids); (3) single layers timed as `benchmarks/cpu_kernels.py` does, on a Zen
5 server, AVX2 forced there too: kernels interleaved, the fastest of many runs, beside other load (batches 1 and 8 agree to a
few hundredths on AVX-512, less well on AVX2). That processors with nothing better than AVX2 are like it is believed; so is it of
those with AVX-VNNI, and with AVX-512 but not VNNI, whose kernels were timed on Zen 5 as well (batch 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bitdial.errors import ConfigError
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.exactness import exact_mechanisms
from bitdial.quantization.latency_table import LayerShape
from bitdial.quantization.width import candidate_widths

# "cpu" is a question, which the pipeline answers with the name that engines/cpu gives to the machine at hand. "avx512vnni" is
# what every such processor does at the speed of 4 bits; "-fullrate" are those that do two 512-bit dot products a cycle (Intel's
# servers, Zen 5), over which the fast inner product gains too little to be narrow for.
Target = Literal[
    "cpu", "paper", "avx2", "avx512", "avxvnni", "avx512vnni", "avx512vnni-fullrate", "portable", "npu", "cuda"
]
FOUR_BITS = ("paper", "npu", "cuda")  # everywhere: the paper's setting, and what these machines multiply
GROUP_SIZE, GROUP_SIZES = 16, {"npu": 64, "cuda": 32}  # of the array's rows; of one int4 mma with k32
UNKNOWN = "portable"

Pays = Callable[[LayerShape], bool]


def _channels(shape: LayerShape) -> int:
    """Input channels that a product reads."""
    return shape.in_channels // shape.groups


def _outputs(shape: LayerShape) -> int:
    return shape.out_channels // shape.groups


def _positions(shape: LayerShape) -> int:
    return shape.images * math.prod(shape.out_size)


def _winograd_fip(shape: LayerShape) -> bool:
    """Over winograd 1.06 to 1.27 from 128 channels on, 0.96 and 1.08 at 64 (1). On Zen 5 only 1.03 to 1.12 (3)."""
    return _channels(shape) >= 128


def _winograd(shape: LayerShape) -> bool:
    """Over direct 1.2 to 1.9 from 64 channels on (1, 3), 1.4 to 2.0 on Sapphire Rapids (2); 0.4 at 16 and 0.7 at 32 (3). With
    AVX-VNNI 1.3 to 1.8 from 64 channels on (3)."""
    return _channels(shape) >= 64


def _fip(shape: LayerShape) -> bool:
    """Over direct 1.07 to 1.26 from 128 channels on both sides, 0.76 to 1.1 at 64; 0.94 and 1.0 for one row of 4,096 (1)."""
    return min(_channels(shape), _outputs(shape)) >= 128 and _positions(shape) > 1


def _fip_fullrate(shape: LayerShape) -> bool:
    """Over direct 1.18 at 1,024 channels on both sides; 0.6 to 1.1 below (3)."""
    return min(_channels(shape), _outputs(shape)) >= 1024 and _positions(shape) > 1


def _winograd_avx2(shape: LayerShape) -> bool:
    """Over narrow 1.4 and more from 64 channels on, 1.1 at 32, 0.9 at 16 (3); 1.25 to 1.6 (2). AVX-512 without
    VNNI 1.35 to 2.0 (3)."""
    return _channels(shape) >= 64


def _narrow_avx2(shape: LayerShape) -> bool:
    """Over direct 1.2 (16 channels) to 1.5 for 3x3. For 1x1 and linear layers 1.2 to 2.0 from 128 channels and 64 outputs
    on, 0.8 to 1.1 below (3). Since direct sorts its weights (normal ones): 1.1 to 1.2 for 3x3, 1.0 for 1x1 of 256 channels and
    64 outputs, 1.4 for 512 and 2,048 (3). AVX-512 without VNNI: 1.5 to 1.7 for 3x3, 1.26 and more for 1x1 (3)."""
    return math.prod(shape.kernel) > 1 or (_channels(shape) >= 128 and _outputs(shape) >= 64)


_HALF_RATE: tuple[tuple[str, Pays], ...] = (("winograd_fip", _winograd_fip), ("winograd", _winograd), ("fip", _fip))
_WITHOUT_VNNI: tuple[tuple[str, Pays], ...] = (("winograd_narrow", _winograd_avx2), ("narrow", _narrow_avx2))
MECHANISMS_OF: dict[str, tuple[tuple[str, Pays], ...]] = {
    "avx512vnni": _HALF_RATE,
    "avx512vnni-fullrate": (("winograd", _winograd), ("fip", _fip_fullrate)),
    "avxvnni": (("winograd", _winograd),),
    "avx2": _WITHOUT_VNNI,
    "avx512": _WITHOUT_VNNI,
    UNKNOWN: _HALF_RATE,  # the narrowest list: what leaves room for its mechanisms leaves more for others
}


@dataclass(frozen=True)
class TargetWidth:
    """amax, wmax: limits of a layer's low activations and weights. mechanism: the one that they are chosen for."""

    amax: int
    wmax: int
    mechanism: str

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def target_width(
    shape: LayerShape, signed: bool, target: str, *, group_size: int = GROUP_SIZE, one_shift: bool = True
) -> TargetWidth:
    """The pair of least error that leaves a layer the mechanism which is its fastest at 4 bits on the target.

    signed: its input. target: one of MECHANISMS_OF. group_size: the fast inner product begins groups at multiples of 8
    channels. one_shift: whether the weights of a group share one shift over all outputs, as all but "direct" need.
    Weights count by their limit, so that the choice holds whatever they become. Raises ConfigError for another target.
    """
    if target not in MECHANISMS_OF:
        raise ConfigError(f"no kernels are known for target '{target}': choose one of {', '.join(MECHANISMS_OF)}")
    bound = (127 if signed else 255) * 127 * shape.depth  # whatever the weights and shifts become

    def exact(amax: int, wmax: int) -> frozenset[str]:
        names = exact_mechanisms(
            amax, wmax, signed, shape.kernel, shape.stride, dilation=shape.dilation, accumulator_bound=bound
        )
        return names - {"fip", "winograd_fip"} if group_size % 8 else names

    fastest = "direct"
    if one_shift and (shape.op == "linear" or len(shape.kernel) == 2):  # others run in the reference engine
        offered = exact(low_limit(4, signed), low_limit(4, True))
        fastest = next((name for name, pays in MECHANISMS_OF[target] if name in offered and pays(shape)), fastest)
    widest = next(pair for pair in candidate_widths(signed) if fastest in exact(*pair))
    return TargetWidth(*widest, fastest)
