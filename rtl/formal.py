"""Proofs by Yosys that the parts are what plain Verilog says: for all inputs (and states), not for samples."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from amaranth.back import verilog

from rtl.edges import Extract, Foot
from rtl.element import DualProduct, Element
from rtl.tools import yosys

PRODUCT = """
module spec(input [7:0] a, input [7:0] w, input low, input sign, output signed [16:0] product);
  wire signed [8:0] whole = {sign & a[7], a};
  wire signed [4:0] upper = {sign & a[7], a[7:4]}, lower = {sign & a[3], a[3:0]};
  wire signed [7:0] weight = w;
  wire signed [3:0] w_upper = w[7:4], w_lower = w[3:0];
  assign product = low ? upper * w_upper + lower * w_lower : whole * weight;
endmodule
"""
EXTRACT = """
module spec(input [7:0] x, input [2:0] shift, input sign, output [3:0] low);
  wire signed [8:0] whole = {sign & x[7], x};
  wire signed [8:0] floor = whole >>> shift;
  wire [8:0] rest = whole - (floor <<< shift);
  wire [8:0] twice = rest << 1, one = 9'd1 << shift;
  wire signed [9:0] rounded = floor + ((twice > one || (twice == one && floor[0])) ? 10'sd1 : 10'sd0);
  wire signed [9:0] top = sign ? 10'sd7 : 10'sd15, bottom = sign ? -10'sd7 : 10'sd0;
  assign low = rounded > top ? top : rounded < bottom ? bottom : rounded;
endmodule
"""
FOOT = """
module spec(input signed [21:0] p, input [3:0] shift, input low, output signed [31:0] shifted);
  wire signed [31:0] wide = p;
  assign shifted = low ? wide * (32'sd1 <<< shift) : wide;
endmodule
"""
# Around the product, which is proved by itself.
ELEMENT = r"""
module spec(input clk, input rst, input [7:0] a_i, input low_i, input sign_i, input swap_i, input [7:0] w_i, input load,
            input signed [21:0] p_i, output reg [7:0] a_o, output reg low_o, output reg sign_o, output reg swap_o,
            output reg signed [21:0] p_o);
  reg [7:0] waiting, weight;
  wire signed [16:0] product;
  \part.multiply  multiply(.a(a_i), .w(weight), .low(low_i), .sign(sign_i), .product(product));
  always @(posedge clk) begin
    {a_o, low_o, sign_o, swap_o} <= {a_i, low_i, sign_i, swap_i};
    p_o <= p_i + product;
    if (load) waiting <= w_i;
    if (swap_i) weight <= waiting;
    if (rst) {a_o, low_o, sign_o, swap_o, p_o, waiting, weight} <= 0;
  end
endmodule
"""
PARTS: dict[str, tuple[Any, str]] = {
    "product": (DualProduct, PRODUCT),
    "extract": (Extract, EXTRACT),
    "foot": (lambda: Foot(22), FOOT),
}


def prove(part: str, spec: str | None = None) -> bool:
    """Whether a part equals its specification (None: its own) for every input. Raises RuntimeError where the tool fails."""
    make, own = PARTS[part]
    script = (
        "proc; flatten part; opt; miter -equiv -flatten part spec miter; hierarchy -top miter; opt -full; "
        "sat -verify -prove trigger 0 miter"
    )
    return _run(make(), own if spec is None else spec, script, "proof did fail")


def prove_element(spec: str | None = None) -> bool:
    """Whether the element, registers and all, equals its specification: outputs and next states, from any state."""
    script = (
        "setattr -mod -unset top part; proc; flatten; opt_clean; dffunmap; equiv_make part spec both; hierarchy -top both; "
        "opt_clean; equiv_struct; equiv_simple -undef; equiv_induct -undef; equiv_status -assert"
    )
    return _run(Element(22), ELEMENT if spec is None else spec, script, r"Found \d+ unproven .equiv cells")


def _run(part: Any, spec: str, script: str, failure: str) -> bool:
    os.environ.setdefault("YOSYS", yosys())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "part.v").write_text(verilog.convert(part, name="part", ports=part.ports()))
        Path(folder, "spec.v").write_text(spec)
        command = [yosys(), "-q", "-p", f"read_verilog part.v spec.v; {script}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and not re.search(failure, done.stdout + done.stderr):
        raise RuntimeError(f"yosys: {(done.stderr or done.stdout)[-2000:]}")
    return done.returncode == 0
