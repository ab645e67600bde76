"""Names and texts that are safe inside C sources, whatever the model file calls its nodes."""

from __future__ import annotations

import re

from bitdial.errors import ExportError

_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while asm typeof and or "
    "not xor bool true false class new delete this namespace template try catch throw using virtual operator public "
    "private protected friend explicit export mutable main".split()
)
# A NAME.h of one of these names would hide the header of the C library.
_HEADERS = frozenset(
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic "
    "stdbool stddef stdint stdio stdlib string tgmath threads time uchar wchar wctype arm_neon arm_mve arm_acle".split()
)
MAX_NAME = 40


def check_name(name: str) -> str:
    """The name of the C module, as it is. Raises ExportError where it cannot name files and functions."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name, re.ASCII) or len(name) > MAX_NAME:
        raise ExportError(
            f"--name {name[:80]!r} cannot name C functions: use a letter, then letters, digits and underscores, at most "
            f"{MAX_NAME} in all"
        )
    lower = name.lower()
    if lower in _KEYWORDS or lower in _HEADERS or lower.startswith("fq_") or lower in ("fq", "bitdial"):
        raise ExportError(f"--name {name} means something else in C or in the exported code; choose another name")
    return name


def comment(text: str, limit: int = 80) -> str:
    """Text for a C comment: anything that could end it, continue it or spell a trigraph becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_.,:;=+ ()\[\]%-]", "_", text)[:limit]
