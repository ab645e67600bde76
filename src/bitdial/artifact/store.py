"""Saving, loading, verifying and inspecting .bitdial files."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from bitdial.artifact.band import restrict_to_band
from bitdial.artifact.checks import check_program
from bitdial.artifact.container import Header, digest, read_header, read_tensor, write_container
from bitdial.artifact.decode import decode_program
from bitdial.artifact.encode import encode_program
from bitdial.artifact.jsontext import Fields, dump_canonical, parse_bounded
from bitdial.artifact.migrate import CURRENT_VERSION, migrate, parse_version
from bitdial.errors import ArtifactError
from bitdial.files import write_atomically
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
FORMAT = "bitdial"
_FORMATS = (FORMAT, "flexiq")  # the second: files written before the project took its name; same contents
_METADATA_KEYS = {"format", "version", "manifest", "manifest_sha256"}
_PARTS = {
    "layers": "weights", "tables": "tables", "scalars": "tables", "constants": "float_leftovers", "lengths": "float_leftovers",
}  # fmt: skip


@dataclass(frozen=True)
class SaveSummary:
    """Sizes of a written file, in bytes; `total` is the file's, the five before it add up to it.

    weights: 8-bit weights of quantized layers, packed where a band leaves only low ones. low_planes: low weights that are
    integers of their own, packed. tables: bias, shifts, low masks, scales, factors,
    256-entry tables, as stored. float_leftovers: constants of what runs in float. manifest: the header with graph and
    hashes.
    int8_weights: what the weights of the quantized layers would take at one byte each.
    """

    path: str
    weights: int
    low_planes: int
    tables: int
    float_leftovers: int
    manifest: int
    total: int
    int8_weights: int

    @property
    def overhead(self) -> float:
        """Total over int8 weights plus float leftovers; the goal is at most 1.05 from 5 MB of weights on."""
        return self.total / max(self.int8_weights + self.float_leftovers, 1)


def save_program(
    program: Program, path: str | os.PathLike[str], *, band: tuple[float, float] | None = None
) -> SaveSummary:
    """Write a program to one .bitdial file, whole or not at all; an existing file is replaced in one step.

    band: (lowest, highest) ratio to keep, within 0..1. Groups low at every ratio kept are stored packed at the low
    width; other ratios are gone from the file. Equal programs give equal bytes (with one zlib version).
    Raises ArtifactError for a program that breaks its rules (such a file would not load), ConfigError for a band
    without a ratio of the program, OutputError if the file cannot be written.
    """
    data = to_bytes(program, band=band)
    write_atomically(path, data)
    header = read_header(io.BytesIO(data), str(path))
    weights = sum(layer.weight.size for layer in program.layers.values() if layer.weight is not None)
    return SaveSummary(path=str(path), total=len(data), int8_weights=weights, **_sizes(header))


def to_bytes(program: Program, *, band: tuple[float, float] | None = None) -> bytes:
    """The bytes of the file that `save_program` writes. Raises ArtifactError and ConfigError as it does."""
    with _only_artifact_errors("program"):
        program = replace(program, ratios=[float(r) for r in program.ratios])
        check_program(program, "program")
    if band is not None:
        program = restrict_to_band(program, band)
    with _only_artifact_errors("program"):
        manifest, tensors = encode_program(program)
        text = dump_canonical(manifest)
        metadata = {
            "format": FORMAT,
            "version": str(CURRENT_VERSION),
            "manifest": text,
            "manifest_sha256": digest(text.encode("ascii")),
        }
        return write_container(tensors, metadata)


def load_program(path: str | os.PathLike[str]) -> Program:
    """Read a .bitdial file. Needs no torch.

    Raises ArtifactVersionError if a newer bitdial wrote it, ArtifactError for anything else: no such file, truncated,
    tampered with, malformed, NaN, unknown operator, inconsistent.
    """
    with _open(path) as stream:
        return _load(stream, str(path))


def from_bytes(data: bytes, where: str = "artifact") -> Program:
    """The program in the bytes of a file; errors as with `load_program`, naming `where`."""
    return _load(io.BytesIO(data), where)


def verify_file(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a file: one text per damaged tensor, then the error of loading it. Empty means sound."""
    findings: list[str] = []
    try:
        with _open(path) as stream, _only_artifact_errors(str(path)):
            contents = _read(stream, str(path))
            findings += contents.damaged
        if not findings:
            load_program(path)
    except ArtifactError as error:
        findings.append(str(error))
    return findings


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Version, sizes and contents of a file, JSON-able; reads damaged tensors too, and says so.

    {"path", "version", "hashes_ok", "damaged": [text], "sizes": {"weights", "low_planes", "tables", "manifest",
    "float_leftovers", "total"} in bytes, "tables": {kind: bytes}, "layers", "packed_layers", "plane_layers", "ratios",
    "lengths" (shorter ones), "band", "extraction", "nested", "provenance", "curve"}. Raises ArtifactError as `load_program`
    does where the header or the manifest is unreadable.
    """
    with _open(path) as stream, _only_artifact_errors(str(path)):
        contents = _read(stream, str(path))
        manifest, _ = migrate(contents.version, contents.manifest, contents.tensors, str(path))
    header = contents.header
    steps = [step for step in manifest.get("instructions", []) if isinstance(step, dict)]
    layers = [step["layer"] for step in steps if isinstance(step.get("layer"), dict)]
    provenance = manifest.get("provenance")
    return {
        "path": str(path),
        "version": contents.version,
        "hashes_ok": not contents.damaged,
        "damaged": contents.damaged,
        "sizes": {**_sizes(header), "total": header.file_size},
        "tables": {
            name.partition("/")[2]: entry.end - entry.begin
            for name, entry in header.entries.items()
            if _PARTS.get(name.partition("/")[0]) == "tables"
        },
        "layers": len(layers),
        "packed_layers": sum(layer.get("packed") is True for layer in layers),
        "plane_layers": sum(layer.get("plane") is True for layer in layers),
        "ratios": manifest.get("ratios"),
        "lengths": [row.get("length") for row in manifest.get("lengths", []) if isinstance(row, dict)],
        "band": provenance.get("band") if isinstance(provenance, dict) else None,
        "extraction": manifest.get("extraction"),
        "nested": manifest.get("nested"),
        "provenance": provenance,
        "curve": manifest.get("curve"),
    }


@dataclass
class _Contents:
    """A file's version, header, manifest without "tensors", tensors, and a text per tensor that is damaged."""

    version: int
    header: Header
    manifest: dict[str, Any]
    tensors: dict[str, Array]
    damaged: list[str]


def _load(stream: BinaryIO, where: str) -> Program:
    with _only_artifact_errors(where):
        contents = _read(stream, where)
        if contents.damaged:
            raise ArtifactError(contents.damaged[0])
        manifest, tensors = migrate(contents.version, contents.manifest, contents.tensors, where)
        return decode_program(manifest, tensors, contents.header.file_size, where)


def _read(stream: BinaryIO, where: str) -> _Contents:
    """Header, manifest and tensors, compared with the hashes; nothing is interpreted yet."""
    header = read_header(stream, where)
    metadata = header.metadata
    if metadata.get("format") not in _FORMATS:
        raise ArtifactError(
            f"{where}: a safetensors file, but not one of bitdial; export the model with bitdial's `save`"
        )
    version = parse_version(metadata.get("version", ""), where)
    if metadata.keys() != _METADATA_KEYS:
        raise ArtifactError.damaged(where, "metadata are missing or unknown")
    text = metadata["manifest"].encode("utf-8", "replace")
    if digest(text) != metadata["manifest_sha256"]:
        raise ArtifactError.damaged(where, "the manifest is not the one that was saved (sha256)")
    manifest = parse_bounded(text, f"{where}: manifest")
    recorded = Fields(manifest, f"{where}: manifest").mapping("tensors")
    del manifest["tensors"]
    if recorded.keys() != header.entries.keys():
        odd = sorted(recorded.keys() ^ header.entries.keys())[0]
        raise ArtifactError(f"{where}: tensor '{odd:.100}' is in only one of header and manifest; get a sound copy")
    tensors: dict[str, Array] = {}
    damaged = []
    for name, entry in header.entries.items():
        tensors[name], found = read_tensor(stream, header, name, where)
        if recorded[name] != [entry.dtype, list(entry.shape), found]:
            damaged.append(
                f"{where}: tensor '{name:.100}' is not the one that was saved (dtype, shape or sha256); get a sound "
                "copy of the file"
            )
    return _Contents(version, header, manifest, tensors, damaged)


def _sizes(header: Header) -> dict[str, int]:
    """Bytes by part; they add up to the file's size."""
    sizes = {"weights": 0, "low_planes": 0, "tables": 0, "float_leftovers": 0, "manifest": header.data_start}
    for name, entry in header.entries.items():
        part = "low_planes" if name.endswith("/low_plane") else _PARTS.get(name.partition("/")[0], "tables")
        sizes[part] += entry.end - entry.begin
    return sizes


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file for reading, if it is a regular one (opening a pipe would wait for its other end)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArtifactError(f"{path}: no regular file; give the path of a .bitdial file")
        stream = Path(path).open("rb")  # noqa: SIM115 (closed below)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ArtifactError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    with stream:
        yield stream


@contextmanager
def _only_artifact_errors(where: str) -> Iterator[None]:
    """Whatever a malformed file or program trips over becomes an ArtifactError.

    The checks name what they find; this is for what they have overlooked, so that no caller meets a bare KeyError.
    """
    try:
        yield
    except ArtifactError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ArtifactError(f"{where}: malformed ({type(error).__name__}: {error!s:.200}); get a sound copy") from error
