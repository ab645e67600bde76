"""Packing is lossless and unpacking bounded."""

from __future__ import annotations

import contextlib
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.artifact import packing
from bitdial.artifact.packing import (
    deflate,
    inflate,
    pack_ints,
    pack_nibbles,
    pack_signed,
    packed_size,
    unpack_ints,
    unpack_nibbles,
    unpack_signed,
)
from bitdial.errors import ArtifactError


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_int32_come_back(values):
    array = np.array(values, np.int32)
    assert unpack_ints(pack_ints(array), np.int32).tolist() == values
    assert len(pack_ints(array)) == array.nbytes


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40))
def test_int64_come_back(values):
    assert unpack_ints(pack_ints(np.array(values, np.int64)), np.int64).tolist() == values


@given(st.lists(st.integers(0, 15), max_size=40))
def test_nibbles_come_back(values):
    packed = pack_nibbles(np.array(values, np.uint8))
    assert len(packed) == -(-len(values) // 2)
    assert unpack_nibbles(packed, len(values)).tolist() == values


@given(st.data(), st.integers(2, 8))
@settings(max_examples=60)
def test_signed_values_come_back_at_every_width(data, bits):
    limit = 2 ** (bits - 1)
    values = data.draw(st.lists(st.integers(-limit, limit - 1), max_size=70))
    packed = pack_signed(np.array(values, np.int8), bits)
    assert len(packed) == packed_size(len(values), bits)
    assert unpack_signed(packed, len(values), bits).tolist() == values


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_packing_in_chunks_leaves_no_seam(monkeypatch, bits):
    values = np.random.default_rng(0).integers(-3, 4, 83).astype(np.int8)
    whole = pack_signed(values, bits)
    monkeypatch.setattr(packing, "_CHUNK", 16)
    assert (pack_signed(values, bits) == whole).all()
    assert (unpack_signed(whole, 83, bits) == values).all()


def test_four_bit_values_are_nibbles_lowest_first():
    assert pack_signed(np.array([1, -1, 7, -7], np.int8), 4).tolist() == [0xF1, 0x97]


@given(st.binary(max_size=300))
def test_deflate_comes_back_and_has_one_size(data):
    stream = deflate(data)
    assert inflate(stream, len(data), "t") == data
    for size in {len(data) + 1, max(len(data) - 1, 0), 10**12} - {len(data)}:
        with pytest.raises(ArtifactError, match="packed table"):
            inflate(stream, size, "t")


def test_a_bomb_is_refused_without_unpacking_it():
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(50_000_000)) + compressor.flush()
    with pytest.raises(ArtifactError):
        inflate(np.frombuffer(bomb, np.uint8), 100, "t")


@given(st.binary(max_size=60), st.integers(0, 100))
def test_inflating_anything_ends_in_the_typed_error(data, size):
    with contextlib.suppress(ArtifactError):
        assert len(inflate(np.frombuffer(data, np.uint8), size, "t")) == size
