"""Targets: widths that leave every layer the mechanism which is its fastest at 4 bits, and how the settings go together."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.exactness import exact_mechanisms
from bitdial.quantization.latency_table import LatencyTable, LayerShape, LayerTimes
from bitdial.quantization.targets import FOUR_BITS, MECHANISMS_OF, Target, target_width
from bitdial.quantization.width import candidate_widths

VNNI, FULL, AVX2 = "avx512vnni", "avx512vnni-fullrate", "avx2"


def conv(channels: int, outputs: int, kernel: int = 3, stride: int = 1, size: int = 14, **other: Any) -> LayerShape:
    out = -(-size // stride)
    geometry = {"dilation": (1, 1), "padding": (kernel // 2,) * 2, **other}
    return LayerShape(
        op="conv", in_channels=channels, out_channels=outputs, in_size=(size, size), out_size=(out, out),
        kernel=(kernel, kernel), stride=(stride, stride), **geometry,
    )  # fmt: skip


def linear(channels: int, outputs: int, rows: int) -> LayerShape:
    return LayerShape(op="linear", in_channels=channels, out_channels=outputs, in_size=(rows,), out_size=(rows,))


def test_every_target_is_a_question_four_bits_or_a_list_of_mechanisms() -> None:
    assert {"cpu", *FOUR_BITS, *MECHANISMS_OF} == set(get_args(Target))
    for name in ("cpu", "paper", "toaster"):
        with pytest.raises(ConfigError, match=f"'{name}': choose one of avx512vnni, "):
            target_width(linear(8, 8, 1), False, name)


@pytest.mark.parametrize(
    "shape, signed, expected",
    [  # (amax, wmax, mechanism) on avx512vnni, avx512vnni-fullrate, avx2
        (conv(64, 64, size=56), False, [(63, 14, "winograd"), (63, 14, "winograd"), (15, 7, "winograd_narrow")]),
        (conv(256, 256), False, [(31, 7, "winograd_fip"), (63, 14, "winograd"), (15, 7, "winograd_narrow")]),
        (conv(256, 256), True, [(15, 7, "winograd_fip"), (31, 14, "winograd"), (7, 7, "winograd_narrow")]),
        (conv(256, 512, stride=2), False, [(63, 63, "fip"), (127, 63, "direct"), (63, 63, "narrow")]),
        (conv(256, 256, dilation=(2, 2)), False, [(63, 63, "fip"), (127, 63, "direct"), (63, 63, "narrow")]),
        (conv(16, 16, size=32), False, [(127, 63, "direct"), (127, 63, "direct"), (63, 63, "narrow")]),
        (conv(512, 512, 1), False, [(63, 63, "fip"), (127, 63, "direct"), (63, 63, "narrow")]),
        (conv(32, 64, 1, size=112), False, [(127, 63, "direct")] * 3),
        (conv(160, 960, 1, size=7), True, [(63, 63, "fip"), (63, 63, "direct"), (63, 31, "narrow")]),
        (linear(384, 1536, 197), True, [(63, 63, "fip"), (63, 63, "direct"), (63, 31, "narrow")]),
        (linear(4096, 4096, 1), False, [(127, 63, "direct"), (127, 63, "direct"), (63, 63, "narrow")]),
    ],
    ids=lambda value: value.key if isinstance(value, LayerShape) else "",
)  # fmt: skip
def test_widths_of_usual_layers(shape: LayerShape, signed: bool, expected: list[tuple[int, int, str]]) -> None:
    found = [target_width(shape, signed, target) for target in (VNNI, FULL, AVX2)]
    assert [(w.amax, w.wmax, w.mechanism) for w in found] == expected
    assert found[0].summary() == {"amax": expected[0][0], "wmax": expected[0][1], "mechanism": expected[0][2]}


def test_what_keeps_a_kernel_from_a_layer_makes_it_wide() -> None:
    shape = conv(256, 256)
    assert target_width(shape, False, VNNI, one_shift=False).mechanism == "direct"  # shifts per output: read back
    ragged = target_width(shape, False, VNNI, group_size=12)  # groups that do not begin at multiples of eight
    assert (ragged.amax, ragged.wmax, ragged.mechanism) == (63, 14, "winograd")
    deep = target_width(conv(4096, 256), False, VNNI)  # four times its sums may leave int32
    assert deep.mechanism == "fip"
    one_dimensional = LayerShape(
        op="conv", in_channels=256, out_channels=256, in_size=(64,), out_size=(64,), kernel=(3,), stride=(1,), padding=(1,),
        dilation=(1,),
    )  # fmt: skip
    assert target_width(one_dimensional, False, AVX2).mechanism == "direct"
    depthwise = target_width(conv(256, 256, groups=256), False, VNNI)
    assert depthwise.mechanism == "direct"


@given(
    channels=st.sampled_from([3, 16, 24, 64, 96, 128, 256, 1024, 4096]), outputs=st.sampled_from([8, 64, 128, 512]),
    kernel=st.sampled_from([0, 1, 3, 5]), stride=st.integers(1, 2), size=st.sampled_from([1, 7, 56]), signed=st.booleans(),
    target=st.sampled_from(sorted(MECHANISMS_OF)), group_size=st.sampled_from([4, 16, 12]), one_shift=st.booleans(),
)  # fmt: skip
def test_the_pair_is_exact_never_below_4_bits_and_nothing_better_is(
    channels: int, outputs: int, kernel: int, stride: int, size: int, signed: bool, target: str, group_size: int,
    one_shift: bool,
) -> None:  # fmt: skip
    shape = conv(channels, outputs, kernel, stride, size) if kernel else linear(channels, outputs, size)

    def exact(amax: int, wmax: int) -> frozenset[str]:
        bound = amax * wmax * shape.depth  # of shifts of 0; a larger one only takes Winograd away
        return exact_mechanisms(
            amax, wmax, signed, shape.kernel, shape.stride, dilation=shape.dilation, accumulator_bound=bound
        )

    four = low_limit(4, signed), low_limit(4, True)
    width = target_width(shape, signed, target, group_size=group_size, one_shift=one_shift)
    assert width.amax >= four[0] and width.wmax >= four[1]
    assert width.mechanism in exact(width.amax, width.wmax) and width.mechanism in exact(*four)
    error = width.amax**-2 + width.wmax**-2
    for amax, wmax in candidate_widths(signed):
        if amax**-2 + wmax**-2 < error:
            assert width.mechanism not in exact(amax, wmax)
    if width.mechanism == "direct":
        assert (width.amax, width.wmax) == (low_limit(7, signed), low_limit(7, True))


def test_of_equal_errors_the_narrower_weights_are_taken() -> None:
    pairs = candidate_widths(True)
    assert pairs.index((63, 31)) + 1 == pairs.index((31, 63))


def test_settings_go_together() -> None:
    plain = QuantizeConfig()
    assert (plain.target, plain.low_bits, plain.group_size, plain.four_bits) == ("cpu", "auto", 16, False)
    for target in FOUR_BITS:
        config = QuantizeConfig(target=target)
        assert config.four_bits and config.activation_bits == config.weight_bits == 4
    # Group sizes that a machine needs, unless one is given.
    assert [QuantizeConfig(target=t).group_size for t in ("paper", "npu", "cuda", "avx2")] == [16, 64, 32, 16]
    assert QuantizeConfig(target="npu", group_size=16).group_size == 16
    assert QuantizeConfig(target="npu").updated(seed=1).group_size == 64
    # A number goes before every target, and then weights may differ.
    five = QuantizeConfig(target="avx2", low_bits=5, low_bits_weights=4)
    assert (five.activation_bits, five.weight_bits) == (5, 4)
    assert QuantizeConfig(target="paper", low_bits_weights=6).weight_bits == 6
    with pytest.raises(ConfigError, match="give low_bits a number beside low_bits_weights"):
        QuantizeConfig(low_bits_weights=6)
    with pytest.raises(ConfigError, match=r"QuantizeConfig\.target: Input should be 'cpu', 'paper', .*got 'toaster'"):
        QuantizeConfig(target="toaster")


def test_the_paper_stays_at_4_bits_beside_a_table() -> None:
    """A table may be there for predicted times only."""
    shape = linear(8, 8, 1)
    times = LayerTimes(shape=shape, seconds={"direct": 1.0})
    table = LatencyTable(target="t", cpu="", isa="", threads=1, batch=1, layers={shape.key: times})
    assert QuantizeConfig(target="paper", latency_table=table).four_bits
