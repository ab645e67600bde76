"""Labelled image sets for evaluation and calibration, from a text the user gives. NumPy only; nothing is unpickled.

DIR                   folder with train/ and test/ (or val/), train.zip and test.zip, or train.npz and test.npz
DIR, FILE.zip         class folders of pictures; split into train and test by a seed
FILE.npz              arrays `images` (uint8 [N, H, W, C] or [N, H, W], or float [N, C, H, W], taken as it is) and
                      `labels` (integers [N]); optional `classes` (names). Split by a seed
digits                scikit-learn's handwritten digits, as 1 x 16 x 16 (see `bitdial.zoo.digits_data`)
torchvision:NAME      a data set class of torchvision with `root` and `train` or `split`, e.g. torchvision:CIFAR10
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError, DataError
from bitdial.zoo.image_files import ArrayPixels, PixelSource, list_folder, list_zip, open_pixels, zip_top_folders
from bitdial.zoo.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "test", "all"]
Labels = npt.NDArray[np.int64]
Images = npt.NDArray[np.float32]

TEST_SHARE = 0.2
# Names under which a data folder may hold each split, in the order they are looked for.
_SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


@dataclass(frozen=True)
class FloatImages:
    """Ready inputs in memory: float32 [N, C, H, W]."""

    array: Images

    def __len__(self) -> int:
        return len(self.array)


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, read in batches. Immutable: subsets share the pixels.

    name           what was loaded, for messages and reports
    classes        class names; labels are indices into it
    source         decoded uint8 pictures (normalised when read), or ready float inputs
    labels         int64 [N]
    indices        int64 [N]; position of each image in the source
    preprocessing  normalisation of uint8 pictures
    """

    name: str
    classes: list[str]
    source: PixelSource | FloatImages
    labels: Labels
    indices: Labels
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        if isinstance(self.source, FloatImages):
            _, channels, height, width = self.source.array.shape
        else:
            height, width, channels = self.source.shape
        return channels, height, width

    def images(self, positions: npt.ArrayLike) -> Images:
        """float32 [len(positions), C, H, W]: preprocessed images at these positions of the set."""
        chosen = self.indices[np.asarray(positions, dtype=np.int64)]
        if isinstance(self.source, FloatImages):
            return self.source.array[chosen]
        return self.preprocessing.normalise(self.source.read(chosen))

    def batches(self, batch_size: int = 100) -> Iterator[tuple[Images, Labels]]:
        """Pairs (images [n, C, H, W], labels [n]) in order; the last batch may be short.

        Raises ConfigError for a batch size below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} must be at least 1")
        for start in range(0, len(self), batch_size):
            positions = np.arange(start, min(start + batch_size, len(self)))
            yield self.images(positions), self.labels[positions]

    def tensors(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(images float32 [k, C, H, W], labels int64 [k]) at positions int64 [k], as training reads them."""
        import torch

        chosen = positions.numpy()
        return torch.from_numpy(self.images(chosen)), torch.from_numpy(self.labels[chosen])

    def array(self) -> Images:
        """All images at once, float32 [N, C, H, W]."""
        return self.images(np.arange(len(self)))

    def subset(self, positions: npt.ArrayLike) -> ImageSet:
        """The images at these positions, in the order given."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(self, labels=self.labels[chosen], indices=self.indices[chosen])

    def shuffled(self, seed: int = 0) -> ImageSet:
        """All images in an order that depends on the seed and the number of images alone."""
        return self.subset(np.random.default_rng(seed).permutation(len(self)))

    def head(self, n: int | None) -> ImageSet:
        """The first `n` images (all, if None or more than there are)."""
        return self if n is None or n >= len(self) else self.subset(np.arange(n))

    def calibration_subset(self, n: int = 256, seed: int = 0) -> ImageSet:
        """`n` images drawn without replacement (the first n of a sorted data set would be of one class).

        Raises DataError if the set has fewer, ConfigError for n < 1.
        """
        if n < 1:
            raise ConfigError(f"the number of calibration images is {n}; it must be at least 1")
        if n > len(self):
            raise DataError(
                f"{self.name} has {len(self)} images, not {n} for calibration; give more data or ask for fewer"
            )
        return self.shuffled(seed).head(n)


def load_dataset(
    spec: str | Path,
    split: Split = "test",
    preprocessing: Preprocessing | None = None,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    root: Path | None = None,
    download: bool = False,
) -> ImageSet:
    """The image set that `spec` names (see the module docstring).

    split          "train", "test", or "all": everything of a set that has no splits of its own (train and test together
                   otherwise). Where one folder or file must be split by `seed`, a fifth of each class is the test part
    preprocessing  None: ImageNet's mean and std, pictures as they are. "digits" and float arrays take none
    cache_dir      decoded pictures of folders and zip files; None: $XDG_CACHE_HOME/bitdial
    root, download where torchvision keeps its data sets, and whether it may fetch them

    Raises DataError for data that are missing, empty, damaged or of another form, ConfigError for settings that
    contradict each other.
    """
    if split not in ("train", "test", "all"):
        raise ConfigError(f"split '{split}' is unknown; use train, test or all")
    text = str(spec)
    if text == "digits":
        return _digits(split, preprocessing, seed)
    settings = preprocessing if preprocessing is not None else Preprocessing()
    if text.startswith("torchvision:"):
        return _torchvision(text.partition(":")[2], split, settings, seed, root, download)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(
            f"data set '{spec}' does not exist; give a folder of pictures, a .zip or .npz file, 'digits' or "
            "torchvision:NAME"
        )
    return _load_path(path, split, settings, seed, cache_dir)


def split_positions(labels: Labels, test_count: int | float, seed: int) -> tuple[Labels, Labels]:
    """Positions of the train and test parts, each sorted, stratified by class.

    test_count: number of test images, or their share if below 1. Class quotas differ from exact proportion by less than
    one image. The result depends on the labels and the seed alone.
    """
    total = round(test_count * len(labels)) if test_count < 1 else int(test_count)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * total / len(labels)
    quota = np.floor(exact).astype(np.int64)
    remainder = total - int(quota.sum())
    quota[np.argsort(-(exact - quota), kind="stable")[:remainder]] += 1
    rng = np.random.default_rng(seed)
    test: list[Labels] = []
    for label, n in zip(classes, quota, strict=True):
        test.append(rng.permutation(np.flatnonzero(labels == label))[:n])
    chosen = np.sort(np.concatenate(test)).astype(np.int64)
    mask = np.ones(len(labels), dtype=bool)
    mask[chosen] = False
    return np.flatnonzero(mask).astype(np.int64), chosen


def _load_path(path: Path, split: Split, settings: Preprocessing, seed: int, cache_dir: Path | None) -> ImageSet:
    places: dict[str, tuple[Path, str] | None] = {}
    remedy = f"add a folder {split}/ to it"
    if path.is_dir():
        places = {name: _split_place(path, name) for name in _SPLIT_FOLDERS}
        remedy = f"add a folder {split}/, {split}.zip or {split}.npz"
    elif path.suffix.lower() == ".zip":
        tops = zip_top_folders(path)
        for name, names in _SPLIT_FOLDERS.items():
            places[name] = next(((path, n) for n in names if n in tops), None)
    if found := [place for place in places.values() if place is not None]:
        if split == "all":
            return _concatenate(path, [_whole(*place, settings, cache_dir) for place in found])
        if (place := places[split]) is None:
            raise DataError(f"{path} has no {split} part beside the other; {remedy}")
        return _whole(*place, settings, cache_dir)
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(f"folder {path} is empty; put pictures at CLASS/NAME.jpg inside, or train/ and test/")
    return _part(_whole(path, "", settings, cache_dir), split, seed)


def _split_place(path: Path, split: str) -> tuple[Path, str] | None:
    names = [end for name in _SPLIT_FOLDERS[split] for end in (name, f"{name}.zip", f"{name}.npz")]
    return next(((path / name, "") for name in names if (path / name).exists()), None)


def _whole(path: Path, inner: str, settings: Preprocessing, cache_dir: Path | None) -> ImageSet:
    suffix = path.suffix.lower()
    if path.is_dir():
        listing = list_folder(path)
    elif suffix == ".zip":
        listing = list_zip(path, inner)
    elif suffix == ".npz":
        return _npz(path, settings)
    else:
        raise DataError(f"{path} is of no supported kind; give a folder of pictures, a .zip or a .npz file")
    source = open_pixels(listing, settings, cache_dir)
    name = f"{path}:{inner}" if inner else str(path)
    return ImageSet(name, listing.classes, source, listing.labels, _all(len(source)), settings)


def _npz(path: Path, settings: Preprocessing) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in ("images", "labels", "classes") if key in archive.files}
            names = archive.files
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable npz file of plain arrays ({error}); use numpy.savez") from error
    if "images" not in found or "labels" not in found:
        raise DataError(f"{path} holds the arrays {sorted(names)}; it needs `images` and `labels`")
    images, labels = found["images"], _integer_labels(found["labels"], str(path))
    if len(images) != len(labels):
        raise DataError(f"{path} holds {len(images)} images and {len(labels)} labels; give one label per image")
    if len(images) == 0:
        raise DataError(f"{path} holds no images; save at least one")
    classes = (
        [str(c) for c in found["classes"]] if "classes" in found else [str(i) for i in range(int(labels.max()) + 1)]
    )
    if int(labels.max()) >= len(classes):
        raise DataError(f"{path}: label {int(labels.max())} has no name among {len(classes)} classes; name them all")
    return ImageSet(str(path), classes, _npz_source(path, images, settings), labels, _all(len(labels)), settings)


def _npz_source(path: Path, images: npt.NDArray[Any], settings: Preprocessing) -> PixelSource | FloatImages:
    if images.dtype == np.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(f"{path}: uint8 images have shape {list(images.shape)}; give [N, H, W, 1 or 3]")
        if images.shape[3] != settings.channels:
            raise DataError(
                f"{path}: images have {images.shape[3]} channels but mean has {settings.channels} numbers; give as many"
            )
        if settings.size is not None and images.shape[1:3] != settings.size:
            images = _resize(images, settings)
        return ArrayPixels(np.ascontiguousarray(images))
    if np.issubdtype(images.dtype, np.floating):
        if images.ndim != 4:
            raise DataError(f"{path}: float images have shape {list(images.shape)}; give [N, C, H, W]")
        if not bool(np.isfinite(images).all()):
            raise DataError(f"{path}: images hold NaN or infinite values; remove them")
        if settings.size is not None and images.shape[2:] != settings.size:
            raise DataError(f"{path}: float images cannot be resized; save them as uint8, or leave size out")
        return FloatImages(np.ascontiguousarray(images, dtype=np.float32))
    raise DataError(f"{path}: images are {images.dtype}; save them as uint8 [N, H, W, C] or float32 [N, C, H, W]")


def _resize(images: npt.NDArray[np.uint8], settings: Preprocessing) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.stack(
        [settings.pixels(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)) for image in images]
    )


def _integer_labels(labels: npt.NDArray[Any], name: str) -> Labels:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name}: labels are {labels.dtype} {list(labels.shape)}; give integers, one per image")
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"{name}: labels go down to {int(labels.min())}; number the classes from 0")
    return labels.astype(np.int64)


def _digits(split: Split, preprocessing: Preprocessing | None, seed: int) -> ImageSet:
    from bitdial.zoo.digits_data import load_digits_arrays

    if preprocessing is not None:
        raise ConfigError("the data set 'digits' comes ready made; leave mean, std and size out")
    images, labels, (train, test) = load_digits_arrays(seed)
    positions = {"train": train, "test": test, "all": _all(len(labels))}[split]
    classes = [str(i) for i in range(10)]
    return ImageSet("digits", classes, FloatImages(images), labels, _all(len(labels)), Preprocessing()).subset(
        positions
    )


def _torchvision(
    name: str, split: Split, settings: Preprocessing, seed: int, root: Path | None, download: bool
) -> ImageSet:
    import inspect

    try:
        from bitdial.zoo.registry import torchvision_compat

        torchvision_compat()
        from torchvision import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(f"data set torchvision:{name} needs torch and torchvision ({error}); install them") from error
    constructor = getattr(datasets, name, None)
    if name.startswith("_") or not inspect.isclass(constructor):
        raise DataError(f"torchvision has no data set '{name}'; see the list at torchvision.datasets")
    parameters = inspect.signature(constructor).parameters
    options: dict[str, Any] = {"root": str(root if root is not None else Path("data"))}
    if "download" in parameters:
        options["download"] = download
    wanted: list[dict[str, Any]]
    if "train" in parameters:
        wanted = [{"train": part == "train"} for part in (["train", "test"] if split == "all" else [split])]
    elif "split" in parameters:
        wanted = [{"split": part} for part in (["train", "test"] if split == "all" else [split])]
    else:
        wanted = [{}]
    parts: list[ImageSet] = []
    for extra in wanted:
        try:
            data = constructor(**options, **extra)
        except Exception as error:  # torchvision raises RuntimeError, ValueError, FileNotFoundError, URLError, ...
            raise DataError(
                f"torchvision:{name} could not be opened below {options['root']} ({error}); give its root folder, "
                "or allow download"
            ) from error
        parts.append(_materialise(f"torchvision:{name}", data, settings))
    whole = parts[0] if len(parts) == 1 else _concatenate(Path(f"torchvision:{name}"), parts)
    return whole if wanted != [{}] else _part(whole, split, seed)


def _materialise(name: str, data: Any, settings: Preprocessing) -> ImageSet:
    """A torchvision data set (PIL image, class index) as pixels in memory."""
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for index in range(len(data)):
        image, label = data[index]
        if not isinstance(label, (int, np.integer)):
            raise DataError(f"{name} has targets of type {type(label).__name__}; choose a data set for classification")
        pixels.append(settings.pixels(image))
        labels.append(int(label))
        if pixels[-1].shape != pixels[0].shape:
            raise DataError(f"{name} has pictures of different sizes; give a size so that all are resized to it")
    if not pixels:
        raise DataError(f"{name} is empty; check its root folder")
    numbers = _integer_labels(np.array(labels, dtype=np.int64), name)
    known = getattr(data, "classes", None)
    classes = [str(c) for c in known] if known else [str(i) for i in range(int(numbers.max()) + 1)]
    return ImageSet(name, classes, ArrayPixels(np.stack(pixels)), numbers, _all(len(numbers)), settings)


def _part(whole: ImageSet, split: Split, seed: int) -> ImageSet:
    if split == "all":
        return whole
    train, test = split_positions(whole.labels, TEST_SHARE, seed)
    chosen = train if split == "train" else test
    if len(chosen) == 0:
        raise DataError(f"{whole.name} has {len(whole)} images, too few to split; add some, or give train and test")
    return whole.subset(chosen)


def _concatenate(path: Path, parts: list[ImageSet]) -> ImageSet:
    if len(parts) == 1:
        return parts[0]
    if any(part.classes != parts[0].classes for part in parts):
        raise DataError(f"{path}: train and test have different classes; give them the same class folders")
    if any(part.image_shape != parts[0].image_shape for part in parts):
        raise DataError(f"{path}: train and test have images of different shape; give a size for all")
    labels = np.concatenate([part.labels for part in parts])
    sources = [part.source for part in parts]
    if all(isinstance(source, FloatImages) for source in sources):
        ready = FloatImages(np.concatenate([part.array() for part in parts]))
        return replace(parts[0], name=str(path), source=ready, labels=labels, indices=_all(len(labels)))
    if any(isinstance(source, FloatImages) for source in sources):
        raise DataError(f"{path}: one part holds float arrays, the other pictures; use one form for both")
    joined = JoinedPixels([source for source in sources if not isinstance(source, FloatImages)])
    return replace(parts[0], name=str(path), source=joined, labels=labels, indices=_all(len(labels)))


@dataclass(frozen=True)
class JoinedPixels:
    """Several pixel sources of one shape, one after the other."""

    parts: list[PixelSource]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parts[0].shape

    def read(self, indices: Labels) -> npt.NDArray[np.uint8]:
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        start = 0
        for part in self.parts:
            inside = (indices >= start) & (indices < start + len(part))
            if inside.any():
                out[inside] = part.read(indices[inside] - start)
            start += len(part)
        return out


def _all(n: int) -> Labels:
    return np.arange(n, dtype=np.int64)
