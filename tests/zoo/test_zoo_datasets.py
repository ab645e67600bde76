"""Image sets from folders, zip files and arrays, and what bad ones answer."""

from __future__ import annotations

import importlib.util
import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitdial.errors import ConfigError, DataError
from bitdial.zoo import image_files
from bitdial.zoo.datasets import load_dataset, split_positions
from bitdial.zoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CLASSES = ["ant", "bee", "cat"]
Files = dict[str, bytes]


def png(value: int, size: tuple[int, int] = (6, 5)) -> bytes:
    """A picture of one grey value; PNG, so that decoding gives exactly that value."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def class_files(per_class: int = 5, first: int = 0) -> Files:
    """Picture k of class c has red value first + 10 c + k."""
    return {f"{name}/{k:03}.png": png(first + 10 * c + k) for c, name in enumerate(CLASSES) for k in range(per_class)}


def write_folder(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def red(images: np.ndarray) -> np.ndarray:
    """The red values behind normalised pictures, checked to be constant over each picture."""
    values = images[:, 0] * np.float32(IMAGENET_STD[0]) + np.float32(IMAGENET_MEAN[0])
    assert np.ptp(values, axis=(1, 2)).max() < 1e-6
    return np.rint(values[:, 0, 0] * 255).astype(int)


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a top folder"])
def test_class_folders(tmp_path: Path, kind: str) -> None:
    files = class_files()
    if kind == "folder":
        path = write_folder(tmp_path / "set", {**files, "README.txt": b"no picture", "ant/._x.png": b"junk"})
    else:
        top = "set/" if "top" in kind else ""
        path = write_zip(tmp_path / "set.zip", {top + n: c for n, c in reversed(files.items())})
    data = load_dataset(str(path), "all")
    assert data.classes == CLASSES and len(data) == 15 and data.image_shape == (3, 5, 6)
    assert data.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert red(data.array()).tolist() == [10 * c + k for c in range(3) for k in range(5)]
    assert data.array().dtype == np.float32


def test_normalisation_is_that_of_the_settings(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "set", {"a/0.png": png(200)})
    image = load_dataset(path, "all", Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))).array()[0]
    expected = [(200 / 255 - 0.5) / 0.5, 100 / 255 - 0.25, 55 / 255 / 2]
    np.testing.assert_allclose(image, np.broadcast_to(np.reshape(expected, (3, 1, 1)), (3, 5, 6)), rtol=1e-6)
    grey = load_dataset(path, "all", Preprocessing(mean=(0.0,), std=(1.0,)))
    assert grey.image_shape == (1, 5, 6)


@pytest.mark.parametrize("kind", ["folder", "zips", "one zip", "npz", "val"])
def test_given_splits_are_kept_apart(tmp_path: Path, kind: str) -> None:
    train, test = class_files(4), class_files(2, first=100)
    path = tmp_path / "data"
    if kind in ("folder", "val"):
        write_folder(path / "train", train)
        write_folder(path / ("val" if kind == "val" else "test"), test)
    elif kind == "zips":
        write_zip(path / "train.zip", train)
        write_zip(path / "test.zip", test)
    elif kind == "one zip":
        both = {**{f"train/{n}": c for n, c in train.items()}, **{f"test/{n}": c for n, c in test.items()}}
        path = write_zip(tmp_path / "data.zip", both)
    else:
        path.mkdir()
        for name, first, n in (("train", 0, 4), ("test", 100, 2)):
            values = np.array([first + 10 * c + k for c in range(3) for k in range(n)], dtype=np.uint8)
            pictures = np.broadcast_to(values[:, None, None, None], (3 * n, 5, 6, 3))
            np.savez(path / f"{name}.npz", images=pictures, labels=np.repeat(np.arange(3), n), classes=CLASSES)
    assert sorted(red(load_dataset(path, "train").array())) == [10 * c + k for c in range(3) for k in range(4)]
    assert sorted(red(load_dataset(path, "test").array())) == [100 + 10 * c + k for c in range(3) for k in range(2)]
    everything = load_dataset(path, "all")
    assert len(everything) == 18 and everything.classes == CLASSES
    assert np.array_equal(everything.images([17, 0]), everything.array()[[17, 0]])


def test_one_folder_is_split_by_seed(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "set", class_files(10))
    train, test = (load_dataset(path, part, seed=1) for part in ("train", "test"))  # type: ignore[arg-type]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert sorted([*red(train.array()), *red(test.array())]) == sorted(10 * c + k for c in range(3) for k in range(10))
    assert np.array_equal(load_dataset(path, "test", seed=1).array(), test.array())
    assert not np.array_equal(load_dataset(path, "test", seed=2).array(), test.array())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0.01, 0.9), st.integers(0, 99))
def test_split_positions(labels: list[int], share: float, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    train, test = split_positions(array, share, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    total = round(share * len(labels))
    assert len(test) == total
    for label in set(labels):
        share_of_class = (array == label).sum() * total / len(labels)
        assert abs((array[test] == label).sum() - share_of_class) < 1


def test_batches_subsets_and_shuffling(tmp_path: Path) -> None:
    data = load_dataset(write_folder(tmp_path / "set", class_files(7)), "all")
    batches = list(data.batches(8))
    assert [len(x) for x, _ in batches] == [8, 8, 5]
    assert np.array_equal(np.concatenate([x for x, _ in batches]), data.array())
    assert np.array_equal(np.concatenate([y for _, y in batches]), data.labels)

    chosen = data.calibration_subset(9, seed=4)
    assert len(chosen) == 9 and len(set(red(chosen.array()))) == 9
    assert set(chosen.labels) == {0, 1, 2}
    assert (red(chosen.array()) // 10 == chosen.labels).all()
    assert np.array_equal(chosen.array(), data.calibration_subset(9, seed=4).array())
    assert not np.array_equal(chosen.array(), data.calibration_subset(9, seed=5).array())
    with pytest.raises(DataError, match="ask for fewer"):
        data.calibration_subset(22)
    with pytest.raises(ConfigError, match="at least 1"):
        data.calibration_subset(0)
    with pytest.raises(ConfigError, match="at least 1"):
        next(data.batches(0))
    assert len(data.head(3)) == 3 and len(data.head(None)) == 21


def test_tensors_at_positions(tmp_path: Path) -> None:
    images = load_dataset(write_folder(tmp_path / "set", class_files()), "all").shuffled(1)
    pixels, labels = images.tensors(torch.tensor([4, 0, 4]))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, *images.image_shape)
    assert labels.dtype == torch.int64 and labels.tolist() == images.labels[[4, 0, 4]].tolist()
    assert np.array_equal(pixels.numpy(), images.images([4, 0, 4]))
    pixels[0] = 0.0  # its own memory: augmentation may write into it
    assert np.array_equal(images.images([4]), pixels[2:].numpy())


def test_resize_and_crop(tmp_path: Path) -> None:
    striped = Image.new("RGB", (40, 20))
    striped.paste((255, 255, 255), (10, 0, 30, 20))  # the middle half is white
    buffer = io.BytesIO()
    striped.save(buffer, "PNG")
    path = write_folder(tmp_path / "set", {"a/0.png": buffer.getvalue(), "a/1.png": png(9)})
    with pytest.raises(DataError, match=r"a/1.png is 6 x 5 pixels.*40 x 20; give a size"):
        load_dataset(path, "all")
    stretched = load_dataset(path, "all", Preprocessing((0.0,), (1.0,), size=(8, 8))).array()
    assert stretched.shape == (2, 1, 8, 8)
    assert stretched[0, 0, 4, 0] < 0.1 and stretched[0, 0, 4, 4] > 0.9
    cropped = load_dataset(path, "all", Preprocessing((0.0,), (1.0,), size=(8, 8), crop_fraction=1.0)).array()
    assert cropped[0, 0, :, 1:-1].min() > 0.9  # the square in the middle is the white half


def test_cache_is_used_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder(tmp_path / "set", class_files())
    decoded: list[int] = []
    original = image_files.FilePixels.read
    monkeypatch.setattr(
        image_files.FilePixels, "read", lambda self, indices: (decoded.append(len(indices)), original(self, indices))[1]
    )

    def load() -> np.ndarray:
        return load_dataset(path, "all").array()

    first = load()
    assert decoded == [15]
    assert np.array_equal(load(), first) and decoded == [15]
    cached = list((tmp_path / "cache" / "bitdial").glob("*.npy"))
    assert len(cached) == 1
    cached[0].write_bytes(cached[0].read_bytes()[:-5])  # a truncated cache is decoded again
    assert np.array_equal(load(), first) and decoded == [15, 15]

    (path / "ant" / "000.png").write_bytes(png(77))
    os.utime(path / "ant" / "000.png", (time.time() + 5, time.time() + 5))
    assert red(load())[0] == 77 and decoded == [15, 15, 15]


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", class_files())
    (tmp_path / "blocked").write_text("a file, not a folder")
    assert len(load_dataset(path, "all", cache_dir=tmp_path / "blocked")) == 15


def test_large_sets_are_decoded_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "set.zip", class_files())
    small = load_dataset(path, "all")
    monkeypatch.setattr(image_files, "MAX_DECODED_BYTES", 100)
    large = load_dataset(path, "all", cache_dir=tmp_path / "other")
    assert isinstance(large.source, image_files.FilePixels)
    assert np.array_equal(large.shuffled(1).array(), small.shuffled(1).array())
    assert not (tmp_path / "other").exists()


def test_npz_of_floats_is_taken_as_it_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(6, 2, 4, 4)).astype(np.float64)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6, dtype=np.int32) % 3)
    data = load_dataset(tmp_path / "a.npz", "all")
    np.testing.assert_array_equal(data.array(), images.astype(np.float32))
    assert data.classes == ["0", "1", "2"] and data.labels.dtype == np.int64


def test_npz_pictures_are_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((3, 4, 4), 51, np.uint8), labels=[0, 1, 1])
    data = load_dataset(tmp_path / "a.npz", "all", Preprocessing((0.0,), (1.0,), size=(7, 9)))
    assert data.image_shape == (1, 7, 9)
    np.testing.assert_allclose(data.array(), 0.2, rtol=1e-6)


PICTURES = np.zeros((4, 5, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PICTURES}, "needs `images` and `labels`"),
        ({"images": PICTURES, "labels": [0, 1, 2]}, "4 images and 3 labels"),
        ({"images": PICTURES, "labels": [0.0, 1.0, 1.0, 0.0]}, "give integers"),
        ({"images": PICTURES, "labels": [0, -1, 0, 1]}, "number the classes from 0"),
        ({"images": PICTURES[:0], "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": PICTURES[..., :2], "labels": [0, 1, 0, 1]}, "1 or 3"),
        ({"images": PICTURES[..., :1], "labels": [0, 1, 0, 1]}, "1 channels"),
        ({"images": PICTURES.astype(np.int32), "labels": [0, 1, 0, 1]}, "are int32"),
        ({"images": np.full((2, 3, 4, 4), np.nan), "labels": [0, 1]}, "NaN or infinite"),
        ({"images": np.zeros((2, 16)), "labels": [0, 1]}, r"\[N, C, H, W\]"),
        ({"images": PICTURES, "labels": [0, 1, 0, 2], "classes": ["a", "b"]}, "label 2 has no name"),
        ({"images": np.array([None, 1]), "labels": [0, 1]}, "not a readable npz"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "a.npz", "all")


def test_bad_places(tmp_path: Path) -> None:
    def check(spec: object, message: str, split: str = "all") -> None:
        with pytest.raises(DataError, match=message):
            load_dataset(spec, split)  # type: ignore[arg-type]

    check(tmp_path / "absent", "does not exist")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "is empty")
    check(write_folder(tmp_path / "flat", {"0.png": png(1)}), "no pictures in class folders")
    check(write_folder(tmp_path / "texts", {"a/0.txt": b"x"}), "no pictures in class folders")
    check(
        write_folder(tmp_path / "bad", {"a/0.png": png(1), "a/1.jpg": b"no image"}), "a/1.jpg is not a readable image"
    )
    check(write_folder(tmp_path / "cut", {"a/0.png": png(1, (90, 90))[:120]}), "a/0.png is not a readable image")
    check(write_folder(tmp_path / "half", {"train/a/0.png": png(1)}), "no test part", "test")
    check(write_folder(tmp_path / "hollow" / "test", {"readme.md": b""}).parent, "no pictures in class folders", "test")
    check(write_folder(tmp_path / "few", {"a/0.png": png(1)}), "too few to split", "test")
    check(write_zip(tmp_path / "none.zip", {"readme.txt": b"x"}), "no pictures in class folders")
    check(write_zip(tmp_path / "half.zip", {f"train/{n}": c for n, c in class_files().items()}), "no test part", "test")
    (tmp_path / "text.zip").write_text("not a zip")
    check(tmp_path / "text.zip", "not a readable zip")
    (tmp_path / "text.npz").write_text("not an npz")
    check(tmp_path / "text.npz", "not a readable npz")
    (tmp_path / "set.tar").write_text("x")
    check(tmp_path / "set.tar", "of no supported kind")


def test_classes_of_the_splits_must_agree(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "train", class_files())
    write_folder(tmp_path / "d" / "test", {"other/0.png": png(3)})
    with pytest.raises(DataError, match="different classes"):
        load_dataset(tmp_path / "d", "all")


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_damaged_zip(tmp_path: Path, position: float) -> None:
    path = write_zip(tmp_path / "set.zip", class_files())
    content = bytearray(path.read_bytes())
    start = int(len(content) * position)
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_dataset(path, "all")


def test_torchvision_data_set(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("NO TORCHVISION: pip install --no-deps torchvision")
    fake = load_dataset("torchvision:ImageFolder", "all", root=write_folder(tmp_path / "set", class_files()))
    assert fake.classes == CLASSES and len(fake) == 15
    assert red(fake.array()).tolist() == [10 * c + k for c in range(3) for k in range(5)]
    with pytest.raises(DataError, match="no data set 'Cifar'"):
        load_dataset("torchvision:Cifar")
    with pytest.raises(DataError, match="could not be opened"):
        load_dataset("torchvision:CIFAR10", root=tmp_path / "nowhere")


def test_bad_settings(tmp_path: Path) -> None:
    for arguments, message in [
        ({"mean": (0.5, 0.5)}, "one \\(grey\\) or three"),
        ({"std": (1.0, 0.0, 1.0)}, "above zero"),
        ({"size": (0, 4)}, "two positive"),
        ({"crop_fraction": 0.8}, "needs a size"),
        ({"size": (4, 4), "crop_fraction": 1.5}, "not above 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Preprocessing(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split 'both'"):
        load_dataset(tmp_path, "both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ready made"):
        load_dataset("digits", "test", Preprocessing())


def test_cifar10_loads_from_the_cache_without_decoding(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data_folder / "cifar10"
    first = load_dataset(path, "test", cache_dir=tmp_path)
    monkeypatch.setattr(image_files.FilePixels, "read", None)
    again = load_dataset(path, "test", cache_dir=tmp_path)
    assert len(again) == 10_000 and np.bincount(again.labels).tolist() == [1000] * 10
    assert again.classes[0] == "airplane" and again.image_shape == (3, 32, 32)
    assert np.array_equal(again.images(range(0, 10_000, 997)), first.images(range(0, 10_000, 997)))
