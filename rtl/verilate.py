"""The unit's Verilog in Verilator, driven over the register bus by a small C++ program that a pipe commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitdial.engines.npu.plan import Design
from bitdial.engines.npu.words import Memory, Register, Words
from rtl.simulate import Run
from rtl.verilog import verilog_text

DRIVER = Path(__file__).parent / "driver.cpp"


def build(design: Design, folder: Path, command: str) -> Path:
    """Verilog, C++ and the program, in `folder`. command: see `rtl.tools.verilator`.

    Raises RuntimeError with the tool's words where that fails.
    """
    (folder / "npu.v").write_text(verilog_text(design))
    done = subprocess.run(
        [command, "--cc", "--exe", "--build", "-O3", "-CFLAGS", "-O1", "--top-module", "npu", "-Wno-fatal", "-Wno-WIDTH",
         "-Wno-CASEINCOMPLETE", "-MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include",  # which the package from PyPI leaves empty
         "--Mdir", str(folder / "made"), "-o", "npu_run", str(folder / "npu.v"), str(DRIVER)],
        capture_output=True, text=True, check=False, env={**os.environ, "MAKEFLAGS": "-j1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"verilator: {done.stderr[-3000:]}")
    return folder / "made" / "npu_run"


class Verilated:
    """One running unit. The interface is that of `rtl.simulate.Simulated`; memory stays between runs."""

    def __init__(self, program: Path, design: Design) -> None:
        self.design = design
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Verilated:
        return self

    def __exit__(self, *problem: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        words: Words,
        activations: npt.NDArray[np.uint16],
        weights: npt.NDArray[np.uint8],
        shifts: npt.NDArray[np.uint8],
        entries: int,
    ) -> Run:
        """Fill the banks over the bus, start, wait, read `entries` sums of every column back over it."""
        lines = [f"w {Register.STATUS:d} 0"]
        for memory, image in (
            (Memory.INSTRUCTIONS, words[:, None]), (Memory.ACTIVATIONS, activations), (Memory.WEIGHTS, weights),
            (Memory.SHIFTS, shifts),
        ):  # fmt: skip
            for bank in range(image.shape[1]):
                lines.append(f"w {Register.SELECT:d} {memory << 12 | bank}\nw {Register.ADDRESS:d} 0\nb {len(image)}")
                lines.append(" ".join(map(str, image[:, bank].tolist())))
        lines += [f"w {Register.LENGTH:d} {len(words)}", f"w {Register.CONTROL:d} 1", "g"]
        for bank in range(self.design.columns):
            lines += [f"w {Register.SELECT:d} {Memory.SUMS << 12 | bank}", f"w {Register.ADDRESS:d} 0", f"d {entries}"]
        lines += [f"r {Register.CYCLES:d}", f"r {Register.STATUS:d}"]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n".join(lines) + "\n")
        self.process.stdin.flush()
        sums = [np.array(self.process.stdout.readline().split(), np.int64) for _ in range(self.design.columns)]
        cycles, status = int(self.process.stdout.readline()), int(self.process.stdout.readline())
        return Run(np.stack(sums, axis=1).astype(np.int32), cycles, status)
