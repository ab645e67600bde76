"""The register map as Markdown, from the source that hardware and compiler use."""

from __future__ import annotations

import enum
import inspect
import re

from bitdial.engines.npu import words


def tables() -> str:
    """Registers, memories, faults, operations and settings, each with what the source's own comments say."""
    parts = []
    for kind, title in (
        (words.Register, "Registers"), (words.Memory, "Memories (SELECT)"), (words.Fault, "Error bits of STATUS"),
        (words.Operation, "Operations (bits 28..31)"), (words.Setting, "Settings (SET, bits 20..27)"),
    ):  # fmt: skip
        parts.append(f"**{title}.** {' '.join((kind.__doc__ or '').split())}\n\n{_rows(kind)}")
    return "\n\n".join(parts)


def _rows(kind: type[enum.IntEnum]) -> str:
    told = dict(re.findall(r"^    (\w+) = \d+(?:  # (.*))?$", inspect.getsource(kind), re.MULTILINE))
    return "\n".join(["| | name | |", "|---|---|---|", *(f"| {m.value} | {m.name} | {told.get(m.name, '')} |" for m in kind)])
