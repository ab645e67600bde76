"""The unit as Verilog, for anyone's flow."""

from __future__ import annotations

import os

from amaranth.back import verilog

from bitdial.engines.npu.plan import Design
from bitdial.errors import DataError
from rtl.npu import Npu
from rtl.tools import yosys


def unit(design: Design) -> Npu:
    """The unit of a design's size."""
    return Npu(
        design.rows, design.columns, words=design.words, activations=design.activations, weights=design.weights,
        shifts=design.shifts, sums=design.sums,
    )  # fmt: skip


def verilog_text(design: Design) -> str:
    """Module `npu` with ports clk, rst and the register bus. Sizes are fixed in it; generate another for another size.

    Raises DataError without Yosys.
    """
    found = yosys()
    if not found:
        raise DataError("no Yosys here, which writes the Verilog: pip install bitdial[npu]")
    os.environ.setdefault("YOSYS", found)  # where Amaranth looks for it
    npu = unit(design)
    return str(verilog.convert(npu, name="npu", ports=npu.ports()))
