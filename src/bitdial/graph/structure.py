"""How a network's outputs nest and what they are called: plain data in the graph, Python containers for the caller.

A structure is None (one value, or a tuple of values: what engines return as it is) or a list, nested as the outputs are:

  ["list", [part, ..]]   ["tuple", [part, ..]]   ["dict", [[key, part], ..]]          keys are strings or integers
  ["named", [[name, part], ..]]     a named tuple: comes back as `NamedOutputs`
  ["record", [[name, part], ..]]    a dataclass, such as the ModelOutput of transformers: comes back as `RecordOutputs`

A part is a list of these, an integer (an output of the graph, by position; each occurs once) or None (the network returned
None there). No file names a class: whatever the network's own was, these come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bitdial.errors import GraphError

MAX_NESTING = 16
_KEYED = ("dict", "named", "record")


class NamedOutputs(tuple[Any, ...]):
    """A tuple whose parts have names as well: `out.boxes`, `out[0]`, `boxes, scores = out`. `_fields` lists the names."""

    _fields: tuple[str, ...]

    def __new__(cls, names: Sequence[str], values: Iterable[Any]) -> NamedOutputs:
        self = super().__new__(cls, values)
        self._fields = tuple(names)
        return self

    def __getnewargs__(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        return self._fields, tuple(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise AttributeError(f"no output '{name}': there are {', '.join(self.__dict__.get('_fields', ()))}")
        return self[self._fields.index(name)]

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        return f"NamedOutputs({', '.join(f'{k}={v!r}' for k, v in self._asdict().items())})"


class RecordOutputs(dict[Any, Any]):
    """A dict whose parts are attributes and have positions as well: `out["logits"]`, `out.logits`, `out[0]`."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self:
            raise AttributeError(f"no output '{name}': there are {', '.join(self)}")
        return self[name]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def describe(value: Any, parts: Callable[[Any], list[Any]]) -> Any:
    """The structure of what a network returned, its tensors replaced by integers. Raises ValueError if it is nested too deep.

    parts: what lies directly in a container of a kind unknown here, which comes back as a tuple, as do dicts with keys other
    than strings and integers.
    """
    top = _part(value, parts, 0)
    if isinstance(top, int) or (top[0] == "tuple" and len(top[1]) > 1 and all(isinstance(p, int) for p in top[1])):
        return None
    return top


def _part(value: Any, parts: Callable[[Any], list[Any]], depth: int) -> Any:
    if value is None or isinstance(value, int):
        return value
    if depth >= MAX_NESTING:
        raise ValueError(f"the outputs are nested deeper than {MAX_NESTING} levels")
    kind, named = "", None  # type: str, Mapping[Any, Any] | None
    record = dataclasses.is_dataclass(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind, named = "named", dict(zip(value._fields, value, strict=True))
    elif isinstance(value, Mapping) and all(type(k) in ((str,) if record else (str, int)) for k in value):
        kind, named = "record" if record else "dict", value
    elif record:
        kind, named = "record", {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if named is not None:
        return [kind, [[k, _part(v, parts, depth + 1)] for k, v in named.items()]]
    plain = type(value) in (list, tuple)
    inner = list(value) if plain else parts(value)
    return [type(value).__name__ if plain else "tuple", [_part(v, parts, depth + 1) for v in inner]]


def check_structure(structure: Any, n_outputs: int) -> None:
    """Raise GraphError if a structure, perhaps from a file, is malformed or does not hold every output once."""
    if structure is None:
        return
    found: list[int] = []
    if not _check(structure, found, 0) or not isinstance(structure, list) or sorted(found) != list(range(n_outputs)):
        raise GraphError(f"the structure of the outputs is malformed, or does not hold each of the {n_outputs} once")


def _check(part: Any, found: list[int], depth: int) -> bool:
    if part is None:
        return True
    if type(part) is int:
        found.append(part)
        return True
    if not isinstance(part, list) or len(part) != 2 or depth >= MAX_NESTING or not isinstance(part[1], list):
        return False
    kind, inner = part
    if kind in ("list", "tuple"):
        return all(_check(p, found, depth + 1) for p in inner)
    if kind not in _KEYED or not all(isinstance(pair, list) and len(pair) == 2 for pair in inner):
        return False
    keys = [pair[0] for pair in inner]
    kinds = (str, int) if kind == "dict" else (str,)
    if not all(type(k) in kinds for k in keys) or len(set(keys)) != len(keys):
        return False
    return all(_check(p, found, depth + 1) for _, p in inner)


def restore(structure: Any, outputs: Any) -> Any:
    """What an engine returned (one output, or a tuple of several), nested and named as the network's own outputs."""
    if structure is None:
        return outputs
    return _restore(structure, outputs if isinstance(outputs, tuple) else (outputs,))


def _restore(part: Any, outputs: tuple[Any, ...]) -> Any:
    if part is None or isinstance(part, int):
        return part if part is None else outputs[part]
    kind, inner = part
    if kind in ("list", "tuple"):
        values = [_restore(p, outputs) for p in inner]
        return values if kind == "list" else tuple(values)
    items = {k: _restore(p, outputs) for k, p in inner}
    if kind == "named":
        return NamedOutputs(list(items), items.values())
    return items if kind == "dict" else RecordOutputs(items)


def output_names(structure: Any, outputs: Sequence[str]) -> list[str]:
    """A distinct name for every output: its path in the structure ("logits", "hidden.0") where it has one with a name in it,
    else that of the graph's value. outputs: the graph's."""
    paths: dict[int, str] = {}

    def walk(part: Any, path: tuple[Any, ...]) -> None:
        if isinstance(part, int):
            if any(isinstance(key, str) for key in path):
                paths[part] = ".".join(map(str, path))
        elif part is not None:
            kind, inner = part
            for key, value in inner if kind in _KEYED else enumerate(inner):
                walk(value, (*path, key))

    walk(structure, ())
    names: list[str] = []
    for position, value in enumerate(outputs):
        name, k = paths.get(position) or value, 1
        while name in names:
            k += 1
            name = f"{paths.get(position) or value}_{k}"
        names.append(name)
    return names
