"""Low weights that are integers of their own: stored once, packed, for the groups that are low at some ratio."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.artifact import from_bytes, inspect_file, restrict_to_band, save_program, to_bytes
from bitdial.artifact.packing import packed_size, signed_bits
from bitdial.artifact.weights import settled, weight_mask
from bitdial.errors import ArtifactError
from bitdial.quantization.weights import largest_magnitudes, low_integers, per_weight, read_back_weights


def with_planes(program, seed=0):
    """Random low weights for every eligible layer, as large as its limit and 127 allow."""
    rng = np.random.default_rng(seed)
    for layer in program.layers.values():
        if layer.eligible:
            shape = layer.weight.shape
            room = np.broadcast_to(np.minimum(layer.wmax, 127 >> per_weight(layer, layer.weight_shift)), shape).astype(int)
            layer.low_weight = rng.integers(-room, room + 1).astype(np.int8)
    return program


def multiplied(layer, index):
    """What a layer multiplies with at a ratio index, read back: int8, shape of its weight."""
    return np.where(weight_mask(layer, layer.low[index]), read_back_weights(layer), layer.weight)


@given(
    st.integers(0, 10**6), st.sampled_from(["output", "block", "group"]), st.booleans(), st.sampled_from([1, 3, 7, 14, 63]),
    st.sampled_from([None, (0.0, 0.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (1.0, 1.0)]),
)  # fmt: skip
@settings(max_examples=25)
def test_random_planes_come_back(make_program, assert_same, seed, granularity, nested, wmax, band):
    program = with_planes(make_program(seed, granularity, nested, wmax=wmax), seed)
    data = to_bytes(program, band=band)
    loaded = from_bytes(data)
    assert to_bytes(loaded) == data
    if band is None:
        assert_same(program.with_layers({n: settled(v) for n, v in program.layers.items()}), loaded)
    else:
        assert_same(restrict_to_band(program, band), loaded)
    keep = [program.ratios.index(r) for r in loaded.ratios]
    for name, layer in program.layers.items():
        other = loaded.layers[name]
        if layer.weight is None:
            continue
        for new, old in enumerate(keep):
            assert (multiplied(other, new) == multiplied(layer, old)).all()
        some = weight_mask(layer, layer.low[keep].any(axis=0))
        assert (other.low_weight is None) == (layer.low_weight is None or not some.any())
        if other.low_weight is not None:
            assert (other.low_weight[some] == layer.low_weight[some]).all()
            other.low_weight = other.low_weight.copy()
            plane, other.low_weight = other.low_weight, None
            assert (plane[~some] == low_integers(other)[~some]).all()  # whole, as if nothing had been stored


@pytest.mark.parametrize("wmax", [7, 14])
def test_a_plane_takes_its_bits_once(make_program, tmp_path, wmax):
    program = with_planes(make_program(wmax=wmax))
    own = [layer for layer in program.layers.values() if layer.eligible]
    bare = save_program(make_program(wmax=wmax), tmp_path / "bare.bitdial")
    full = save_program(program, tmp_path / "full.bitdial")
    half = save_program(program, tmp_path / "half.bitdial", band=(0.0, 0.5))
    low = save_program(program, tmp_path / "low.bitdial", band=(1.0, 1.0))
    never = save_program(program, tmp_path / "never.bitdial", band=(0.0, 0.0))

    def planes(index):
        counts = [int(weight_mask(layer, layer.low[index]).sum()) for layer in own]
        return sum(packed_size(count, signed_bits(wmax)) for count in counts)

    assert full.weights == bare.weights and bare.low_planes == 0  # nested: the last ratio has all
    assert full.low_planes == low.low_planes == planes(4) and half.low_planes == planes(2) and never.low_planes == 0
    assert low.weights == full.weights - sum(layer.weight.size for layer in own)  # no 8-bit weights, and nothing twice
    for summary in (full, half, low, never):
        parts = summary.weights + summary.low_planes + summary.tables + summary.float_leftovers + summary.manifest
        assert summary.total == parts
    report = inspect_file(tmp_path / "full.bitdial")
    assert report["plane_layers"] == len(own) and report["sizes"]["low_planes"] == full.low_planes
    assert report["packed_layers"] == 0 and inspect_file(tmp_path / "low.bitdial")["packed_layers"] == len(own)


def test_weights_changed_after_banding_are_not_lost(make_program, assert_same):
    program = restrict_to_band(with_planes(make_program()), (1.0, 1.0))
    program.layers["fc"].weight[0, 0] ^= 1
    assert_same(program, from_bytes(to_bytes(program)))


def test_the_largest_weights_count_groups_that_go_low(make_program):
    layer = with_planes(make_program()).layers["fc"]
    layer.low[:, 0] = False
    layer.low_weight[...] = 0
    layer.low_weight[3, :] = np.minimum(layer.wmax, 127 >> per_weight(layer, layer.weight_shift)[3])
    plain = np.abs(layer.weight.astype(int))
    found, back = largest_magnitudes(layer), np.abs(read_back_weights(layer).astype(int))
    first = slice(0, layer.group_bounds[1])
    assert (found[:, first] == plain[:, first]).all()
    assert (found[3, layer.group_bounds[1] :] == np.maximum(plain, back)[3, layer.group_bounds[1] :]).all()


def change(name, **changes):
    def edit(program):
        for key, value in changes.items():
            setattr(program.layers[name], key, value(program.layers[name]) if callable(value) else value)

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (change("fc", low_weight=lambda v: np.full(v.weight.shape, v.wmax + 1, np.int8)), "low weight is beyond 7"),
        (change("fc", low_weight=lambda v: np.full(v.weight.shape, -128, np.int8)), "low weight is beyond 7"),
        (change("fc", low_weight=lambda v: v.low_weight.astype(np.int16)), "low_weight is not int8"),
        (change("fc", low_weight=lambda v: v.low_weight[1:]), "low_weight is not int8"),
        (change("attention", low_weight=np.zeros(1, np.int8)), "attention.*low_weight"),
        (
            change("fc", low_weight=lambda v: np.full(v.weight.shape, 7, np.int8), weight_shift=lambda v: v.weight_shift * 0 + 5),
            "shifted back is beyond 127",
        ),
        (change("fc", accumulator_bound=100), "fc.*beyond its accumulator_bound"),
    ],
)
def test_planes_that_cannot_be_are_neither_written_nor_read(make_program, monkeypatch, edit, match):
    from bitdial.artifact import store

    program = with_planes(make_program())
    edit(program)
    with pytest.raises(ArtifactError, match=match):
        to_bytes(program)
    if "not int8" in match or "attention" in match or "beyond 7" in match:
        return  # a file cannot say it, or says another value in so few bits
    monkeypatch.setattr(store, "check_program", lambda program, where: None)
    with pytest.raises(ArtifactError, match=match):
        from_bytes(to_bytes(program))


def test_a_stored_value_beyond_the_limit_is_refused(make_program, monkeypatch):
    from bitdial.artifact import weights

    program = with_planes(make_program())
    monkeypatch.setattr(weights, "pack_signed", lambda low, bits: np.full(-(-len(low) * bits // 8), 0x88, np.uint8))
    data = to_bytes(program)  # every value -8
    with pytest.raises(ArtifactError, match="low weight is beyond 7"):
        from_bytes(data)
    with pytest.raises(ArtifactError, match="low weight is beyond 7"):
        from_bytes(to_bytes(program, band=(1.0, 1.0)))
