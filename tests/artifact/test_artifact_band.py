"""Bands: low groups stored at the low width, with the same answers at the ratios that remain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.artifact import from_bytes, inspect_file, load_program, restrict_to_band, save_program, to_bytes
from bitdial.artifact.packing import signed_bits
from bitdial.artifact.weights import weight_shifts
from bitdial.errors import ArtifactError, ConfigError
from bitdial.quantization.effective_bits import extract


def extracted(layer, ratio_index):
    """What a layer multiplies with at a ratio, by plain loops: low values in low groups, 8-bit ones elsewhere."""
    result = np.empty(layer.weight.shape, np.int64)
    per_row = layer.weight.shape[0] // layer.conv_groups
    n_local = layer.n_groups // layer.conv_groups
    groups = layer.channel_groups()
    for o in range(layer.weight.shape[0]):
        for i in range(layer.weight.shape[1]):
            g = groups[o // per_row * layer.weight.shape[1] + i]
            w = layer.weight[o, i]
            if layer.low[ratio_index, g]:
                w = extract(w, layer.weight_shift[o, g - o // per_row * n_local], layer.wmax)
            result[o, i] = w
    return result


@pytest.mark.parametrize("band", [(0.5, 1.0), (1.0, 1.0), (0.25, 0.75), (0.0, 0.5)])
@pytest.mark.parametrize("wmax", [7, 1, 14, 63])
def test_the_ratios_that_remain_compute_the_same(make_program, assert_same, band, wmax):
    program = make_program(4, "block", wmax=wmax)
    keep = [i for i, r in enumerate(program.ratios) if band[0] <= r <= band[1]]
    data = to_bytes(program, band=band)
    loaded = from_bytes(data)
    assert loaded.ratios == [program.ratios[i] for i in keep]
    assert loaded.provenance["band"] == list(band)
    assert [row["ratio"] for row in loaded.curve] == [*loaded.ratios, None]
    for name, layer in program.layers.items():
        other = loaded.layers[name]
        assert (other.bias == layer.bias[keep]).all() and (other.low == layer.low[keep]).all()
        if layer.weight is not None:
            for new, old in enumerate(keep):
                assert (extracted(layer, old) == extracted(other, new)).all()
    assert_same(restrict_to_band(program, band), loaded)
    assert to_bytes(loaded) == data  # packed again when saved again
    assert from_bytes(to_bytes(loaded, band=(band[1], band[1]))).ratios == [band[1]]
    assert len(program.ratios) == 5 and program.layers["fc"].low.shape[0] == 5  # the caller's is not touched


def test_the_weights_of_a_model_that_stays_at_100_percent_take_4_bits(make_program, tmp_path):
    program = make_program()
    full = save_program(program, tmp_path / "full.bitdial")
    middle = save_program(program, tmp_path / "middle.bitdial", band=(0.5, 1.0))
    low = save_program(program, tmp_path / "low.bitdial", band=(1.0, 1.0))
    eligible = sum(layer.weight.size for layer in program.layers.values() if layer.eligible)
    assert low.weights == full.weights - eligible // 2
    assert low.weights < middle.weights < full.weights == full.int8_weights == low.int8_weights
    assert inspect_file(tmp_path / "low.bitdial")["packed_layers"] == 3
    assert inspect_file(tmp_path / "low.bitdial")["band"] == [1.0, 1.0]
    assert load_program(tmp_path / "low.bitdial").layers["conv2"].weight.shape == (12, 10, 3, 3)


def test_weights_changed_after_banding_are_not_lost(make_program, assert_same):
    program = restrict_to_band(make_program(wmax=1), (1.0, 1.0))
    weight = program.layers["fc"].weight.copy()
    weight[0, 0] = 93
    program.layers["fc"].weight = weight
    assert_same(program, from_bytes(to_bytes(program)))


def test_unnested_programs_have_bands_too(make_program, assert_same):
    program = make_program(5, nested=False)
    loaded = from_bytes(to_bytes(program, band=(0.75, 1.0)))
    assert_same(restrict_to_band(program, (0.75, 1.0)), loaded)


@pytest.mark.parametrize("band", [(0.6, 0.7), (0.5, 0.25), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_band_without_ratios_is_a_config_error(make_program, tmp_path, band):
    with pytest.raises(ConfigError, match="band"):
        save_program(make_program(), tmp_path / "m.bitdial", band=band)
    assert not list(tmp_path.iterdir())


def test_packed_values_beyond_the_limit_are_refused(make_program, monkeypatch):
    from bitdial.artifact import weights

    program = make_program()
    monkeypatch.setattr(weights, "pack_signed", lambda low, bits: np.full(-(-len(low) * bits // 8), 0x88, np.uint8))
    data = to_bytes(program, band=(1.0, 1.0))  # every value -8
    with pytest.raises(ArtifactError, match="packed weights"):
        from_bytes(data)


@given(st.integers(-127, 127), st.integers(0, 7), st.integers(1, 127))
def test_a_weight_read_back_extracts_to_itself(weight, shift, limit):
    from bitdial.artifact.packing import extract_weights, read_back

    shifts = np.array([shift], np.uint8)
    low = extract_weights(np.array([weight], np.int8), shifts, limit)
    assert low[0] == np.clip(round(weight / 2**shift), -limit, limit)  # Python rounds half to even as well
    assert (extract_weights(read_back(low, shifts), shifts, limit) == low).all()
    assert -(2 ** (signed_bits(limit) - 1)) < low[0] < 2 ** (signed_bits(limit) - 1)


def test_weight_shifts_follow_the_convolution_groups(make_program):
    layer = make_program().layers["conv2"]
    spread = weight_shifts(layer)
    assert layer.group_bounds.tolist() == [0, 4, 8, 10, 14, 18, 20]
    for o in range(12):
        for i in range(10):
            assert (spread[o, i] == layer.weight_shift[o, i // 4]).all()
