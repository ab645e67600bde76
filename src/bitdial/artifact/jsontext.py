"""JSON with fixed bytes for equal values, and a reader that bounds what a hostile text can cost.

Canonical text: keys sorted, no spaces, ASCII only, numbers as Python writes them (floats read back exactly).
Infinities and NaN are no JSON: {"$float": "inf" | "-inf" | "nan"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitdial.errors import ArtifactError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_VALUES = 2_000_000  # bounds the memory of the parsed objects, about 60 bytes each
MAX_DEPTH = 64
_FLOAT_KEY = "$float"
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def dump_canonical(value: Any) -> str:
    """The canonical text of a plain value (see `to_plain`)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_bounded(text: str | bytes, where: str) -> Any:
    """Parse JSON text. Raises ArtifactError if it is malformed, too large, too deep or has a key twice."""
    if len(text) > MAX_JSON_BYTES:
        raise ArtifactError(
            f"{where}: {len(text)} bytes of JSON, more than the {MAX_JSON_BYTES} allowed; get a sound copy"
        )
    separators = text.count(b",") if isinstance(text, bytes) else text.count(",")
    if separators > MAX_JSON_VALUES:
        raise ArtifactError.damaged(where, f"more than {MAX_JSON_VALUES} JSON values")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError as error:
        raise ArtifactError.damaged(where, "JSON nested too deep") from error
    except ValueError as error:  # includes JSONDecodeError, UnicodeDecodeError and over-long integers
        raise ArtifactError.damaged(where, f"malformed JSON ({error})") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def to_plain(value: Any, where: str, depth: int = 0) -> Any:
    """A JSON-able copy: tuples become lists, NumPy scalars and arrays Python values, infinities and NaN marked dicts.

    Raises ArtifactError naming `where` for anything else.
    """
    if depth > MAX_DEPTH:
        raise ArtifactError(f"{where}: nested deeper than {MAX_DEPTH} levels; flatten it before saving")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        if not -(2**63) <= int(value) < 2**63:
            raise ArtifactError(f"{where}: the integer {value} does not fit 64 bits")
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {_FLOAT_KEY: str(number)}
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist(), where, depth + 1)
    if isinstance(value, (list, tuple)):
        return [to_plain(v, where, depth + 1) for v in value]
    if isinstance(value, Mapping):
        if _FLOAT_KEY in value or not all(isinstance(k, str) for k in value):
            raise ArtifactError(f"{where}: keys must be strings other than '{_FLOAT_KEY}'; rename them before saving")
        return {k: to_plain(v, where, depth + 1) for k, v in value.items()}
    raise ArtifactError(
        f"{where}: a {type(value).__name__} cannot be stored as JSON; use numbers, strings, lists and dicts"
    )


def from_plain(value: Any, where: str, depth: int = 0) -> Any:
    """Undo `to_plain` for a value read from a file. Raises ArtifactError."""
    if depth > MAX_DEPTH:
        raise ArtifactError.damaged(where, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [from_plain(v, where, depth + 1) for v in value]
    if isinstance(value, dict):
        if _FLOAT_KEY in value:
            special = value[_FLOAT_KEY]
            if len(value) != 1 or not isinstance(special, str) or special not in _SPECIAL:
                raise ArtifactError.damaged(where, f"malformed number {value!r:.80}")
            return _SPECIAL[special]
        return {k: from_plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ArtifactError.damaged(where, "an integer beyond 64 bits")
    if isinstance(value, float) and not math.isfinite(value):  # "1e999" parses as infinity
        raise ArtifactError.damaged(where, "a number beyond float64")
    return value


class Fields:
    """Typed access to a JSON object of the manifest: every field must be asked for, and no others may be there."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ArtifactError.damaged(where, f"expected an object, found {type(value).__name__}")
        self._rest: dict[str, Any] = dict(value)
        self.where = where

    def fail(self, key: str, problem: str) -> ArtifactError:
        return ArtifactError.damaged(self.where, f"field '{key}' {problem}")

    def any(self, key: str) -> Any:
        if key not in self._rest:
            raise self.fail(key, "is missing")
        return self._rest.pop(key)

    def text(self, key: str) -> str:
        value = self.any(key)
        if not isinstance(value, str):
            raise self.fail(key, "is no string")
        return value

    def optional_str(self, key: str) -> str | None:
        """A string, or None where the field is absent."""
        return self.text(key) if key in self._rest else None

    def text_or_none(self, key: str) -> str | None:
        """A string, or null."""
        return None if self.is_none(key) and self.any(key) is None else self.text(key)

    def is_none(self, key: str) -> bool:
        """Whether a field is there and null."""
        return key in self._rest and self._rest[key] is None

    def optional_rows(self, key: str) -> list[Any] | None:
        """A list, or None where the field is absent."""
        return self.rows(key) if key in self._rest else None

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.fail(key, f"is {value!r:.60}, not one of {', '.join(allowed)}")
        return value

    def flag(self, key: str) -> bool:
        value = self.any(key)
        if not isinstance(value, bool):
            raise self.fail(key, "is neither true nor false")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in low..high."""
        value = self.any(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"is no integer in {low}..{high}")
        return value

    def rows(self, key: str) -> list[Any]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.fail(key, "is no list")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.rows(key)
        if not all(isinstance(v, str) for v in value):
            raise self.fail(key, "is no list of strings")
        return value

    def mapping(self, key: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
        """A JSON object; `default` where the field is absent and a default is given."""
        value = self.any(key) if default is None or key in self._rest else default
        if not isinstance(value, dict):
            raise self.fail(key, "is no object")
        return value

    def done(self) -> None:
        if self._rest:
            raise self.fail(sorted(self._rest)[0], "is not known to this version")
