"""Checks that turn what a caller hands to the report into plain, immutable values, or name what is wrong.

NumPy scalars and arrays are accepted wherever numbers and sequences are, because that is what a program holds.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from bitdial.errors import DataError

T = TypeVar("T")
MAX_DEPTH = 40  # nesting of free-form dictionaries; deeper ones are refused, not recursed into


def text(value: Any, what: str) -> str:
    """`value` as it is if it is a string, else DataError."""
    if not isinstance(value, str):
        raise DataError(f"report data: {what} must be a string, not {type(value).__name__}")
    return value


def boolean(value: Any, what: str) -> bool:
    """A Python or NumPy bool."""
    if not isinstance(value, bool | np.bool_):
        raise DataError(f"report data: {what} must be true or false, not {value!r:.60}")
    return bool(value)


def real(value: Any, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within low..high, as a float."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise DataError(f"report data: {what} must be a number, not {value!r:.60}")
    try:
        result = float(value)
    except OverflowError:
        raise DataError(f"report data: {what} is too large for a 64-bit float") from None
    if not math.isfinite(result):
        raise DataError(f"report data: {what} is {result}; only finite numbers can be drawn")
    if not low <= result <= high:
        raise DataError(f"report data: {what} is {result:g}, outside {low:g}..{high:g}")
    return result


def integer(value: Any, what: str, low: int = 0, high: int | None = None) -> int:
    """An integer of at least `low` and, if given, at most `high`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise DataError(f"report data: {what} must be an integer, not {value!r:.60}")
    result = int(value)
    if result < low or (high is not None and result > high):
        bound = f"{low}..{high}" if high is not None else f"{low} or more"
        raise DataError(f"report data: {what} is {result}, not {bound}")
    return result


def share(value: Any, what: str) -> float:
    """A number within 0..1."""
    return real(value, what, 0.0, 1.0)


def optional(check: Callable[[Any, str], T], value: Any, what: str) -> T | None:
    """None, or what `check` makes of the value."""
    return None if value is None else check(value, what)


def sequence(check: Callable[[Any, str], T], value: Any, what: str) -> tuple[T, ...]:
    """Each element of an iterable (not a string or mapping) through `check`."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise DataError(f"report data: {what} must be a list, not {type(value).__name__}")
    return tuple(check(item, f"{what}[{i}]") for i, item in enumerate(value))


def mapping(key: Callable[[Any, str], Any], check: Callable[[Any, str], T], value: Any, what: str) -> dict[Any, T]:
    """A dictionary sorted by its checked keys; JSON turns number keys into strings, so those are read back here."""
    if not isinstance(value, Mapping):
        raise DataError(f"report data: {what} must be a dictionary, not {type(value).__name__}")
    pairs: dict[Any, T] = {}
    for raw, item in value.items():
        name = key(_number_key(raw, what), f"a key of {what}")
        if name in pairs:
            raise DataError(f"report data: {what} has the key {name} twice")
        pairs[name] = check(item, f"{what}[{name}]")
    return {name: pairs[name] for name in sorted(pairs)}


def _number_key(raw: Any, what: str) -> Any:
    if not isinstance(raw, str):
        return raw
    try:
        return int(raw)
    except ValueError:
        pass
    try:
        return float(raw)
    except ValueError:
        raise DataError(f"report data: {what} has the key {raw!r:.60}, which is not a number") from None


def records(cls: type[T], value: Any, what: str) -> tuple[T, ...]:
    """A list of instances of the dataclass `cls`, of dictionaries of its fields, or of tuples in field order."""
    return sequence(lambda item, where: record(cls, item, where), value, what)


def record(cls: type[T], value: Any, what: str) -> T:
    """One instance of the dataclass `cls`; unknown and missing fields are DataErrors that name them."""
    if isinstance(value, cls):
        return value
    known = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]  # every caller passes a dataclass
    names = [f.name for f in known]
    if isinstance(value, Mapping):
        entries = {str(k): v for k, v in value.items()}
    elif isinstance(value, tuple | list) and len(value) <= len(names):
        entries = dict(zip(names, value, strict=False))
    else:
        raise DataError(f"report data: {what} must be a {cls.__name__} or a dictionary of its fields")
    unknown = sorted(set(entries) - set(names))
    if unknown:
        raise DataError(f"report data: {what} has the unknown field {unknown[0]!r:.80}; known: {', '.join(names)}")
    required = [
        f.name for f in known if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in entries]
    if missing:
        raise DataError(f"report data: {what} lacks the field {missing[0]!r}")
    return cls(**entries)


def free_form(value: Any, what: str, depth: int = 0) -> Any:
    """Anything JSON can hold, with NumPy scalars and tuples turned into plain numbers and lists."""
    if depth > MAX_DEPTH:
        raise DataError(f"report data: {what} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return real(value, what)
    if isinstance(value, Mapping):
        return {str(k): free_form(v, f"{what}[{str(k)!r:.60}]", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [free_form(v, f"{what}[{i}]", depth + 1) for i, v in enumerate(value)]
    raise DataError(f"report data: {what} holds a {type(value).__name__}, which JSON cannot store")


def free_dict(value: Any, what: str) -> dict[str, Any]:
    """A JSON-able dictionary."""
    if not isinstance(value, Mapping):
        raise DataError(f"report data: {what} must be a dictionary, not {type(value).__name__}")
    result: dict[str, Any] = free_form(value, what)
    return result
