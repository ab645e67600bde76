"""Reading JSON that strangers send."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from bitdial.serving.errors import BadRequest


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)
# Beyond this many brackets a body must prove, by its size, that it holds numbers: an empty list costs the reader twenty times
# its two bytes, a number in a list about eight times.
_FREE_BRACKETS = 100_000


def parse_json(data: bytes | memoryview, what: str = "the body", decoder: json.JSONDecoder = DECODER) -> Any:
    """The value of a JSON text in UTF-8. Raises BadRequest for all that is wrong with it: malformed, too deep, numbers too
    long, NaN, or an amount of brackets that only an attack has."""
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{what} is not UTF-8 at byte {error.start}") from None
    brackets = text.count("[") + text.count("{")
    if brackets > _FREE_BRACKETS and brackets > len(text) // 8:
        raise BadRequest(
            f"{what} holds {brackets} lists and objects in {len(text)} bytes; send tensors flat, or in binary"
        )
    try:
        return decoder.decode(text)
    except RecursionError:
        raise BadRequest(f"{what} is JSON nested too deep") from None
    except ValueError as error:  # JSONDecodeError, constants, integers of too many digits
        raise BadRequest(f"{what} is malformed JSON: {_short(str(error))}") from None


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
