"""Text data: a split without leakage, a vocabulary that round-trips, windows that are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.errors import ConfigError, DataError
from language.text import TextData, Vocabulary, load_text


def numbered(n: int) -> TextData:
    """Tokens that are their own position, so that a window shows where it comes from."""
    return TextData("test", Vocabulary("ab"), np.arange(n))


@given(st.text(min_size=1, max_size=60))
def test_encoding_round_trips(text: str) -> None:
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    assert tokens.dtype == np.int64 and set(tokens) == set(range(len(vocabulary)))


def test_unknown_characters_and_tokens_are_named() -> None:
    vocabulary = Vocabulary.of("abc")
    with pytest.raises(DataError, match="'x'"):
        vocabulary.encode("abx")
    for tokens in ([3], [-1, 0]):
        with pytest.raises(DataError, match=r"0\.\.2"):
            vocabulary.decode(np.array(tokens))


@given(st.floats(0.1, 0.9))
def test_the_parts_are_the_text_cut_once(share: float) -> None:
    path = Path(__file__)  # any text will do
    text = path.read_text(encoding="utf-8")
    training, validation = load_text(path, share)
    assert training.vocabulary == validation.vocabulary == Vocabulary.of(text)
    assert len(validation) == round(share * len(text))
    joined = np.concatenate([training.tokens, validation.tokens])
    assert training.vocabulary.decode(joined) == text


@given(st.integers(2, 300), st.integers(1, 40), st.integers(0, 5))
def test_windows_stay_inside_their_part_and_targets_are_one_ahead(size: int, length: int, seed: int) -> None:
    data = numbered(size)
    if size < length + 1:
        with pytest.raises(DataError, match="fewer"):
            data.chunks(length)
        return
    inputs, targets = data.chunks(length)
    assert inputs.shape == targets.shape == ((size - 1) // length, length)
    possible = size - length
    sampled = data.sample(length, min(5, possible), seed)
    for x, y in ((inputs, targets), sampled, *data.batches(length, 3, 2, seed)):
        assert np.array_equal(y, x + 1)  # the next token
        assert (np.diff(x, axis=1) == 1).all()  # in one piece
        assert x.min() >= 0 and y.max() < size
    assert len(np.unique(sampled[0][:, 0])) == min(5, possible)


@pytest.mark.parametrize("size", [9, 12, 13, 16, 17])
def test_chunks_predict_every_target_once(size: int) -> None:
    inputs, targets = numbered(size).chunks(4)
    assert len(inputs) == (size - 1) // 4
    assert np.array_equal(targets.reshape(-1), np.arange(1, 4 * len(inputs) + 1))


def test_some_chunks_are_spread_over_the_part() -> None:
    inputs, _ = numbered(1001).chunks(10, 5)
    assert inputs[:, 0].tolist() == [0, 200, 400, 600, 800]
    for n in (0, 101):
        with pytest.raises(DataError, match="100 windows"):
            numbered(1001).chunks(10, n)


def test_seeds_decide_samples_and_batches() -> None:
    data = numbered(500)
    first, again, other = (data.sample(8, 16, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    one, same, different = ([x.tolist() for x, _ in data.batches(8, 4, 3, seed)] for seed in (1, 1, 2))
    assert one == same and one != different and one[0] != one[1]


def test_bad_settings_and_files_are_refused(tmp_path: Path) -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="validation_share"):
            load_text(Path(__file__), share)
    with pytest.raises(DataError, match="not a readable"):
        load_text(tmp_path / "missing.txt")
    for name, content, message in (
        ("empty", b"", "too few"), ("one", b"a", "too few"), ("binary", b"\xff\xfe\xff", "not a readable")
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_text(tmp_path / name)
    data = numbered(50)
    for call in (
        lambda: data.chunks(0),
        lambda: list(data.batches(8, 0, 1, 0)),
        lambda: list(data.batches(8, 1, -1, 0)),
    ):
        with pytest.raises(ConfigError, match="no sense"):
            call()


def test_tinyshakespeare(data_folder: Path) -> None:
    training, validation = load_text(data_folder / "text" / "tinyshakespeare.txt")
    assert len(training.vocabulary) == 65
    assert (len(training), len(validation)) == (1_003_855, 111_539)
    assert training.vocabulary.decode(training.tokens[:14]) == "First Citizen:"
