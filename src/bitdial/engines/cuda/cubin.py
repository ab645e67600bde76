"""What the machine code says of each kernel: registers of a thread, and bytes that it puts aside for want of registers."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bitdial.errors import EngineError

REGISTERS, FRAME = 0x2F, 0x11  # attributes in the section .nv.info: of a symbol each
_SIZED = 4  # the form of an attribute whose value follows, with its length


@dataclass(frozen=True)
class Resources:
    """registers: of a thread. stack: bytes of a thread in memory; 0 where nothing is spilled."""

    registers: int
    stack: int


def resources(code: bytes) -> dict[str, Resources]:
    """Of every kernel in a cubin, which is an ELF file. Raises EngineError for anything else."""
    try:
        return _resources(code)
    except (struct.error, IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise EngineError(f"this is no machine code of kernels: {error}") from None


def _resources(code: bytes) -> dict[str, Resources]:
    if code[:5] != b"\x7fELF\x02":
        raise ValueError("it does not begin as an ELF file of 64 bits")
    start = struct.unpack_from("<Q", code, 40)[0]
    size, count, names = struct.unpack_from("<HHH", code, 58)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, start + i * size) for i in range(count)]

    def text(section: int, at: int) -> str:
        begin = sections[section][4] + at
        return code[begin : code.index(b"\0", begin)].decode("ascii")

    found = {text(names, s[0]): s for s in sections}
    symbols, info = found[".symtab"], found[".nv.info"]
    attributes = _attributes(code[info[4] : info[4] + info[5]])
    kernels = {}
    for i in range(symbols[5] // 24):
        name = text(symbols[6], struct.unpack_from("<I", code, symbols[4] + i * 24)[0])
        if name and f".text.{name}" in found and (i, REGISTERS) in attributes:
            kernels[name] = Resources(attributes[i, REGISTERS], attributes.get((i, FRAME), 0))
    return kernels


def _attributes(data: bytes) -> dict[tuple[int, int], int]:
    """(symbol, attribute) -> value."""
    found, at = {}, 0
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        if form == _SIZED and size == 8:
            symbol, value = struct.unpack_from("<II", data, at + 4)
            found[symbol, attribute] = value
        at += 4 + (size if form == _SIZED else 0)
    return found
