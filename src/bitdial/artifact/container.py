"""The outer file format: safetensors, written with fixed bytes and read within bounds.

A safetensors file is: the header's length (uint64, little endian), the header (JSON: tensor name -> dtype, shape,
[begin, end) in the data; "__metadata__" -> strings), the data. The files written here are plain safetensors files that
the safetensors library reads; it is not used itself because its writer orders metadata by chance and its reader trusts
more than a file from elsewhere deserves.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitdial.artifact.jsontext import MAX_JSON_BYTES, dump_canonical, parse_bounded
from bitdial.errors import ArtifactError

Array = npt.NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"), "BF16": np.dtype("<u2"),  # bit patterns of bfloat16
}  # fmt: skip
_CODES = {dtype.newbyteorder("="): code for code, dtype in DTYPES.items()}
_MAX_RANK = 16
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: safetensors dtype code, shape, byte range in the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: metadata strings, entries by name in the order of the data, total size, start of the data."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    data_start: int
    file_size: int


def dtype_code(array: Array, where: str) -> str:
    """safetensors dtype code of an array. Raises ArtifactError for a dtype that is not stored."""
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise ArtifactError(
            f"{where}: dtype {array.dtype} cannot be stored; convert it to float32, int64, int32 or bool"
        )
    return code


def tensor_bytes(array: Array, where: str) -> bytes:
    """Little-endian bytes in C order."""
    return array.astype(DTYPES[dtype_code(array, where)], copy=False).tobytes()


def digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def write_container(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The whole file as bytes; equal inputs give equal bytes. Raises ArtifactError if the header grows too large.

    Tensors are laid out by falling item size, then by name, so that each is aligned to its item size.
    """
    blobs: list[bytes] = []
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        blob = tensor_bytes(tensors[name], f"tensor '{name}'")
        end = position + len(blob)
        header[name] = {
            "dtype": dtype_code(tensors[name], name),
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        blobs.append(blob)
        position = end
    text = dump_canonical(header).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_JSON_BYTES:
        raise ArtifactError(
            f"the header takes {len(text)} bytes, more than the {MAX_JSON_BYTES} allowed; shorten provenance and curve"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])


def read_header(stream: BinaryIO, where: str) -> Header:
    """Read and check the header. Nothing is allocated before its size has been compared with the file's.

    Raises ArtifactError: truncated file, header longer than file or cap, malformed JSON, unknown dtype, a size that
    does not fit shape and dtype, tensors that overlap, leave gaps or do not end with the file.
    """
    file_size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise ArtifactError(
            f"{where}: only {file_size} bytes, so no .bitdial file or a truncated one; copy or save it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_JSON_BYTES, file_size - 8):
        raise ArtifactError(
            f"{where}: the header claims {length} bytes but the file has {file_size} (at most {MAX_JSON_BYTES} are "
            "allowed for it); this is no .bitdial file or a truncated one: copy or save it again"
        )
    text = stream.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise ArtifactError(f"{where}: the header is no JSON object; this is no .bitdial file: copy or save it again")
    header = parse_bounded(text, f"{where}: header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(
            f"{where}: the header has no metadata, so this is no .bitdial file; export the model with `save`"
        )
    entries = {name: _entry(value, f"{where}: tensor '{name:.80}'") for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise ArtifactError(f"{where}: tensor '{name:.80}' overlaps another or leaves a gap; get a sound copy")
        position = entry.end
    data_start = 8 + length
    if data_start + position != file_size:
        raise ArtifactError(
            f"{where}: the tensors need {data_start + position} bytes but the file has {file_size}; it was truncated "
            "or added to: copy or save it again"
        )
    return Header(metadata, ordered, data_start, file_size)


def _entry(value: Any, where: str) -> Entry:
    broken = ArtifactError.damaged(where, "malformed entry in the header")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise broken
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES or not isinstance(shape, list) or not isinstance(offsets, list):
        raise broken
    numbers = [*shape, *offsets]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers):
        raise broken
    if (
        len(offsets) != 2
        or len(shape) > _MAX_RANK
        or math.prod(shape) * DTYPES[code].itemsize != offsets[1] - offsets[0]
    ):
        raise broken
    return Entry(code, tuple(shape), offsets[0], offsets[1])


def read_tensor(stream: BinaryIO, header: Header, name: str, where: str) -> tuple[Array, str]:
    """One tensor (its own, writable memory) and the sha256 of its bytes. Raises ArtifactError."""
    entry = header.entries[name]
    buffer = bytearray(entry.end - entry.begin)  # within the file's size, as `read_header` has checked
    stream.seek(header.data_start + entry.begin)
    view = memoryview(buffer)
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise ArtifactError(f"{where}: the file ends within tensor '{name:.80}'; copy or save it again")
        filled += count
    if entry.dtype == "BOOL" and buffer and max(buffer) > 1:
        raise ArtifactError.damaged(where, f"tensor '{name:.80}' holds bytes that are no booleans")
    return np.frombuffer(buffer, dtype=DTYPES[entry.dtype]).reshape(entry.shape), digest(buffer)
