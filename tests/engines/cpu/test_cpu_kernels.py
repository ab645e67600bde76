"""Every kernel of the CPU engine on every instruction set of this machine, against exact integers: int32 sums bit for bit."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_layers import (
    LIMITS,
    LOW_KINDS,
    METHODS,
    RATIOS,
    CompiledLayer,
    LayerCase,
    Output,
    layer_cases,
    limits,
    low_weights,
    make_case,
    mixed_product,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bitdial.engines.cpu import native

ISAS = native.isas() if not native.missing() else []
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)
FACTS = {isa: native.extension().facts(isa) for isa in ISAS}
NARROW = [isa for isa in ISAS if FACTS[isa]["narrow_is_faster"]]  # sums of eight products are held in 16 bits
KERNELS = {isa: set(METHODS) - (set() if FACTS[isa]["has_fip"] else {"fip", "winograd_fip"}) for isa in ISAS}
CHUNKS = (0, 12, 24, 60, 1200)


def expected_sums(case: LayerCase) -> list[npt.NDArray[np.int64]]:
    """Accumulators with bias at every ratio; they must be int32 for the comparison to mean anything."""
    sums = [mixed_product(case, i) + case.bias[i].astype(np.int64) for i in range(len(RATIOS))]
    assert max(int(np.abs(s).max(initial=0)) for s in sums) < 2**31
    return sums


def check_all_methods(
    case: LayerCase, isa: str, threads: int, chunks: tuple[int, ...], mixed_seed: int = 0, small: bool = False,
    dirt: bool = True,
) -> list[str]:  # fmt: skip
    """Every exact kernel at every ratio and chunk size gives the exact sums. Returns the kernels that were exact."""
    expected = expected_sums(case)
    layer = CompiledLayer(case, isa, threads, small=small, dirt=dirt)
    exact = layer.exact()
    assert "direct" in exact and set(exact) <= KERNELS[isa] - ({"winograd", "winograd_fip"} if small else set())
    for method in exact:
        for chunk in chunks:
            for index in range(len(RATIOS)):
                layer.choose(index, method, chunk)
            layer.native.finish()
            for index in range(len(RATIOS)):
                got = layer.run(index)
                wrong = np.argwhere(got != expected[index])
                where = f"{isa}, {method}{', small' * small}, chunk {chunk}, {threads} threads, ratio index {index}"
                assert not len(wrong), (
                    f"{where}: {len(wrong)} of {got.size} sums differ, the first at {wrong[0].tolist()}: "
                    f"{got[tuple(wrong[0])]} is not {expected[index][tuple(wrong[0])]}"
                )
    # a kernel of its own at every ratio, packed together
    rng = np.random.default_rng(mixed_seed)
    for pack_all in (False, True):
        for index in range(len(RATIOS)):
            layer.choose(index, str(rng.choice(exact)), int(rng.choice(chunks)))
        layer.native.finish(pack_all)
        for index in rng.permutation(len(RATIOS)):
            assert (layer.run(int(index)) == expected[index]).all(), f"{isa}: kernels mixed, ratio index {index}"
    return exact


# ---- the oracle ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_oracle_is_the_definition(oracle: ModuleType, seed: int) -> None:
    """The fast oracle of these tests equals the slow one, which computes one output at a time in Python's integers."""
    rng = np.random.default_rng(seed)
    groups = 1 + seed % 2
    case = make_case(
        rng, batch=2, per=int(rng.integers(3, 14)), rows=3, size=(4, 3), kernel=(3, 1 + seed % 3), group=4, conv_groups=groups,
        limits=LIMITS[seed * 3], by_output=seed % 2 == 0, x_kind="reach", stride=(1 + seed % 2, 1), pad=(1, 1),
        dilation=(1, 1 + seed // 3),
    )  # fmt: skip
    layer = SimpleNamespace(
        kind="conv", weight=case.weight, group_bounds=case.bounds, activation_shift=case.activation_shift,
        weight_shift=case.weight_shift, amax=case.amax, wmax=case.wmax, low_weight=case.low_weight,
    )  # fmt: skip
    attrs = {"stride": case.stride, "padding": case.pad, "dilation": case.dilation, "groups": groups}
    slow = oracle.LayerOracle(layer, attrs, case.x, case.signed, "static")
    for index in range(len(RATIOS)):
        assert (slow.accumulators(case.low[index]).transpose(0, 2, 3, 1) == mixed_product(case, index)).all()


# ---- accumulators ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    case=layer_cases(), threads=st.integers(1, 2), chunks=st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=2),
    small=st.booleans(), dirt=st.booleans(),
)  # fmt: skip
def test_every_kernel_gives_the_exact_sums(
    case: LayerCase, threads: int, chunks: list[int], small: bool, dirt: bool
) -> None:
    for isa in ISAS:
        check_all_methods(case, isa, threads, tuple(chunks), small=small, dirt=dirt)


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(
    case=layer_cases(6_000_000),
    threads=st.integers(1, 3),
    chunks=st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=3),
    dirt=st.booleans(),
)
def test_every_kernel_gives_the_exact_sums_at_length(
    case: LayerCase, threads: int, chunks: list[int], dirt: bool
) -> None:
    for isa in ISAS:
        for small in (False, True):
            check_all_methods(case, isa, threads, tuple(chunks), small=small, dirt=dirt)


# (channels, outputs, size, kernel, stride, pad, group, conv_groups, limits): what random draws may miss, and few enough for
# the sanitizers
RAGGED: list[dict[str, Any]] = [
    {"per": 20, "rows": 33, "size": (5, 7), "kernel": (1, 1), "pad": (0, 0), "group": 8},
    {"per": 5, "rows": 1, "size": (1, 1), "kernel": (1, 1), "pad": (0, 0), "group": 8, "limits": (7, 7, True)},
    {"per": 44, "rows": 70, "size": (7, 5), "pad": (1, 1), "group": 8, "batch": 2},
    {"per": 44, "rows": 17, "size": (3, 9), "pad": (2, 2), "group": 16, "limits": (7, 7, True)},
    {"per": 12, "rows": 65, "size": (1, 1), "pad": (1, 1), "group": 4},
    {"per": 31, "rows": 9, "size": (9, 4), "kernel": (5, 3), "pad": (2, 0), "stride": (2, 1), "group": 16},
    {"per": 16, "rows": 5, "size": (6, 6), "pad": (1, 1), "conv_groups": 3, "group": 8, "batch": 3},
    {"per": 9, "rows": 8, "size": (5, 5), "pad": (1, 0), "conv_groups": 2, "group": 8, "dilation": (2, 1)},
    {"per": 64, "rows": 64, "size": (3, 3), "kernel": (1, 1), "pad": (0, 0), "stride": (2, 2), "group": 32, "batch": 2},
    {"per": 40, "rows": 20, "size": (4, 4), "kernel": (1, 1), "pad": (1, 1), "group": 16, "limits": (31, 14, False)},
    {"per": 24, "rows": 12, "size": (11, 10), "pad": (1, 1), "group": 8, "by_output": True},
]  # fmt: skip


@pytest.mark.sanitize
@EVERY_ISA
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_on_ragged_layers(isa: str, threads: int) -> None:
    for seed, fields in enumerate(RAGGED):
        case = make_case(np.random.default_rng(seed), **fields)
        exact = check_all_methods(case, isa, threads, (12, 0), seed)
        check_all_methods(case, isa, threads, (0,), seed, small=True)
        if fields.get("by_output"):
            assert exact == ["direct"]
        case = make_case(np.random.default_rng(seed), **fields, low_kind="any")
        for small in (False, True):
            check_all_methods(case, isa, threads, (0,), seed, small=small)


@pytest.mark.sanitize
@EVERY_ISA
def test_shifts_chosen_at_run_time(isa: str) -> None:
    """Every sample by its own values: loud and quiet samples in one batch, channels of differing range."""
    for seed, fields in enumerate(RAGGED):
        fields = {**fields, "batch": 3, "low_kind": "any" if seed % 2 else None, "dynamic": True, "x_kind": "reach"}
        case = make_case(np.random.default_rng(seed), **fields)
        quiet = np.array([1, 9, 64], np.int64)[np.arange(3) - seed % 3].reshape(3, 1, 1, 1)
        case.x[:] = np.sign(case.x) * (np.abs(case.x) // quiet)
        check_all_methods(case, isa, 1 + seed % 2, (0, 12), seed, small=seed % 3 == 2)


@EVERY_ISA
@pytest.mark.parametrize("x_kind", ["zero", "top", "bottom", "ends", "checker", "groups"])
def test_kernels_on_extreme_values(isa: str, x_kind: str) -> None:
    """Zero and saturated activations (255, -127, 127) against zero, saturated and alternating weights, at every edge of
    exactness that LIMITS names."""
    rng = np.random.default_rng(sum(map(ord, x_kind)))
    for w_kind in ("top", "ends", "checker", "groups"):
        for low in sorted(set(LIMITS)):
            kernel = (1, 1) if rng.integers(3) == 0 else (3, 3)
            stored = w_kind if rng.integers(2) else None
            case = make_case(
                rng, per=24, rows=6, size=(4, 5), kernel=kernel, group=8, limits=low, x_kind=x_kind, w_kind=w_kind,
                low_kind=stored, pad=(kernel[0] // 2,) * 2,
            )  # fmt: skip
            if rng.integers(2):  # the largest shifts: the largest sums
                case.activation_shift[:] = (7 if low[2] else 8) - low[0].bit_length()
                case.weight_shift[:] = 7 - low[1].bit_length()
            check_all_methods(case, isa, 1, (0,), small=bool(rng.integers(4) == 0))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), per=st.integers(1, 15), rows=st.integers(1, 80),
    kernel=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    stride=st.integers(1, 2), pad=st.integers(0, 2), size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    signed=st.booleans(), kind=st.sampled_from(["any", "ends", "top", "bottom"]), threads=st.integers(1, 2),
)  # fmt: skip
def test_rows_of_filters_in_one_piece(
    seed: int, per: int, rows: int, kernel: tuple[int, int], stride: int, pad: int, size: tuple[int, int], signed: bool,
    kind: str, threads: int,
) -> None:  # fmt: skip
    """Layers with few input channels: a row of a filter and its pixels are read as one run of bytes."""
    case = make_case(
        np.random.default_rng(seed), batch=2, per=per, rows=rows, size=size, kernel=kernel, group=per,
        limits=(7, 7, True) if signed else (15, 7, False), x_kind=kind, w_kind=kind, stride=(stride, stride), pad=(pad, pad),
    )  # fmt: skip
    case.low[:] = False
    expected = expected_sums(case)
    for isa in ISAS:
        layer = CompiledLayer(case, isa, threads, folded=True)
        assert layer.exact() == ["direct"]
        for chunk in (0, 12):
            layer.choose(0, "direct", chunk)
            layer.native.finish()
            assert (layer.run(0) == expected[0]).all(), isa


@EVERY_ISA
def test_sums_up_to_the_last_bit_of_int32(isa: str) -> None:
    """Winograd carries four times the sum: offered while that stays inside 32 bits, and exact up to there."""
    for channels, fits in ((2208, True), (2224, False)):  # 15 * 7 * 9 * 4 * 2^8 * 2219.2 = 2^31
        case = make_case(
            np.random.default_rng(0),
            per=channels,
            rows=2,
            size=(4, 4),
            group=16,
            x_kind="top",
            w_kind="top",
            pad=(0, 0),
        )
        case.activation_shift[:], case.weight_shift[:] = 4, 4
        case.weight[1] = -127
        layer = CompiledLayer(case, isa)
        why = layer.unsupported()["winograd"]
        assert (why == "") == fits and (fits or "32 bits" in why)
        check_all_methods(case, isa, 1, (0,))


@EVERY_ISA
@pytest.mark.parametrize("signed", [False, True])
def test_pairs_of_weights_at_the_edge_of_16_bits(isa: str, signed: bool) -> None:
    """255 * 128 fits, 255 * 129 does not: weights on both sides of it, in every place of a quad and a few quads of many."""
    rng = np.random.default_rng(7)
    case = make_case(
        rng, per=20, rows=40, size=(4, 4), group=4, pad=(1, 1), x_kind="top", limits=(7, 7, True) if signed else (15, 7, False)
    )
    edges = [(64, 64), (127, 1), (-64, -64), (-1, -127), (127, -127), (0, 127), (64, 65), (2, 127), (-65, -64), (-127, -2)]
    for share in (0.0, 0.003, 0.3):  # of pairs over the edge: in no block, in some, in all
        over = rng.random(case.weight.size // 2) < share
        choice = np.where(over, rng.integers(6, 10, over.size), rng.integers(0, 6, over.size))
        pairs = np.array(edges, np.int8)[choice].reshape(40, 3, 3, 20)
        case.weight[:] = pairs.transpose(0, 3, 1, 2)
        check_all_methods(case, isa, 1, (0, 12))
        check_all_methods(case, isa, 1, (0,), small=True)


@EVERY_ISA
def test_every_mask_of_four_groups(isa: str) -> None:
    """All sixteen subsets of low groups, nested or not, with shifts that rise, fall and repeat along the channels."""
    case = make_case(np.random.default_rng(3), per=30, rows=20, size=(5, 5), group=8, pad=(1, 1), x_kind="reach")
    for shifts in ([0, 1, 2, 3], [4, 3, 1, 0], [2, 2, 2, 2], [0, 4, 0, 4]):
        case.activation_shift[:] = shifts
        masks = np.array([[m >> g & 1 for g in range(4)] for m in range(16)], np.bool_)
        for start in range(0, 16, 4):
            case.low = np.concatenate([np.zeros((1, 4), np.bool_), masks[start : start + 4]])
            check_all_methods(case, isa, 1, (0,))


@pytest.mark.sanitize
@EVERY_ISA
@pytest.mark.parametrize("conv_groups", [3, 7, 32])  # RegNets have layers of 7 to 32 groups and more
def test_any_subset_of_convolution_groups_may_be_low(isa: str, conv_groups: int) -> None:
    """Where one convolution group is low and another is not, their kernels need scratch memory of different sizes. All
    subsets of three groups, some of more; in half of the programs the first group is never low."""
    rng = np.random.default_rng(conv_groups)
    case = make_case(
        rng, batch=2, per=8, rows=5, size=(6, 5), group=8, conv_groups=conv_groups, pad=(1, 1), low_kind="any"
    )
    plane = case.low_weight
    for first in (False, True):
        case.low_weight = None if first else plane
        others = rng.random((4, conv_groups)) < 0.5
        if conv_groups == 3:
            others[:, 1:] = [[0, 0], [0, 1], [1, 0], [1, 1]]
        else:
            others[:2] = [[0] * (conv_groups - 1) + [1], [1] * conv_groups]
        others[:, 0] = first
        case.low = np.concatenate([np.zeros((1, conv_groups), np.bool_), others])
        for small in (False, True):
            exact = check_all_methods(case, isa, 1 + small, (12, 0), small=small, dirt=False)
            assert set(exact) == KERNELS[isa] - ({"winograd", "winograd_fip"} if small else set())


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), small=st.booleans(), threads=st.integers(1, 2))
def test_random_subsets_of_groups(data: st.DataObject, seed: int, small: bool, threads: int) -> None:
    run_random_subsets(data, seed, small, threads)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), small=st.booleans(), threads=st.integers(1, 3))
def test_random_subsets_of_groups_at_length(data: st.DataObject, seed: int, small: bool, threads: int) -> None:
    run_random_subsets(data, seed, small, threads)


def run_random_subsets(data: st.DataObject, seed: int, small: bool, threads: int) -> None:
    """Any groups of channels of any convolution group, at every ratio anew."""
    conv_groups, per = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 20))
    case = make_case(
        np.random.default_rng(seed), batch=2, per=per, rows=data.draw(st.integers(1, 40)), size=(5, 4),
        kernel=data.draw(st.sampled_from([(3, 3), (3, 3), (1, 1)])), group=data.draw(st.sampled_from([4, 8])),
        conv_groups=conv_groups, pad=(1, 1), low_kind=data.draw(st.sampled_from([None, *LOW_KINDS])),
        limits=data.draw(st.sampled_from([(15, 7, False), (15, 7, False), (15, 10, False), (7, 7, True)])),
    )  # fmt: skip
    n_groups = case.low.shape[1]
    bits = st.integers(0, 2**n_groups - 1)
    masks = [data.draw(bits) for _ in RATIOS]
    case.low = np.array([[m >> g & 1 for g in range(n_groups)] for m in masks], np.bool_)
    for isa in ISAS:
        check_all_methods(case, isa, threads, (data.draw(st.sampled_from(CHUNKS)),), small=small, dirt=False)


@EVERY_ISA
def test_stored_low_weights_cost_half_a_byte_with_small_memory(isa: str) -> None:
    """memory="small": beside the 8-bit copy, four bits (or a byte, above 7) for each weight of a group that is ever low."""
    for width, bits in (((15, 7, False), 4), ((15, 10, False), 8)):
        case = make_case(
            np.random.default_rng(2), per=64, rows=64, kernel=(1, 1), size=(3, 3), group=16, low_kind="any", limits=width
        )
        case.low[:] = np.array([True, False, True, False]) & case.low.any(axis=1, keepdims=True)
        layers = [CompiledLayer(c, isa, small=True) for c in (case, dataclasses.replace(case, low_weight=None))]
        stored, derived = (layer.native.weight_bytes("layer") for layer in layers)
        assert stored[:6] == derived[:6] and derived[6] == 0 and sum(derived) == derived[0] == 64 * 64
        assert stored[6] == 64 * 32 * bits // 8
        assert CompiledLayer(case, isa).native.weight_bytes("layer")[6] == 0
    case = make_case(np.random.default_rng(2), by_output=True, low_kind="any")  # no narrow kernel: a copy to read back
    held = CompiledLayer(case, isa, small=True).native.weight_bytes("layer")
    assert held[1] == held[0] and held[6] == 0


@EVERY_ISA
def test_low_weights_out_of_their_range_are_refused(isa: str) -> None:
    case = make_case(np.random.default_rng(1), low_kind="any")
    assert case.low_weight is not None
    case.low_weight[3, 2, 1, 1] = -8
    with pytest.raises(ValueError, match="layer 'layer': a low weight is larger than 7"):
        CompiledLayer(case, isa)
    case.low_weight = case.low_weight[1:]
    with pytest.raises(ValueError, match="low weights are not as many as its weights"):
        CompiledLayer(case, isa)


# ---- which kernels are exact -----------------------------------------------------------------------------------------------


@EVERY_ISA
def test_plain_four_bits_have_every_kernel(isa: str) -> None:
    """No needless caution: a 3x3 layer of stride 1 at 4 bits can use all kernels that the instruction set has."""
    for w_kind, low in (
        ("any", (15, 7, False)),
        ("top", (15, 7, False)),
        ("checker", (15, 7, False)),
        ("any", (7, 7, True)),
    ):
        case = make_case(np.random.default_rng(1), per=64, rows=64, limits=low, pad=(1, 1), w_kind=w_kind)
        assert set(CompiledLayer(case, isa).exact()) == KERNELS[isa]
    for kernel in ((1, 1), (5, 5)):
        case = make_case(np.random.default_rng(1), per=64, rows=64, kernel=kernel, pad=(0, 0))
        assert set(CompiledLayer(case, isa).exact()) == KERNELS[isa] - {"winograd", "winograd_fip"}


@EVERY_ISA
def test_what_is_unsupported_is_named(isa: str) -> None:
    def why(method: str, **fields: Any) -> str:
        case = make_case(np.random.default_rng(1), **{"per": 32, "rows": 8, "pad": (1, 1), **fields})
        return CompiledLayer(case, isa).unsupported()[method]

    for method in sorted(KERNELS[isa] - {"direct"}):
        assert "weight shifts differ" in why(method, by_output=True)
        if isa in NARROW:
            assert "16 bits" in why(method, limits=(255, 127, False)) or "bytes" in why(
                method, limits=(255, 127, False)
            )
        else:
            assert method == "narrow" or "bytes" in why(method, limits=(255, 127, False))
    for method in sorted({"winograd", "winograd_fip"} & KERNELS[isa]):
        for fields in ({"stride": (2, 2)}, {"dilation": (2, 1)}, {"kernel": (3, 1)}, {"kernel": (5, 5)}):
            assert "3x3 convolution of stride 1" in why(method, **fields)
    for method in sorted({"fip", "winograd_fip"} & KERNELS[isa]):
        assert "multiple of 8" in why(method, group=4)
    for method in sorted(set(METHODS) - KERNELS[isa]):
        assert "instruction set" in why(method)
    case = make_case(np.random.default_rng(1), pad=(1, 1))
    case.low[:] = False
    assert CompiledLayer(case, isa).exact() == ["direct"]


@EVERY_ISA
def test_forcing_a_kernel_that_is_not_exact_is_refused(isa: str) -> None:
    layer = CompiledLayer(make_case(np.random.default_rng(1), by_output=True, pad=(1, 1)), isa)
    with pytest.raises(ValueError, match=r"layer 'layer' cannot use winograd: .*weight shifts differ"):
        layer.choose(1, "winograd")
    layer.choose(0, "winograd")  # nothing is low there: the direct kernel runs
    assert METHODS[layer.native.choice("layer", 0)[0]] == "direct"


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1), low=limits(), kernel=st.sampled_from([(3, 3), (3, 3), (1, 1)]), groups=st.integers(1, 2),
    w_kind=st.sampled_from(["any", "reach", "groups", "ends", "checker", "top"]), x_kind=st.sampled_from(["ends", "checker"]),
    low_kind=st.sampled_from([None, *LOW_KINDS]),
)  # fmt: skip
@example(seed=0, low=(31, 7, False), kernel=(3, 3), groups=1, w_kind="checker", x_kind="checker", low_kind=None)
@example(seed=0, low=(31, 14, False), kernel=(3, 3), groups=1, w_kind="any", x_kind="ends", low_kind=None)
@example(seed=0, low=(63, 63, False), kernel=(1, 1), groups=1, w_kind="ends", x_kind="ends", low_kind=None)
def test_claims_agree_with_the_rules_of_quantization(
    seed: int, low: tuple[int, int, bool], kernel: tuple[int, int], groups: int, w_kind: str, x_kind: str,
    low_kind: str | None,
) -> None:  # fmt: skip
    """The quantizer predicts which kernels will be exact (for low_bits="auto"); the engine must offer just those."""
    try:
        exactness = importlib.import_module("bitdial.quantization.exactness")
    except ModuleNotFoundError:
        pytest.skip("bitdial.quantization.exactness is not there")
    case = make_case(
        np.random.default_rng(seed), per=16, rows=5, size=(4, 4), kernel=kernel, conv_groups=groups, limits=low, group=8,
        x_kind=x_kind, w_kind=w_kind, low_kind=low_kind, pad=(kernel[0] // 2,) * 2,
    )  # fmt: skip
    claimed = exactness.exact_mechanisms(low[0], low[1], low[2], kernel, (1, 1), low_weights(case))
    for isa in ISAS:
        exact = set(check_all_methods(case, isa, 1, (0,)))
        if isa in NARROW:
            known = {"direct", "narrow"} & claimed | ({"winograd"} if "winograd_narrow" in claimed else set())
        else:  # byte products are exact, so that "narrow" (low weights packed apart, or derived) always is
            known = claimed & KERNELS[isa] | {"narrow"}
        assert exact == known, (isa, low)


# ---- epilogue --------------------------------------------------------------------------------------------------------------


def expected_output(case: LayerCase, index: int, out: Output) -> npt.NDArray[np.float32]:
    """t = fl(float(acc + b) * M); t = fl(t + fl(float(r) * R)) or fl(t + r); clamp; rne (bytes). float32 all along."""
    assert out.multiplier is not None
    t = (mixed_product(case, index) + case.bias[index].astype(np.int64)).astype(np.float32) * out.multiplier
    if out.residual is not None:
        floats = out.residual.dtype.kind == "f"
        t = t + (out.residual if floats else out.residual.astype(np.float32) * np.float32(out.residual_factor))
    assert t.dtype == np.float32
    t = np.clip(t, np.float32(out.lo), np.float32(out.hi))
    return np.rint(t) if out.kind == "bytes" else t


def random_output(
    rng: np.random.Generator, case: LayerCase, kind: str, residual: str, signed: bool, halves: bool
) -> Output:
    """An epilogue whose results spread over the range of its output."""
    outputs = len(case.weight)
    shape = (len(case.x), *case.out_size, outputs)
    sums = np.concatenate([mixed_product(case, i).reshape(-1, outputs) for i in range(len(RATIOS))])
    spread = np.maximum(1.0, np.abs(sums).max(axis=0))
    case.bias = np.clip(case.bias, -spread // 2, spread // 2).astype(np.int32)
    multiplier = (rng.uniform(20, 400, outputs) / spread).astype(np.float32)
    if halves:  # ties: half to even
        multiplier = np.exp2(np.round(np.log2(multiplier))).astype(np.float32)
    out = Output(kind, multiplier, signed=signed, residual_factor=float(np.float32(rng.uniform(0.1, 2.0))))
    least, most = (-127, 127) if signed else (0, 255)
    if kind == "bytes":
        out.lo, out.hi = float(least), float(most)
        if rng.integers(2):
            out.lo, out.hi = (float(v) for v in np.sort(rng.integers(least, most + 1, 2)))
        if not rng.integers(3):
            out.halo = (int(rng.integers(0, 3)), int(rng.integers(1, 3)))
    elif rng.integers(2):
        out.lo, out.hi = [(0.0, np.inf), (-20.5, 31.25)][int(rng.integers(2))]
    if residual == "bytes":
        out.residual_signed = bool(rng.integers(2))
        out.residual = rng.integers(-127 if out.residual_signed else 0, 128 if out.residual_signed else 256, shape)
    elif residual == "float":
        out.residual = rng.normal(0, 50, shape).astype(np.float32)
    out.channels_first = kind == "float" and bool(rng.integers(2))
    return out


@pytest.mark.sanitize
@EVERY_ISA
@pytest.mark.parametrize("kind", ["bytes", "float"])
@pytest.mark.parametrize("residual", ["none", "bytes", "float"])
def test_epilogue_rounds_once_per_operation(isa: str, kind: str, residual: str) -> None:
    """Signed and unsigned bytes, floats in both layouts, residuals, limits and ties, through every kernel."""
    for seed in range(8):
        rng = np.random.default_rng([seed, len(kind), len(residual)])
        kernel, pad = [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 3), (0, 2))][seed % 3]
        case = make_case(
            rng, batch=2, per=int(rng.integers(4, 40)), rows=int(rng.integers(1, 75)), size=(5, 4), kernel=kernel, pad=pad,
            conv_groups=1 + seed // 6, group=8, limits=[(15, 7, False), (7, 7, True)][seed % 2], x_kind="reach",
        )  # fmt: skip
        out = random_output(rng, case, kind, residual, bool(seed // 2 % 2), halves=seed % 4 == 3)
        layer = CompiledLayer(case, isa, 1 + seed % 2, out)
        expected = [expected_output(case, i, out) for i in range(len(RATIOS))]
        assert all(len(np.unique(e)) > 3 for e in expected) or out.hi - out.lo < 8
        for method in layer.exact():
            for index in range(len(RATIOS)):
                layer.choose(index, method, 12 * (seed % 3))
            layer.native.finish()
            for index in range(len(RATIOS)):
                got = layer.run(index)
                assert (got == expected[index]).all(), f"{method}, ratio index {index}, {out}"


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    case=layer_cases(300_000), kind=st.sampled_from(["bytes", "bytes", "float"]), signed=st.booleans(), halves=st.booleans(),
    residual=st.sampled_from(["none", "bytes", "bytes", "float"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_epilogue_of_ragged_layers(
    case: LayerCase, kind: str, signed: bool, halves: bool, residual: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = dataclasses.replace(case)
    out = random_output(rng, case, kind, residual, signed, halves)
    expected = [expected_output(case, i, out) for i in range(len(RATIOS))]
    for isa in ISAS:
        layer = CompiledLayer(case, isa, 1, out)
        for method in layer.exact():
            for index in range(len(RATIOS)):
                layer.choose(index, method, 12)
            layer.native.finish()
            for index in range(len(RATIOS)):
                assert (layer.run(index) == expected[index]).all(), f"{isa}, {method}, ratio index {index}, {out}"


@EVERY_ISA
@pytest.mark.parametrize("signed", [False, True])
def test_factors_that_leave_int32(isa: str, signed: bool) -> None:
    """Sums times factors are limited before they are rounded to int32, where they could leave it."""
    for largest in (0.5, 0.75, 1e7, 1e20):
        case = make_case(np.random.default_rng(1), per=64, rows=40, group=16, pad=(1, 1), x_kind="top", w_kind="ends")
        multiplier = np.where(np.arange(40) % 4, 1e-4, largest).astype(np.float32)
        out = Output("bytes", multiplier, *((-127.0, 127.0) if signed else (0.0, 255.0)), signed=signed)
        layer = CompiledLayer(case, isa, 1, out)
        for method in layer.exact():
            layer.choose(0, method)
            layer.choose(4, method)
            layer.native.finish()
            for index in (0, 4):
                assert (layer.run(index) == expected_output(case, index, out)).all(), (method, largest)


# ---- what kernels count ----------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_count_what_they_execute(isa: str, threads: int) -> None:
    """low + high is the layer's multiply-accumulates, split as the mask says, for every kernel and chunk size; products
    issued are fewer where a fast kernel ran."""
    case = make_case(
        np.random.default_rng(5), batch=2, per=40, rows=70, size=(7, 6), group=8, conv_groups=1, pad=(1, 1)
    )
    layer = CompiledLayer(case, isa, threads)
    widths = np.diff(case.bounds)
    for method in layer.exact():
        for chunk in (12, 0):
            for index in range(len(RATIOS)):
                layer.choose(index, method, chunk)
            layer.native.finish()
            for index in range(len(RATIOS)):
                layer.native.reset_counters()
                layer.run(index)
                layer.run(index)
                any_low = bool(case.low[index].any())
                (kernel, (low, high, issued, runs)), *more = layer.counters().items()
                assert not more and kernel == (method if any_low else "direct") and runs == 2
                per_channel = case.macs // 40
                assert low == 2 * per_channel * int(widths[case.low[index]].sum())
                assert high == 2 * per_channel * int(widths[~case.low[index]].sum())
                if kernel in ("direct", "narrow"):
                    assert issued == low + high
                elif kernel == "fip":
                    assert issued == high + low // 2
                else:  # 7 x 6 pixels are 4 x 3 tiles of 16 products, an eighth more pixels than there are
                    tiles = 2 * 4 * 3 * 16 * 70 * int(widths[case.low[index]].sum()) * 2
                    assert issued == high + (tiles // 2 if kernel == "winograd_fip" else tiles)
    layer.native.reset_counters()
    assert layer.counters() == {}
