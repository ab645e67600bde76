"""Lossless packing of small integer tables and narrow weights. Pure functions over arrays, NumPy and zlib only."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ArtifactError
from bitdial.quantization.effective_bits import extract

Bytes = npt.NDArray[np.uint8]
_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY)
_CHUNK = 2**18  # values packed at a time, so that the unpacked bits of a large layer never lie in memory at once
_MAX_EXPANSION = 1040  # DEFLATE cannot expand by more than 1032; above it a declared size is a lie


def deflate(data: bytes) -> Bytes:
    """Raw DEFLATE stream, uint8, by whichever strategy gives the fewest bytes."""
    streams = []
    for strategy in _STRATEGIES:
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        streams.append(compressor.compress(data) + compressor.flush())
    return np.frombuffer(min(streams, key=len), dtype=np.uint8)


def inflate(stream: Bytes, size: int, where: str) -> bytes:
    """Undo `deflate`, giving exactly `size` bytes; never allocates more than that.

    Raises ArtifactError if the stream is broken, holds fewer or more bytes, or is followed by others.
    """
    broken = ArtifactError.damaged(where, f"the packed table is broken or not of {size} bytes")
    if size > _MAX_EXPANSION * (len(stream) + 1):
        raise broken
    decompressor = zlib.decompressobj(-15)
    try:
        data = decompressor.decompress(stream.tobytes(), size + 1)  # one more than allowed shows a longer stream
    except zlib.error as error:
        raise broken from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise broken
    return data


def pack_ints(values: npt.NDArray[Any]) -> bytes:
    """1-D int32 or int64 -> bytes of equal size that compress well when the values are small.

    Zigzag (0, -1, 1, -2 .. -> 0, 1, 2, 3 ..), then all lowest bytes, all second bytes, and so on.
    """
    bits = values.dtype.itemsize * 8
    unsigned = values.astype(f"<u{bits // 8}")
    sign = np.where(values < 0, unsigned.dtype.type(2**bits - 1), unsigned.dtype.type(0))
    zigzag = ((unsigned << unsigned.dtype.type(1)) ^ sign).astype(unsigned.dtype)
    planes: Bytes = zigzag.view(np.uint8).reshape(len(values), bits // 8)
    return planes.T.tobytes()


def unpack_ints(data: bytes, dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """Undo `pack_ints`."""
    width = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, dtype=np.uint8).reshape(width, -1)
    zigzag = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1)
    one = zigzag.dtype.type(1)
    bits = ((zigzag >> one) ^ (~(zigzag & one) + one)).astype(f"<u{width}")
    return np.asarray(bits.view(f"<i{width}"), dtype)


def pack_nibbles(values: Bytes) -> bytes:
    """1-D uint8 below 16 -> two to a byte, the first in the low half; an odd count is padded with 0."""
    padded = np.append(values, np.zeros(len(values) % 2, np.uint8))
    return bytes((padded[0::2] | (padded[1::2] << 4)).astype(np.uint8))


def unpack_nibbles(data: bytes, count: int) -> Bytes:
    """Undo `pack_nibbles`."""
    packed = np.frombuffer(data, dtype=np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count].astype(np.uint8)


def signed_bits(limit: int) -> int:
    """Bits of a signed value of magnitude at most `limit`: 4 for 7."""
    return 1 + limit.bit_length()


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack_signed` gives."""
    return -(-count * bits // 8)


def pack_signed(values: npt.NDArray[np.int8], bits: int) -> Bytes:
    """1-D int8 -> uint8 [ceil(len * bits / 8)]: two's complement of `bits` bits each, lowest bit first, no gaps."""
    parts = [np.zeros(0, np.uint8)]
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].view(np.uint8)
        planes = (chunk[:, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
        parts.append(np.packbits(planes.reshape(-1), bitorder="little"))
    return np.concatenate(parts)


def unpack_signed(packed: Bytes, count: int, bits: int) -> npt.NDArray[np.int8]:
    """Undo `pack_signed`."""
    values = np.zeros(count, np.uint8)
    sign = np.uint8(1 << (bits - 1))
    for start in range(0, count, _CHUNK):
        chunk = values[start : start + _CHUNK]
        first = start * bits // 8  # whole: a chunk is a multiple of 8 values
        planes = np.unpackbits(packed[first:], count=len(chunk) * bits, bitorder="little").reshape(-1, bits)
        for bit in range(bits):
            chunk |= planes[:, bit] << np.uint8(bit)
        chunk ^= sign
        chunk -= sign
    return values.view(np.int8)


def extract_weights(weights: npt.NDArray[np.int8], shift: npt.NDArray[np.uint8], limit: int) -> npt.NDArray[np.int8]:
    """`effective_bits.extract` of many weights (1-D, shift of the same length), a chunk at a time to bound its memory."""
    low = np.empty_like(weights)
    for start in range(0, len(weights), _CHUNK):
        part = slice(start, start + _CHUNK)
        low[part] = extract(weights[part], shift[part], limit, signed=True)
    return low


def read_back(low: npt.NDArray[np.int8], shift: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """8-bit weights that stand for packed low values (1-D, shift of the same length): low << shift, within -127..127.

    They extract to `low` again: the only value beyond 127 that an extracted weight reaches is 128, and 127 rounds up to it.
    """
    weights = np.empty_like(low)
    for start in range(0, len(low), _CHUNK):
        part = slice(start, start + _CHUNK)
        weights[part] = np.clip(low[part].astype(np.int16) << shift[part].astype(np.int16), -127, 127)
    return weights
