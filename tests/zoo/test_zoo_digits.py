"""The handwritten digits: data, training, cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdial.errors import ConfigError
from bitdial.zoo.datasets import load_dataset
from bitdial.zoo.digits import Network, train_digits
from bitdial.zoo.digits import test_accuracy as accuracy_of
from bitdial.zoo.digits_data import enlarge, load_digits_split


def test_split_is_stratified_and_seeded() -> None:
    x, y, x_test, y_test = load_digits_split(3)
    assert x.shape == (1437, 1, 16, 16) and x_test.shape == (360, 1, 16, 16)
    assert x.dtype == np.float32 and y.dtype == np.int64
    counts, counts_test = np.bincount(y), np.bincount(y_test)
    assert np.abs(counts_test - (counts + counts_test) * 360 / 1797).max() < 1
    assert np.array_equal(load_digits_split(3)[2], x_test)
    assert not np.array_equal(load_digits_split(4)[2], x_test)
    assert not {t.tobytes() for t in x_test} & {t.tobytes() for t in x}
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def test_enlarge_equals_torch() -> None:
    pixels = np.random.default_rng(0).random((4, 8, 6), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels)[:, None], scale_factor=2, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(enlarge(pixels), expected[:, 0].numpy(), atol=1e-6)


def test_data_set_by_name() -> None:
    test = load_dataset("digits", "test", seed=3)
    assert len(test) == 360 and test.image_shape == (1, 16, 16) and test.num_classes == 10
    np.testing.assert_array_equal(test.array(), load_digits_split(3)[2])
    assert len(load_dataset("digits", "train")) == 1437 and len(load_dataset("digits", "all")) == 1797


def test_training_is_seeded_and_cached(tmp_path: Path) -> None:
    calls: list[tuple[int, int, float]] = []
    path = tmp_path / "new" / "digits.safetensors"
    state_before = torch.random.get_rng_state()
    first = train_digits(5, 2, lambda *a: calls.append(a), path)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    assert [c[:2] for c in calls] == [(1, 2), (2, 2)] and calls[1][2] < calls[0][2]
    assert not first.training

    _, _, x, y = load_digits_split(5)
    assert accuracy_of(first, torch.from_numpy(x), torch.from_numpy(y)) > 0.8

    calls.clear()
    again = train_digits(5, 2, lambda *a: calls.append(a), path)
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))

    train_digits(6, 1, lambda *a: calls.append(a), path)  # another seed is not served from the cache
    assert len(calls) == 1


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "damage", ["truncated", pytest.param("altered", marks=SLOW), pytest.param("not safetensors", marks=SLOW)]
)
def test_damaged_cache_is_replaced(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "digits.safetensors"
    good = train_digits(0, 1, None, path).state_dict()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "altered":
        content = bytearray(path.read_bytes())
        content[-6] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(b"\xff" * 64)
    calls: list[int] = []
    again = train_digits(0, 1, lambda *a: calls.append(1), path).state_dict()
    assert calls == [1]
    assert load_file(str(path)).keys() == good.keys()
    for name, tensor in load_file(str(path)).items():
        assert torch.equal(tensor, again[name])


def test_cache_of_the_other_network_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    train_digits(0, 1, None, path)
    calls: list[int] = []
    wide = train_digits(0, 1, lambda *a: calls.append(1), path, "digits_wide")
    assert calls == [1] and sum(p.numel() for p in wide.parameters()) > 10**6
    train_digits(0, 1, lambda *a: calls.append(1), path, "digits_wide")
    assert calls == [1]


def test_foreign_cache_file_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    save_file({"w": torch.zeros(2)}, str(path))
    calls: list[int] = []
    train_digits(0, 1, lambda *a: calls.append(1), path)
    assert calls == [1]


def test_cache_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not cached"):
        train_digits(0, 1, None, tmp_path / "file" / "digits.safetensors")


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        train_digits(epochs=0)
    with pytest.raises(ConfigError, match="seed"):
        train_digits(seed=-1)
    with pytest.raises(ConfigError, match="resnet20"):
        train_digits(network="resnet20")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["digits", "digits_wide"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_training_reaches_its_accuracy(seed: int, network: Network) -> None:
    _, _, x, y = load_digits_split(seed)
    assert accuracy_of(train_digits(seed, network=network), torch.from_numpy(x), torch.from_numpy(y)) >= 0.975
