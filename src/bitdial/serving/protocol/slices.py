"""Large JSON in slices: work that would hold up an event loop for long is a generator that yields after each small part of it.

A thread would not help: Python's JSON reader keeps the interpreter to itself from its first byte to its last. So a body is split
first: the numbers of its tensors, which are nearly all of it, are cut out unread, and what is left is small and parsed at once. A
request that does not fit its model is refused then; otherwise the numbers are read some kilobytes at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitdial.serving.errors import BadRequest
from bitdial.serving.protocol.jsontext import DECODER, parse_json

T = TypeVar("T")
Steps = Generator[None, None, T]

SMALL = 1 << 16  # bytes of JSON that are parsed at once
STEP = 1 << 15  # bytes of numbers that are read at a time
NUMBERS = 2048  # numbers that are written at a time

_DATA = re.compile(rb'data"[ \t\r\n]*:[ \t\r\n]*\[')
_NESTED = re.compile(rb"\[[ \t\r\n]*\[")
_BLANKS = b" \t\r\n"
_SHAPE_ONLY = bytes(c if c in b"[]," else ord("d") for c in range(256))
_NO_BRACKETS = bytes(ord(" ") if c in b"[]" else c for c in range(256))
_MISPLACED = (b"d[", b"]d", b"][", b"[]", b"[,", b",]", b",,")


@dataclass(frozen=True, slots=True)
class Text:
    """A JSON list that has not been read: body[begin:end]. It holds no strings and no objects."""

    body: bytes
    begin: int
    end: int


def finish(steps: Steps[T]) -> T:
    """The result of work in steps, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def parse_around(body: bytes, end: int, what: str, most: int, room: int) -> Any:
    """The value of the JSON text body[:end], in which up to `most` lists under keys called "data" are left as `Text`.

    room: bytes that all else may have. Raises BadRequest, as `parse_json`, and for more than that.
    """
    parts: list[bytes] = []
    texts: list[Text] = []
    at = taken = 0
    while len(texts) < most:
        found = _DATA.search(body, at, min(end, at + room - taken))
        if found is None:
            break
        # Such a text is a key and the start of its list, in whatever JSON it stands: inside a string its quote would be escaped.
        # The list ends with the last bracket before the next string or object.
        begin = found.end() - 1
        stop = end
        for mark in b'"', b"{", b"}":
            nearer = body.find(mark, begin, stop)
            stop = stop if nearer < 0 else nearer
        close = body.rfind(b"]", begin, stop) + 1
        if not close:
            break
        parts += [body[at:begin], b"NaN"]  # is no JSON, so that nobody else can have written it
        taken += begin - at
        texts.append(Text(body, begin, close))
        at = close
    if taken + end - at > room:
        raise BadRequest(
            f"{what} holds more than {room} bytes of JSON beside the lists of numbers under 'data'; send large inputs in binary"
        )
    parts.append(body[at:end])
    left = iter(texts)

    def next_text(name: str) -> Text:
        text = next(left, None)
        if text is None or name != "NaN":
            raise ValueError(f"{name} is not JSON")
        return text

    value = parse_json(b"".join(parts), what, json.JSONDecoder(parse_constant=next_text))
    if next(left, None) is not None:
        raise BadRequest(f"{what} is malformed JSON")
    return value


def read_numbers(text: Text, shape: Sequence[int], dtype: np.dtype[Any], kinds: set[type]) -> Steps[npt.NDArray[Any]]:
    """The array of a list, flat or nested as `shape` is, whose entries have the types `kinds`.

    Raises ValueError if it is anything else, and OverflowError for a number that `dtype` cannot hold.
    """
    count = math.prod(shape)
    body, at, end = text.body, text.begin, text.end
    if end - at < 2 * count + 1:
        raise ValueError("too short")
    expected = _brackets(shape if _NESTED.match(body, at, min(end, at + STEP)) else [count])
    array = np.empty(count, dtype)
    filled = matched = 0
    while at < end:
        cut = end if end - at <= STEP else body.rfind(b",", at, at + STEP) + 1
        if not cut:
            raise ValueError("a number is too long")
        piece = body[at:cut]
        form = piece.translate(_SHAPE_ONLY, _BLANKS)
        brackets = form.replace(b"d", b"")
        if at > text.begin:
            form = b"," + form
        if any(wrong in form for wrong in _MISPLACED) or not expected.startswith(brackets, matched):
            raise ValueError("the brackets do not follow the shape")
        matched += len(brackets)
        values = DECODER.decode(f"[{piece[: cut - at - (cut < end)].translate(_NO_BRACKETS).decode('ascii')}]")
        if filled + len(values) > count or not set(map(type, values)) <= kinds:
            raise ValueError("other values, or more of them")
        with np.errstate(over="ignore"):  # becomes infinite, which is refused where all inputs are checked for it
            array[filled : filled + len(values)] = np.array(values, dtype)
        filled += len(values)
        at = cut
        yield
    if filled != count or matched != len(expected):
        raise ValueError("too few values")
    return array.reshape(shape)


def _brackets(shape: Sequence[int]) -> bytes:
    """The brackets and commas of a nested list of that shape."""
    text = b""
    for size in reversed(shape):
        text = b"[" + b",".join([text] * size) + b"]"
    return text


def write_numbers(array: npt.NDArray[Any]) -> Steps[str]:
    """The JSON text of an array as a flat list. Raises ValueError for NaN and infinity."""
    flat = array.ravel()
    parts: list[str] = []
    for at in range(0, max(1, flat.size), NUMBERS):
        if at:
            yield
        parts.append(json.dumps(flat[at : at + NUMBERS].tolist(), allow_nan=False, separators=(",", ":"))[1:-1])
    return f"[{','.join(parts)}]"
