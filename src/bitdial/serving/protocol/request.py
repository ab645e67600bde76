"""An inference request of the Open Inference Protocol v2: JSON, or JSON followed by binary tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitdial.serving.errors import BadRequest
from bitdial.serving.protocol.datatypes import DATATYPES, datatype_of, numpy_dtype
from bitdial.serving.protocol.jsontext import parse_json
from bitdial.serving.protocol.slices import SMALL, Steps, Text, finish, parse_around, read_numbers

if TYPE_CHECKING:
    from bitdial.serving.worker.info import TensorInfo

MOST_MILLISECONDS = 600_000.0  # of slo_ms and timeout: ten minutes
_NUMBERS: dict[str, set[type]] = {
    "b": {bool},
    "i": {int},
    "u": {int},
    "f": {int, float},
}  # kind of tensor -> JSON values


@dataclass(slots=True)
class InferRequest:
    """A request that fits its model.

    id         the caller's, to be repeated in the answer; "" if there is none
    inputs     one array per input of the model, in the model's order; views of the body where it was binary
    samples    batch entries
    outputs    (index of the model's output, as binary?) in the order they were asked for
    slo        seconds that the caller grants, or None
    timeout    seconds after which the caller will not wait, or None
    max_ratio  largest ratio that the caller accepts, or None
    """

    id: str
    inputs: list[npt.NDArray[Any]]
    samples: int
    outputs: list[tuple[int, bool]]
    slo: float | None
    timeout: float | None
    max_ratio: float | None


@dataclass(frozen=True, slots=True)
class _Input:
    """A TensorInfo, prepared."""

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axis: int  # batch axis; -1: none
    factor: int

    def samples(self, shape: Sequence[int]) -> int:
        """Batch entries of a tensor of that shape; -1 if it does not fit, 0 if the tensor has no batch axis."""
        if len(shape) != len(self.shape):
            return -1
        samples = 0
        for got, expected in zip(shape, self.shape, strict=True):
            if expected < 0:
                if got < 1 or got % self.factor:
                    return -1
                samples = got // self.factor
            elif got != expected:
                return -1
        return samples


class RequestReader:
    """Reads the requests of one model.

    inputs, outputs: what the model takes and gives. max_samples: batch entries that one request may hold.
    largest_body, sample_body: bytes of the largest sensible request, and of the largest of one sample: every number as JSON text
    of 24 characters, and a kilobyte per tensor.
    """

    def __init__(self, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], max_samples: int) -> None:
        self.max_samples = max_samples
        self._inputs = [
            _Input(
                t.name, datatype_of(t.dtype), numpy_dtype(datatype_of(t.dtype)), tuple(t.shape),
                next((i for i, d in enumerate(t.shape) if d < 0), -1), max(1, t.batch_factor),
            )
            for t in inputs
        ]  # fmt: skip
        self._room = 1024 * (len(inputs) + len(outputs) + 1)
        self.largest_body, self.sample_body = self._bytes(max_samples), self._bytes(1)
        self._places = {t.name: at for at, t in enumerate(self._inputs)}
        self._outputs = {t.name: at for at, t in enumerate(outputs)}

    def _bytes(self, samples: int) -> int:
        numbers = 0
        for tensor in self._inputs:
            size = math.prod(d for d in tensor.shape if d >= 0)
            numbers += size * (samples * tensor.factor if tensor.axis >= 0 else 1)
        return 24 * numbers + self._room

    def read(self, body: bytes, header_length: int | None = None) -> InferRequest:
        """The request in a body. header_length: bytes of its JSON part (the Inference-Header-Content-Length header), None: all.

        The body must outlive the request: binary inputs are views of it. Raises BadRequest, which says what is wrong.
        """
        return finish(self.steps(body, header_length))

    def steps(self, body: bytes, header_length: int | None = None) -> Steps[InferRequest]:
        """`read` as work in steps: the first one checks all but numbers in large JSON, each of the others reads some of those."""
        if header_length is not None and not 0 <= header_length <= len(body):
            raise BadRequest(f"Inference-Header-Content-Length is {header_length}, and the body has {len(body)} bytes")
        what = "the body" if header_length is None else "the JSON part of the body"
        position = len(body) if header_length is None else header_length
        if position <= SMALL:
            header: Any = parse_json(memoryview(body)[:position], what)
        else:
            header = parse_around(body, position, what, len(self._inputs), SMALL + self._room)
        if type(header) is not dict:
            raise BadRequest("the request must be a JSON object with 'inputs'")
        id = header.get("id", "")
        if type(id) is not str or len(id) > 1024:
            raise BadRequest("'id' must be a string of at most 1024 characters")
        parameters = _object(header, "parameters", "the request")
        tensors = header.get("inputs")
        if type(tensors) is not list or len(tensors) != len(self._inputs):
            raise BadRequest(f"'inputs' must be a list of the model's {len(self._inputs)} input(s): {self._names()}")
        inputs: list[npt.NDArray[Any] | _Unread | None] = [None] * len(self._inputs)
        samples = 0
        for tensor in tensors:
            at, array, position, own = self._tensor(tensor, body, position)
            if inputs[at] is not None:
                raise BadRequest(f"input '{self._inputs[at].name}' is there twice")
            if own and samples and own != samples:
                raise BadRequest(f"the inputs differ in their batch: {samples} and {own} samples")
            inputs[at], samples = array, own or samples
        if position != len(body):
            raise BadRequest(f"{len(body) - position} bytes follow the last input's data")
        request = InferRequest(
            id,
            inputs,  # type: ignore[arg-type]  # as many distinct ones as there are places, so none is missing
            samples or 1,
            self._requested(header, parameters),
            _milliseconds(parameters, "slo_ms"),
            _microseconds(parameters, "timeout"),
            _ratio(parameters),
        )
        for at, waiting in enumerate(inputs):
            if isinstance(waiting, _Unread):
                request.inputs[at] = yield from waiting.steps()
        return request

    def _names(self) -> str:
        return ", ".join(f"'{t.name}'" for t in self._inputs)

    def _tensor(self, tensor: Any, body: bytes, position: int) -> tuple[int, npt.NDArray[Any] | _Unread, int, int]:
        """(place, array, end of its data in the body, samples) of one entry of `inputs`."""
        if type(tensor) is not dict:
            raise BadRequest("every entry of 'inputs' must be an object")
        name = tensor.get("name")
        if type(name) is not str or name not in self._places:
            raise BadRequest(f"the model has no input {_shown(name)}: it takes {self._names()}")
        at = self._places[name]
        expected = self._inputs[at]
        datatype = tensor.get("datatype")
        if datatype != expected.datatype:
            hint = "" if datatype in list(DATATYPES) else f"; known types are {', '.join(DATATYPES)}"
            raise BadRequest(
                f"input '{name}' has datatype {_shown(datatype)}, the model takes {expected.datatype}{hint}"
            )
        shape = tensor.get("shape")
        if type(shape) is not list or not all(type(d) is int for d in shape) or (samples := expected.samples(shape)) < 0:
            wanted = [f"{'' if expected.factor == 1 else expected.factor}N" if d < 0 else d for d in expected.shape]
            raise BadRequest(
                f"input '{name}' has shape {_shown(shape)}, the model takes [{', '.join(map(str, wanted))}] (N = samples, at "
                "least 1)"
            )
        if samples > self.max_samples:  # before anything is computed with the shape
            raise BadRequest(
                f"input '{name}' holds {samples} samples, and this model takes at most {self.max_samples} at once: split it"
            )
        parameters = _object(tensor, "parameters", f"input '{name}'")
        if "shared_memory_region" in parameters:
            raise BadRequest(f"input '{name}': shared memory regions are not offered; send the data in the body")
        size = parameters.get("binary_data_size")
        count = math.prod(shape)
        if size is None:
            data = tensor.get("data")
            if isinstance(data, Text):
                return at, _Unread(expected, data, shape), position, samples
            return at, _from_json(expected, data, shape, count), position, samples
        if type(size) is not int or size != count * expected.dtype.itemsize:
            raise BadRequest(
                f"input '{name}' of shape {shape} has {count * expected.dtype.itemsize} bytes, 'binary_data_size' says "
                f"{_shown(size)}"
            )
        if "data" in tensor:
            raise BadRequest(f"input '{name}' has both 'data' and 'binary_data_size': send one of them")
        if position + size > len(body):
            raise BadRequest(
                f"input '{name}': the body ends {position + size - len(body)} bytes too early (is "
                "Inference-Header-Content-Length right?)"
            )
        if expected.dtype.kind == "b":
            raw = np.frombuffer(body, np.uint8, count, position)
            if raw.max() > 1:
                raise BadRequest(f"input '{name}': a BOOL is a byte of 0 or 1")
        array = np.frombuffer(body, expected.dtype, count, position).reshape(shape)
        return at, array, position + size, samples

    def _requested(self, header: dict[str, Any], parameters: dict[str, Any]) -> list[tuple[int, bool]]:
        binary = _flag(parameters, "binary_data_output", False, "the request")
        outputs = header.get("outputs")
        if outputs is None or outputs == []:
            return [(at, binary) for at in range(len(self._outputs))]
        if type(outputs) is not list:
            raise BadRequest("'outputs' must be a list")
        result: dict[int, bool] = {}
        for output in outputs:
            name = output.get("name") if type(output) is dict else None
            if type(name) is not str or name not in self._outputs:
                have = ", ".join(f"'{n}'" for n in self._outputs)
                raise BadRequest(f"the model has no output {_shown(name)}: it gives {have}")
            if self._outputs[name] in result:
                raise BadRequest(f"output '{name}' is asked for twice")
            own = _object(output, "parameters", f"output '{name}'")
            for unknown in ("classification", "shared_memory_region"):
                if unknown in own:
                    raise BadRequest(f"output '{name}': '{unknown}' is not offered; ask for the tensor itself")
            result[self._outputs[name]] = _flag(own, "binary_data", binary, f"output '{name}'")
        return list(result.items())


@dataclass(frozen=True, slots=True)
class _Unread:
    """An input whose numbers are still text. shape: fits the model."""

    expected: _Input
    text: Text
    shape: list[int]

    def steps(self) -> Steps[npt.NDArray[Any]]:
        expected, shape = self.expected, self.shape
        try:
            return (yield from read_numbers(self.text, shape, expected.dtype, _NUMBERS[expected.dtype.kind]))
        except OverflowError:
            raise _too_large(expected) from None
        except ValueError:
            raise _wrong_values(expected, shape) from None


def _wrong_values(expected: _Input, shape: list[int]) -> BadRequest:
    return BadRequest(
        f"input '{expected.name}' of shape {shape}: 'data' must hold {math.prod(shape)} {expected.datatype} values, in a flat "
        "list or nested as the shape is"
    )


def _too_large(expected: _Input) -> BadRequest:
    return BadRequest(f"input '{expected.name}': 'data' holds a number that {expected.datatype} cannot")


def _from_json(expected: _Input, data: Any, shape: list[int], count: int) -> npt.NDArray[Any]:
    """The array of a `data` list, flat or nested as the shape is."""
    name = expected.name
    if type(data) is not list:
        raise BadRequest(f"input '{name}' has no 'data' list (nor 'binary_data_size', for data that follow the JSON)")
    flat, wrong = data, _wrong_values(expected, shape)
    if data and type(data[0]) is list:
        for depth in range(len(shape)):  # every level whole: NumPy would guess at what strings and mixtures mean
            if len(flat) != math.prod(shape[: depth + 1]):
                raise wrong
            if depth + 1 < len(shape):
                if set(map(type, flat)) != {list} or set(map(len, flat)) != {shape[depth + 1]}:
                    raise wrong
                flat = list(itertools.chain.from_iterable(flat))
    if len(flat) != count or not set(map(type, flat)) <= _NUMBERS[expected.dtype.kind]:
        raise wrong
    try:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused where all inputs are checked for it
            return np.array(flat, expected.dtype).reshape(shape)
    except (OverflowError, ValueError):
        raise _too_large(expected) from None


def _object(value: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    found = value.get(key)
    if found is None:
        return {}
    if type(found) is not dict:
        raise BadRequest(f"'{key}' of {where} must be an object")
    return found


def _flag(value: dict[str, Any], key: str, default: bool, where: str) -> bool:
    found = value.get(key, default)
    if type(found) is not bool:
        raise BadRequest(f"'{key}' of {where} must be true or false")
    return found


def _number(parameters: dict[str, Any], key: str) -> float | None:
    value = parameters.get(key)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise BadRequest(f"parameter '{key}' must be a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRequest(f"parameter '{key}' must be finite")
    return number


def _milliseconds(parameters: dict[str, Any], key: str) -> float | None:
    """Seconds of a parameter in milliseconds."""
    value = _number(parameters, key)
    if value is None:
        return None
    if not 0 < value <= MOST_MILLISECONDS:
        raise BadRequest(f"parameter '{key}' must lie above 0 and at most at {MOST_MILLISECONDS:.0f}, got {value:g}")
    return value / 1000.0


def _microseconds(parameters: dict[str, Any], key: str) -> float | None:
    """Seconds of a parameter in microseconds, as public clients send `timeout`; 0 means none."""
    value = _number(parameters, key)
    if value is None or value == 0:
        return None
    if not 0 < value <= 1000 * MOST_MILLISECONDS:
        raise BadRequest(f"parameter '{key}' must lie within 0 and {1000 * MOST_MILLISECONDS:.0f}, got {value:g}")
    return value / 1e6


def _ratio(parameters: dict[str, Any]) -> float | None:
    value = _number(parameters, "max_ratio")
    if value is not None and not 0 <= value <= 1:
        raise BadRequest(f"parameter 'max_ratio' must lie in 0..1, got {value:g}")
    return value


def _shown(value: Any) -> str:
    """A caller's value in a message: short, and never in full."""
    if isinstance(value, str):
        return f"'{value[:60]}'"
    if isinstance(value, (dict, list)):
        if isinstance(value, list) and len(value) <= 8 and all(type(v) is int and abs(v) < 1 << 53 for v in value):
            return str(value)
        return f"a {'list' if isinstance(value, list) else 'object'}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number beyond 64 bits"
    return str(value)
