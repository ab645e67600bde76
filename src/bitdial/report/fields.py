"""Kinds of fields of the report's records: plain, immutable values, or an error that names what is wrong.

NumPy scalars and arrays are accepted wherever numbers and sequences are, because that is what a program holds. Strings are
taken as they are, lone surrogates included: names come from models, and are made safe where they are shown.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from bitdial.errors import BitdialError, DataError
from bitdial.settings import BaseConfig

MAX_DEPTH = 40  # nesting of free-form dictionaries; deeper ones are refused, not recursed into


class Record(BaseConfig):
    """A part of a report. Unknown and missing fields, wrong types and values out of range raise DataError with their names."""

    refusal: ClassVar[type[BitdialError]] = DataError


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _many(value: Any) -> Any:
    """Any iterable as a tuple; what is none is left for the field's own check to refuse."""
    value = _plain(value)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {type(value).__name__}")
    return value


def _sorted(value: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value[key] for key in sorted(value)}


def _free(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a dictionary, not {type(value).__name__}")
    return {str(k): _free_form(v, f"[{str(k)!r:.60}]") for k, v in value.items()}


def _free_form(value: Any, where: str, depth: int = 1) -> Any:
    """Anything JSON can hold, with NumPy scalars and tuples turned into plain numbers and lists."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    value = _plain(value)
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError(f"{where} is {value}; only finite numbers can be shown")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, numbers.Real):
        return _free_form(float(value), where, depth)
    if isinstance(value, Mapping):
        return {str(k): _free_form(v, f"{where}[{str(k)!r:.60}]", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_free_form(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    raise ValueError(f"{where} holds a {type(value).__name__}, which JSON cannot store")


Numpy = BeforeValidator(_plain)
Many = BeforeValidator(_many)  # of a Sequence, kept as a tuple
Text = Annotated[str, PlainValidator(_text)]
Bool = Annotated[bool, Field(strict=True), Numpy]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False), Numpy]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0), Numpy]
Count = Annotated[int, Field(strict=True, ge=0), Numpy]
Shift = Annotated[int, Field(strict=True, ge=0, le=8), Numpy]
# JSON turns number keys into strings, so those are read back here.
ShiftKey = Annotated[int, Field(ge=0, le=8)]
ShareKey = Annotated[float, Field(ge=0.0, le=1.0)]
Sorted = AfterValidator(_sorted)
FreeDict = Annotated[dict[str, Any], PlainValidator(_free)]
