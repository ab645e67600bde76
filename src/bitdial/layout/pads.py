"""Zero-padded shortcuts (option A of the ResNet paper): pad nodes with zeros before and after the channels.

The main path then holds [X, W, Y], where W moves with the channels of the stage before and X and Y are free. X and Y
could not be sorted together. Moving W to the front, [W, X, Y], joins them and keeps the groups of W aligned with the
stage before; the pad puts all its zeros after the channels. In ResNet-20 with groups of 16 the groups of stage 2 are
then the channels of stage 1 and the 16 free ones, those of stage 3 continue likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitdial.graph.ir import Graph, Node
from bitdial.layout.labels import ZERO, Ids
from bitdial.layout.propagate import Propagation
from bitdial.layout.segments import Order, Rows

_NARROW, _PADDED, _WIDE = 1, 2, 3


def lift_pads(
    graph: Graph,
    state: Propagation,
    rows: dict[str, Rows],
    windows: Sequence[tuple[str, Rows]],
    frozen: npt.NDArray[np.bool_],
    wanted: npt.NDArray[np.bool_],
) -> dict[str, int]:
    """Move the channels of zero-padded shortcuts to the front wherever that is valid; rows and windows change in
    place.

    frozen, wanted: bool [n classes]; classes that must stay, and classes whose order matters to a layer.
    Returns pad node name -> axis whose zeros all go behind. A pad whose precondition fails stays as it is.
    """
    lifted: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "pad" or node.name not in rows or node.name in lifted:
            continue
        labels = state.labels[node.name]
        axis = labels.moving_axis
        assert axis is not None
        before, after = node.attrs["pads"][axis]
        if before == 0 or after == 0 or node.attrs.get("value", 0.0) != 0.0 or len(labels.axes[axis]) != 1:
            continue
        lift = _Lift.find(rows, node, before, after)
        if lift is None or frozen[lift.run].any() or not wanted[lift.free].any():
            continue
        lifted.update(dict.fromkeys(lift.apply(graph, state, rows, windows) or (), axis))
    return lifted


class _Lift:
    """One rewrite: the run [X, W, Y] of classes becomes [W, X, Y]; the padded row [0, W, 0] becomes [W, 0, 0]."""

    def __init__(self, run: Ids, before: int, width: int) -> None:
        self.run, self.before, self.width = run, before, width
        self.inner = run[before : before + width]
        self.free = np.concatenate([run[:before], run[before + width :]])
        self.padded = np.full(len(run), ZERO, np.int64)
        self.padded[before : before + width] = self.inner
        place = np.arange(len(run))
        self.index = np.concatenate([place[before : before + width], place[:before], place[before + width :]])

    @staticmethod
    def find(rows: dict[str, Rows], node: Node, before: int, after: int) -> _Lift | None:
        padded = rows[node.name].classes
        inner = padded[0, before : padded.shape[1] - after]
        if (padded != padded[0]).any() or (inner <= 0).any():
            return None
        for candidate in rows.values():
            if candidate.classes.shape[1] != padded.shape[1]:
                continue
            row = candidate.classes[0]
            if np.array_equal(row[before : before + len(inner)], inner) and (row > 0).all():
                return _Lift(row.copy(), before, len(inner)) if len(np.unique(row)) == len(row) else None
        return None

    def apply(
        self, graph: Graph, state: Propagation, rows: dict[str, Rows], windows: Sequence[tuple[str, Rows]]
    ) -> list[str] | None:
        """Check the precondition everywhere, then rewrite. Returns the pads to change, or None (nothing changed)."""
        kinds: dict[str, int] = {}
        changes: list[tuple[Rows, Order]] = []
        for value, block in rows.items():
            kind = self._classify(block, changes)
            if kind is None:
                return None
            kinds[value] = kind
        for value, block in windows:
            kind = self._classify(block, changes)
            if kind is None or kinds.get(value) == _PADDED or (kind == _NARROW and kinds.get(value) == _WIDE):
                return None
        producers = graph.producers()
        pads: list[str] = []
        for name, values in state.flows:
            touched = {kinds.get(v, 0) for v in values} - {0}
            if _NARROW not in touched or touched == {_NARROW}:
                continue
            node = producers[name]
            is_pad = node.op == "pad" and kinds.get(name) == _PADDED and kinds.get(node.inputs[0]) == _NARROW
            if not is_pad:
                return None  # a slice or concat takes W out of the run, or puts it in
            pads.append(name)
        for block, index in changes:
            block.rearrange(index)
        return pads

    def _classify(self, block: Rows, changes: list[tuple[Rows, Order]]) -> int | None:
        """0: holds none of the classes; else narrow, padded or wide; None: holds them in another arrangement."""
        index = np.broadcast_to(np.arange(block.classes.shape[1]), block.classes.shape).copy()
        found: set[int] = set()
        free, inner = np.isin(block.classes, self.free), np.isin(block.classes, self.inner)
        for r, row in enumerate(block.classes):
            starts = np.flatnonzero(row == self.run[0]) if free[r].any() else np.zeros(0, np.int64)
            if free[r].any():
                if free[r].sum() != len(starts) * len(self.free) or inner[r].sum() != len(starts) * self.width:
                    return None
                for start in starts:
                    if not np.array_equal(row[start : start + len(self.run)], self.run):
                        return None
                    index[r, start : start + len(self.run)] = start + self.index
                found.add(_WIDE)
            elif inner[r].any():
                padded = np.array_equal(row, self.padded)
                if padded:
                    index[r] = self.index
                found.add(_PADDED if padded else _NARROW)
        if len(found) > 1:
            return None
        kind = found.pop() if found else 0
        if kind in (_PADDED, _WIDE):
            changes.append((block, index))
        return kind
