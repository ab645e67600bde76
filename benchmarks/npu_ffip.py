"""The systolic arrays of Pogue and Nicolici (arXiv 2311.12224) under the flow of npu_area.py, from a checkout of their sources
(github.com/trevorpogue/algebraic-nnhw), of which nothing is kept here.

Their module `mxu` is read as it is (by the slang front end of Yosys 0.70): skewing registers, double-buffered weights, products,
and for FIP and FFIP the row that sums a1 a2 and its subtraction at every column. The sums of w1 w2 they add to the bias by
software. What their sources leave to Intel, a DSP block of two multipliers, is the module below: two products, one adder, one
register. Signed 8-bit activations and weights.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from bitdial.errors import DataError
from npu_synthesis import ecp5, gates

METHODS = {"baseline": 0, "FIP": 2, "FFIP": 1}  # as their package has them
SOURCES = ("top/pkg.sv", "top/utils.sv", "arith/matrix.sv", "top/if.sv", "arith/mac_array.sv", "arith/mxu.sv")
DSP = """
module {name}(input signed [{x}:0] ax, ay, bx, by, {chain} output signed [{c}:0] resulta, output signed [63:0] chainout,
              input clk0, clk1, clk2, aclr0, aclr1, ena);
  reg signed [{c}:0] sum;
  always @(posedge clk0) sum <= ax * ay + bx * by {plus};
  assign resulta = sum;
  assign chainout = sum;
endmodule
"""
TIMED = """
module timed(input clk, input resetn, input bit_in, output reg parity);
  reg [{width}:0] chain;
  reg [{results}:0] kept;
  wire [{results}:0] c;
  always @(posedge clk) begin
    chain <= {{chain, bit_in}};
    kept <= c;
    parity <= ^kept;
  end
  mxu #(.FIP_METHOD({method}), .SZI({n}), .SZJ({n})) unit(.a(chain[{n8}-1:0]), .b(chain[2*{n8}-1:{n8}]),
    .ainfo(chain[2*{n8}+6:2*{n8}]), .binfo(chain[2*{n8}+13:2*{n8}+7]), .c(c), .cinfo(), .clk(clk), .resetn(resetn));
endmodule
"""


def measure(checkout: Path, method: str, n: int, route: bool) -> dict[str, Any]:
    """Area of their n x n array, and its frequency with `route`. Raises DataError for a folder without their sources."""
    if missing := [name for name in SOURCES if not (checkout / "rtl" / name).is_file()]:
        raise DataError(f"{checkout} is no checkout of algebraic-nnhw: rtl/{missing[0]} is missing")
    bits = (n - 1).bit_length()
    x, c = (7, 15 + bits) if method == "baseline" else (8, 16 + bits)  # highest bits of operands and sums
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(checkout / "rtl", Path(folder, "rtl"))
        dsp = DSP.format(name="dsp_nochainin", x=x, c=c, chain="", plus="") + DSP.format(
            name="dsp_chainin", x=x, c=c, chain="input signed [63:0] chainin,", plus=f"+ $signed(chainin[{c}:0])"
        )
        Path(folder, "dsp.sv").write_text(dsp)
        timed = TIMED.format(method=METHODS[method], n=n, n8=8 * n, width=16 * n + 13, results=n * (c + 1) - 1)
        Path(folder, "timed.sv").write_text(timed)
        sources = " ".join(f"rtl/{name}" for name in SOURCES)

        def read(top: str, more: str) -> str:
            return (
                f"read_slang --threads 1 --allow-hierarchical-const --top {top} -I rtl/top -I rtl/arith {more} {sources} dsp.sv"
            )

        found = gates(folder, read("mxu", f"-G FIP_METHOD={METHODS[method]} -G SZI={n} -G SZJ={n}"), "mxu")
        return {**found, **ecp5(folder, read("timed", "timed.sv"), "timed", route)}
