"""Labelled pictures in folders and zip files: listing, decoding, and a cache of decoded pixels.

Layout: one sub-folder per class, any file name with a known ending inside; classes are numbered in the order of their
names. A zip file may hold the class folders below one common top folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitdial.errors import DataError, OutputError
from bitdial.files import open_atomically
from bitdial.zoo.preprocessing import Preprocessing

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
MAX_FILE_BYTES = 256 << 20  # a larger member of a zip file is refused before it is unpacked
MAX_DECODED_BYTES = 1 << 30  # larger sets are decoded batch by batch and never cached
SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation"})
_CACHE_FORMAT = "bitdial-images-1"

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class PixelSource(Protocol):
    """Pictures of one size, by index."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""

    def read(self, indices: Labels) -> Pixels:
        """uint8 [len(indices), H, W, C]."""


@dataclass(frozen=True)
class ArrayPixels:
    """Decoded pictures in memory: uint8 [N, H, W, C]."""

    array: Pixels

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.array.shape
        return height, width, channels

    def read(self, indices: Labels) -> Pixels:
        return self.array[indices]


@dataclass(frozen=True)
class ImageEntry:
    """One listed picture: name inside its container, class index, bytes, and a stamp that changes with the content."""

    name: str
    label: int
    size: int
    stamp: str


@dataclass(frozen=True)
class ImageListing:
    """The pictures below a folder or inside a zip file (`path`), sorted by class and name."""

    path: Path
    classes: list[str]
    entries: list[ImageEntry]

    @property
    def labels(self) -> Labels:
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    def fingerprint(self, preprocessing: Preprocessing) -> str:
        """Hash over path, file sizes, modification times and the settings that change the pixels."""
        digest = hashlib.sha256(f"{_CACHE_FORMAT}\n{self.path.resolve()}\n{preprocessing.decode_key()}\n".encode())
        for entry in self.entries:
            line = f"{entry.name}\0{entry.label}\0{entry.size}\0{entry.stamp}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_folder(path: Path) -> ImageListing:
    """Pictures in the class folders of `path`. Raises DataError if there are none."""
    try:
        class_folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [(folder, sorted(p for p in folder.rglob("*") if _is_image(p.name))) for folder in class_folders]
    except OSError as error:
        raise DataError(f"folder {path} cannot be read ({error}); check its name and permissions") from error
    files = [(folder, members) for folder, members in files if members]
    entries: list[ImageEntry] = []
    for label, (_, members) in enumerate(files):
        for member in members:
            stat = member.stat()
            entries.append(ImageEntry(str(member.relative_to(path)), label, stat.st_size, str(stat.st_mtime_ns)))
    if not entries:
        raise DataError(_nothing_found(path))
    return ImageListing(path, [folder.name for folder, _ in files], entries)


def list_zip(path: Path, inner: str = "") -> ImageListing:
    """Pictures in the class folders of a zip file, or of its folder `inner`. Raises DataError if there are none."""
    try:
        stat = path.stat()
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if not i.is_dir() and _is_image(i.filename)]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable zip file ({error}); copy or download it again") from error
    infos = [i for i in infos if not i.filename.startswith("__MACOSX/")]
    parts = {i.filename: PurePosixPath(i.filename).parts for i in infos}
    base = _common_top(list(parts.values()))
    if inner:
        infos = [i for i in infos if parts[i.filename][base : base + 1] == (inner,)]
        base += 1
    infos = [i for i in infos if len(parts[i.filename]) >= base + 2]
    if not infos:
        raise DataError(_nothing_found(path))
    infos.sort(key=lambda i: (parts[i.filename][base], i.filename))
    classes = sorted({parts[i.filename][base] for i in infos})
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    number = {name: index for index, name in enumerate(classes)}
    entries = [
        ImageEntry(i.filename, number[parts[i.filename][base]], i.file_size, f"{i.CRC:08x} {stamp}") for i in infos
    ]
    return ImageListing(path, classes, entries)


def zip_top_folders(path: Path) -> set[str]:
    """Names of the folders at the top of a zip file, below the one common top folder if there is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            images = [n for n in archive.namelist() if _is_image(n) and not n.startswith("__MACOSX/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable zip file ({error}); copy or download it again") from error
    names = [PurePosixPath(n).parts for n in images]
    base = _common_top(names)
    return {parts[base] for parts in names if len(parts) > base + 1}


def open_pixels(listing: ImageListing, preprocessing: Preprocessing, cache_dir: Path | None = None) -> PixelSource:
    """The pictures of a listing, decoded into memory (and into the cache), or decoded on demand if they are very large.

    The cache is one uncompressed .npy file per listing and decoding settings; a damaged or unwritable cache is ignored.
    Raises DataError for a picture that cannot be decoded or whose size differs from the first one's.
    """
    files = FilePixels(listing, preprocessing)
    height, width, channels = files.shape
    shape = (len(files), height, width, channels)
    if int(np.prod(shape, dtype=np.int64)) > MAX_DECODED_BYTES:
        return files
    folder = cache_directory() if cache_dir is None else cache_dir
    cached = folder / f"{listing.fingerprint(preprocessing)}.npy"
    stored = _read_cache(cached, shape)
    if stored is None:
        stored = files.read(np.arange(len(files), dtype=np.int64))
        _write_cache(cached, stored)
    return ArrayPixels(stored)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/bitdial, by default ~/.cache/bitdial; not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "bitdial"


class FilePixels:
    """Pictures decoded on demand from a folder or zip file; all must come out at the size of the first."""

    def __init__(self, listing: ImageListing, preprocessing: Preprocessing) -> None:
        self.listing = listing
        self.preprocessing = preprocessing
        _, first = next(self._decode(np.array([0], dtype=np.int64)))
        self._shape = first.shape

    def __len__(self) -> int:
        return len(self.listing.entries)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self._shape
        return height, width, channels

    def read(self, indices: Labels) -> Pixels:
        out = np.empty((len(indices), *self._shape), dtype=np.uint8)
        for row, (entry, pixels) in enumerate(self._decode(indices)):
            if pixels.shape != self._shape:
                raise DataError(
                    f"{self.listing.path}: {entry.name} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the first "
                    f"picture {self._shape[1]} x {self._shape[0]}; give a size so that all are resized to it"
                )
            out[row] = pixels
        return out

    def _decode(self, indices: Labels) -> Iterator[tuple[ImageEntry, Pixels]]:
        for entry, content in _contents(self.listing.path, [self.listing.entries[int(i)] for i in indices]):
            try:
                with Image.open(io.BytesIO(content)) as image:
                    pixels = self.preprocessing.pixels(image)
            except Exception as error:  # Pillow's decoders raise many kinds
                raise DataError(
                    f"{self.listing.path}: {entry.name} is not a readable image ({error}); replace or remove it"
                ) from error
            yield entry, pixels


def _contents(path: Path, entries: list[ImageEntry]) -> Iterator[tuple[ImageEntry, bytes]]:
    for entry in entries:
        if entry.size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {entry.name} is larger than {MAX_FILE_BYTES >> 20} MiB; remove it")
    try:
        if path.is_dir():
            for entry in entries:
                yield entry, (path / entry.name).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                for entry in entries:
                    yield entry, archive.read(entry.name)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or was changed while it was read ({error}); copy it again") from error


def _read_cache(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == shape else None


def _write_cache(path: Path, array: Pixels) -> None:
    # a read-only or full disk costs time at the next load, nothing else
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(path) as file:
            np.save(file, array, allow_pickle=False)


def _is_image(name: str) -> bool:
    pure = PurePosixPath(name)
    return pure.suffix.lower() in IMAGE_ENDINGS and not pure.name.startswith(".")


def _common_top(paths: list[tuple[str, ...]]) -> int:
    """How many leading folders all paths share, short of class and file, and never counting a split's folder."""
    base = 0
    while paths:
        if any(len(parts) < base + 3 for parts in paths) or len({parts[base] for parts in paths}) != 1:
            break
        if paths[0][base] in SPLIT_NAMES:
            break
        base += 1
    return base


def _nothing_found(path: Path) -> str:
    return (
        f"{path} holds no pictures in class folders; put them at CLASS/NAME.jpg inside "
        f"(endings {', '.join(sorted(IMAGE_ENDINGS))})"
    )
