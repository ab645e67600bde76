"""Proofs by Yosys that the combinational parts are what plain Verilog says: for all inputs, not for samples."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from amaranth.back import verilog

from rtl.edges import Extract, Foot
from rtl.element import DualProduct
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
PARTS: dict[str, tuple[Any, str]] = {
    "product": (DualProduct, PRODUCT),
    "extract": (Extract, EXTRACT),
    "foot": (lambda: Foot(22), FOOT),
}


def prove(part: str, spec: str | None = None) -> bool:
    """Whether a part equals its specification (None: its own) for every input. Raises RuntimeError where the tool fails."""
    os.environ.setdefault("YOSYS", yosys())
    make, own = PARTS[part]
    made = make()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "part.v").write_text(verilog.convert(made, name="part", ports=made.ports()))
        Path(folder, "spec.v").write_text(own if spec is None else spec)
        script = (
            "read_verilog part.v spec.v; proc; flatten part; opt; miter -equiv -flatten part spec miter; hierarchy -top miter; "
            "opt -full; sat -verify -prove trigger 0 miter"
        )
        done = subprocess.run(
            [yosys(), "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False
        )
    if done.returncode and "proof did fail" not in done.stdout + done.stderr:
        raise RuntimeError(f"yosys: {(done.stderr or done.stdout)[-2000:]}")
    return done.returncode == 0
