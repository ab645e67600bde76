"""Segments: the runs of channels inside which any permutation leaves every slice, concat and reshape valid.

Two neighbouring channels belong to one segment if they are neighbours, in this order, wherever either of them occurs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.layout.labels import Ids

Order = npt.NDArray[np.int64]


def components(n: int, pairs: Iterable[tuple[Ids, Ids]]) -> Ids:
    """Connected components: int64 [n], the smallest member of each element's component."""
    joined = list(pairs)
    parent = np.arange(n, dtype=np.int64)
    if not joined:
        return parent
    a = np.concatenate([p for p, _ in joined])
    b = np.concatenate([q for _, q in joined])
    while True:
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        open_ = low != high
        if not open_.any():
            return parent
        a, b, low, high = a[open_], b[open_], low[open_], high[open_]
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]


@dataclass
class Rows:
    """Classes of one value along its moving sub-axis, and where each position comes from.

    classes: int64 [rows, C], class per position, or FROZEN or ZERO. order: int64 [rows, C], old position per new one.
    """

    classes: Ids
    order: Order

    @staticmethod
    def of(classes: Ids) -> Rows:
        return Rows(classes, np.broadcast_to(np.arange(classes.shape[1]), classes.shape).copy())

    def rearrange(self, index: Order) -> None:
        """New position p takes what was at index[row, p]."""
        self.classes = np.take_along_axis(self.classes, index, axis=1)
        self.order = np.take_along_axis(self.order, index, axis=1)


@dataclass
class Segments:
    """Segments of length two and more.

    members: list of int64 arrays, classes in order. of, index: int64 [n classes], segment of a class (-1: none) and
    its place.
    """

    members: list[Ids]
    of: Ids
    index: Ids


def find_segments(rows: Iterable[Ids], frozen: npt.NDArray[np.bool_]) -> Segments:
    """Segments of classes over all `rows` (each [n, C]). frozen: bool [n classes], classes that must not move."""
    n = len(frozen)
    unique: dict[bytes, Ids] = {}
    for block in rows:
        for row in block:
            unique.setdefault(row.tobytes(), row)
    before: list[Ids] = []
    after: list[Ids] = []
    border = np.array([-1], np.int64)
    for row in unique.values():
        before.append(np.concatenate([border, row]))
        after.append(np.concatenate([row, border]))
    left = np.concatenate(before) if before else border
    right = np.concatenate(after) if after else border
    successor = _unanimous(left, right, n)
    predecessor = _unanimous(right, left, n)
    movable = ~frozen
    movable[0] = False
    heads = np.flatnonzero(successor > 0)
    ok = movable[heads] & movable[successor[heads]] & (predecessor[successor[heads]] == heads)
    follower = np.zeros(n, np.int64)
    follower[heads[ok]] = successor[heads[ok]]
    followed = np.zeros(n, bool)
    followed[follower[follower > 0]] = True
    of = np.full(n, -1, np.int64)
    index = np.zeros(n, np.int64)
    members: list[Ids] = []
    for first in np.flatnonzero((follower > 0) & ~followed):
        chain, current = [], int(first)
        while current:
            chain.append(current)
            current = int(follower[current])
        segment = np.array(chain, np.int64)
        of[segment], index[segment] = len(members), np.arange(len(segment))
        members.append(segment)
    return Segments(members, of, index)


def _unanimous(key: Ids, value: Ids, n: int) -> Ids:
    """Per class the one value found beside it everywhere, or -1; int64 [n]."""
    valid = key > 0
    pairs = np.unique(np.stack([key[valid], np.maximum(value[valid], -1)]), axis=1)
    result = np.full(n, -1, np.int64)
    counts = np.bincount(pairs[0], minlength=n)
    single = counts[pairs[0]] == 1
    result[pairs[0][single]] = pairs[1][single]
    return result


def sort_segments(segments: Segments, keys: npt.NDArray[np.float64]) -> list[Order]:
    """Per segment int64 [length]: old place of each new place, ascending by key and stable.

    keys: float64 [n classes]; NaN where no consumer cares. A segment without any key keeps its order. Ascending, so
    that the short group at the end, if there is one, takes the widest channels and the others stay narrow.
    """
    result = []
    for segment in segments.members:
        key = keys[segment]
        known = ~np.isnan(key)
        if not known.any():
            result.append(np.arange(len(segment)))
            continue
        result.append(np.argsort(np.where(known, key, -np.inf), kind="stable"))
    return result


def apply_segments(rows: Rows, segments: Segments, sorting: list[Order]) -> None:
    """Permute every occurrence of every segment in `rows`."""
    flat = np.concatenate(sorting) if sorting else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(s) for s in sorting])]).astype(np.int64)
    classes = np.maximum(rows.classes, 0)
    segment = np.where(rows.classes > 0, segments.of[classes], -1)
    inside = segment >= 0
    place = segments.index[classes]
    position = np.broadcast_to(np.arange(rows.classes.shape[1]), rows.classes.shape)
    shift = np.zeros_like(position)
    shift[inside] = flat[starts[segment[inside]] + place[inside]] - place[inside]
    rows.rearrange(position + shift)
