"""Text as token sequences for character models: vocabulary, a split by position, seeded batches. Needs NumPy only.

The validation part is the end of the text. Windows are cut inside one part, so no training, calibration or validation
window reaches over the border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError, DataError

VALIDATION_SHARE = 0.1
Tokens = npt.NDArray[np.int64]
Pair = tuple[Tokens, Tokens]  # (inputs, targets), both [n, length]; targets[i, t] follows inputs[i, t] in the text


@dataclass(frozen=True)
class Vocabulary:
    """The characters a model knows; a character's token is its position. Sorted, without repetition."""

    characters: str

    @staticmethod
    def of(text: str) -> Vocabulary:
        return Vocabulary("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tokens:
        """int64 [characters]. Raises DataError for a character that is not in the vocabulary."""
        table = {character: token for token, character in enumerate(self.characters)}
        unknown = sorted(set(text) - set(table))
        if unknown:
            raise DataError(f"the vocabulary lacks {unknown[:5]!r}; take it from the whole text, or remove them")
        return np.array([table[character] for character in text], dtype=np.int64)

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens [n]. Raises DataError for tokens outside the vocabulary."""
        flat = np.asarray(tokens).reshape(-1)
        if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= len(self)):
            raise DataError(f"tokens must lie in 0..{len(self) - 1}, the size of the vocabulary less one")
        return "".join(self.characters[int(token)] for token in flat)


@dataclass(frozen=True)
class TextData:
    """One part of a text as tokens, int64 [characters]."""

    name: str
    vocabulary: Vocabulary
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def chunks(self, length: int, n: int | None = None) -> Pair:
        """Windows that follow each other without overlap; n: so many, spread evenly over the part (all if None).

        Every target is predicted once. Raises DataError where the part is shorter than asked for.
        """
        self._windows(length)
        count = (len(self.tokens) - 1) // length
        starts = np.arange(count) * length
        if n is not None:
            if not 1 <= n <= count:
                raise DataError(f"{self.name} has {count} windows of {length} tokens; ask for 1 to {count} of them")
            starts = starts[np.arange(n) * count // n]
        return self._at(starts, length)

    def sample(self, length: int, n: int, seed: int) -> Pair:
        """n windows at different random places, drawn by the seed. Raises DataError where there are not so many."""
        possible = self._windows(length)
        if not 1 <= n <= possible:
            raise DataError(f"{self.name} has {possible} windows of {length} tokens; ask for 1 to {possible} of them")
        starts = np.random.default_rng(seed).choice(possible, size=n, replace=False)
        return self._at(np.sort(starts), length)

    def batches(self, length: int, size: int, steps: int, seed: int) -> Iterator[Pair]:
        """`steps` training batches [size, length], windows at random places (they may repeat)."""
        if size < 1 or steps < 0:
            raise ConfigError(f"a batch of {size} windows and {steps} steps make no sense; give positive numbers")
        possible = self._windows(length)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            yield self._at(rng.integers(0, possible, size), length)

    def _windows(self, length: int) -> int:
        """Number of places where a window and the token after it fit."""
        if length < 1:
            raise ConfigError(f"a window of {length} tokens makes no sense; give at least 1")
        if len(self.tokens) < length + 1:
            raise DataError(
                f"{self.name} has {len(self.tokens)} tokens, fewer than a window of {length} and its target"
            )
        return len(self.tokens) - length

    def _at(self, starts: npt.NDArray[np.int64], length: int) -> Pair:
        places = starts[:, None] + np.arange(length + 1)
        window = self.tokens[places]
        return np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])


def load_text(path: Path, validation_share: float = VALIDATION_SHARE) -> tuple[TextData, TextData]:
    """(training, validation) part of a UTF-8 text file: the last `validation_share` of the characters validates.

    Both have one vocabulary, that of the whole file (what characters there are is no secret of the validation part).
    Raises DataError for a file that is missing, empty or no text, ConfigError for a share outside 0..1.
    """
    if not 0.0 < validation_share < 1.0:
        raise ConfigError(f"validation_share is {validation_share}; it must lie between 0 and 1")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable UTF-8 text file ({error})") from error
    border = len(text) - round(validation_share * len(text))
    if border in (0, len(text)):
        raise DataError(f"{path} has {len(text)} characters, too few to split; give a longer text")
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    return (
        TextData(f"{path} (training part)", vocabulary, tokens[:border]),
        TextData(f"{path} (validation part)", vocabulary, tokens[border:]),
    )
