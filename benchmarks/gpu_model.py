"""A MODEL, not a measurement: what low channels should buy in the CUDA engine, per card, from counted instructions.

    python benchmarks/gpu_model.py     # networks of `gpu_check.py --prepare`; needs NVRTC and nvdisasm, no GPU

A layer's time is the largest of three: the tensor cores' (products at the card's rate), the CUDA cores' (warp instructions of the
loop, counted in the machine code of kernels that hold one kind of step alone, one a cycle and scheduler), and memory's (weights
and activations once). A multiprocessor that holds few blocks waits for loads (LATENCY cycles a step). Launches cost LAUNCH each;
attention counts in the same way, all else by its bytes. No cache, clock or power is in it: read the ratios, not the
times.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.artifact import load_program
from bitdial.engines.cuda import compilation
from bitdial.engines.cuda.arguments import ConvArgs, Launch, Span
from bitdial.engines.cuda.compiler import Compiler
from bitdial.engines.cuda.cubin import resources
from bitdial.engines.cuda.device import ARCHITECTURES, NATIVE_INT4
from bitdial.engines.cuda.transformer import MOST_SHARED
from common import RESULTS, ROOT, note, print_table, run_command
from gpu_check import prepared

LATENCY = 600.0  # cycles from a step's loads to its products, for a block that is alone
LAUNCH = 2e-6  # seconds between kernels of a graph
BLOCK_MACS = 64 * 64 * 64  # of a step for 64 outputs
SHARED = 1024  # bytes that a block takes beside its own
SCHEDULERS = 4  # of a multiprocessor, a warp instruction a cycle each


@dataclass(frozen=True)
class Card:
    """sms: multiprocessors. ghz: boost clock. int8: multiply-accumulates a cycle and multiprocessor with mma.sync. shared: bytes
    per multiprocessor. From NVIDIA's white papers; mma.sync on sm_90 at half of what wgmma does."""

    name: str
    architecture: str
    sms: int
    ghz: float
    int8: int
    gb_per_s: float
    shared: int


CARDS = (
    Card("A6000", "sm_86", 84, 1.80, 1024, 768, 100 << 10), Card("A100", "sm_80", 108, 1.41, 2048, 1555, 164 << 10),
    Card("RTX 4090", "sm_89", 128, 2.52, 1024, 1008, 100 << 10), Card("H200", "sm_90", 132, 1.83, 2048, 4800, 228 << 10),
)  # fmt: skip
PAPER = (
    "beside: the paper's own kernels, measured by its authors on an A6000, batch 16: 12.24 / 10.17 / 8.67 ms at 0 / 50 / 100 %; "
    "1.43x on GEMM"
)


@dataclass(frozen=True)
class Loop:
    """Instructions of a warp for a step, for a run's border beside it, for what comes behind the loop (results one by one, and
    four at a time); registers of a thread; threads of a block and its shared memory; columns: outputs of a block."""

    step: dict[int, float]
    border: float
    end: tuple[float, float]
    registers: int
    threads: int = 128
    shared: int = 18432
    columns: int = 64


@dataclass(frozen=True)
class Attention:
    """Instructions of a warp in attention's kernel: for a tile of 64 keys by 64 features with its loads, for a score by each lane
    and for each term that it meets, for two rows of a tile of results."""

    tile: float
    score: float
    term: float
    write: float


@cache
def loops(architecture: str, kernel: str) -> Loop:
    """Counted in the machine code of a kernel, or of its counterpart for unsigned bytes in whole chunks."""
    kernel = "conv_wide_unsigned" if "wide" in kernel else "conv_unsigned"
    high, low, border = (counted(architecture, *of, kernel) for of in ((0, 0, 0), (1, 0, 1), (1, 1, 1)))
    registers = resources(_compiled(architecture, ()))[kernel].registers  # of the kernel as it is
    step = {0: float(high[0].total()), 1: float(low[0].total())}
    launch = Launch(kernel, (1, 1, 1), ConvArgs())
    return Loop({**step, 2: step[1]}, border[0].total() - step[1], (high[1], border[1]), registers, launch.threads,
                launch.shared_bytes, launch.threads // 2)  # fmt: skip


@cache
def attention(architecture: str) -> Attention:
    """Counted in the loops of attention_rows32, which are told by what they hold."""
    names, ranges = _parsed(_text(architecture, ())["attention_rows32"])
    found = [(r, Counter(names[slice(*r)])) for r in sorted(set(ranges))]

    def inside(outer: tuple[int, int]) -> list[Counter[str]]:
        return [c for r, c in found if outer[0] <= r[0] and r[1] <= outer[1] and r != outer]

    tile = max(c.total() for _, c in found if c["IMMA"] and c["BAR"] == 2)
    [(first, counts)] = [(r, c) for r, c in found if (c["LDG"], c["STS"], c["LDS"]) == (3, 1, 1)]  # scores meet their terms
    term = float(sum(c.total() for c in inside(first)))
    passes = [c for r, c in found if c["F2I"] and c["STS"] and not c["LDG"] and not inside(r)]  # exponentials; rounding
    score = counts.total() - term + sum(c.total() / c["STS"] for c in passes)
    write = min(c.total() for r, c in found if c["F2I"] and c["LDG"] and not c["STS"] and not inside(r))
    return Attention(float(tile), score, term, float(write))


@cache
def _compiled(architecture: str, more: tuple[str, ...]) -> bytes:
    return compilation.compile_now(architecture, more)


@cache
def _text(architecture: str, more: tuple[str, ...]) -> dict[str, str]:
    """Machine code of each kernel, as text."""
    code = _compiled(architecture, more)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.cubin").write_bytes(code)
        text = subprocess.run([disassembler(), "-c", f"{folder}/k.cubin"], capture_output=True, text=True, check=True).stdout
    cut = re.split(r"\.section\s+\.text\.(\w+),", text)
    return dict(zip(cut[1::2], cut[2::2], strict=True))


@cache
def counted(
    architecture: str, kind: int, borders: int, fours: int, kernel: str = "conv_unsigned"
) -> tuple[Counter[str], float]:
    """(instructions of a warp for a step of one kind by name, each as often as it runs; instructions behind the loop). borders:
    every step ends a run. fours: results are written four at a time."""
    definitions = {"KIND": kind, "BORDERS": borders, "FOURS": fours}
    body = _text(architecture, tuple(f"-DBITDIAL_ONLY_{name}={value}" for name, value in definitions.items()))[kernel]
    names, ranges = _parsed(body)
    main = max((r for r in ranges if "LDGSTS" in names[slice(*r)]), key=lambda r: r[1] - r[0])
    count = Counter(names[slice(*main)])
    for begin, end in ranges:  # two trips: two halves of a step, and 512 bytes of weights a tile
        inside = main[0] <= begin and end <= main[1] and (begin, end) != main
        if inside and ("IMMA" in names[begin:end] or ("LDGSTS" in names[begin:end] and kind == 0)):
            count += Counter(names[begin:end])
    tail = max((r for r in ranges if r[0] >= main[1]), key=lambda r: r[1] - r[0])
    return count, (tail[1] - tail[0]) * (4.0 if fours else 16.0)  # unrolled twice


def _parsed(body: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(names of all instructions, ranges of them that are loops)."""
    labels: dict[str, int] = {}
    names: list[str] = []
    ranges: list[tuple[int, int]] = []  # of loops
    for line in body.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*?);", line):
            names.append(found.group(1))
            jump = re.search(r"\((\.L_x_\d+)\)", found.group(2))
            if found.group(1) == "BRA" and jump and labels.get(jump.group(1), len(names)) < len(names) - 1:
                ranges.append((labels[jump.group(1)], len(names)))
    return names, ranges


def disassembler() -> str:
    from importlib import metadata

    files = metadata.files("nvidia-cuda-nvdisasm") or []
    return next(str(Path(str(f.locate()))) for f in files if Path(str(f)).name == "nvdisasm")


class Frame:
    """Stands for a plan: spans that say only how large values are."""

    def __init__(self, compiled: Compiler, batch: int, ratio: int, multiprocessors: int) -> None:
        self.compiled, self.batch, self.ratio, self.pool = compiled, batch, ratio, compiled.pool
        self.multiprocessors = multiprocessors

    def span(self, value: str) -> Span:
        buffer = self.compiled.buffers[self.compiled.root(value)]
        return Span(4096, buffer.item * self.batch * buffer.bytes)


def seconds(compiled: Compiler, card: Card, batch: int, ratio: int) -> float:
    """Predicted seconds of a network: the sum over its launches."""
    frame, total = Frame(compiled, batch, ratio, card.sms), 0.0
    for step in compiled.steps:
        launch = step.launch(frame)  # type: ignore[arg-type]
        if launch is None:
            continue
        size = sum(frame.span(v).size for v in (step.value, *dict.fromkeys(step.reads)))
        compute = 0.0
        if launch.kernel.startswith("conv"):
            table = compiled.pool.arrays[_table(compiled, launch.arguments.steps.data)]
            loop = loops(card.architecture, launch.kernel)
            compute = _layer(table, loop, card, int(np.prod(launch.grid)), launch.grid[2], launch.arguments.out.fours)
            padded = launch.arguments.padded
            size += sum(padded * (32 if kind == 1 else 64) for kind in table[:, 0])
        elif launch.kernel.startswith("attention"):
            compute = _attention(launch, attention(card.architecture), card)
        total += max(compute, size / card.gb_per_s / 1e9) + LAUNCH
    return total


def _attention(launch: Launch, counts: Attention, card: Card) -> float:
    """Of a launch of attention: the four warps of a block issue side by side, one on each scheduler."""
    a, rows = launch.arguments, int(launch.kernel.removeprefix("attention_rows"))
    keys, depth, width = a.padded // 64, -(-a.depth // 64), -(-a.width // 64)
    issue = keys * (depth + width) * counts.tile + width * rows / 2 * counts.write
    issue += rows / 8 * -(-a.keys // 16) * (counts.score + a.n_terms * counts.term)
    tensor = rows * 64 * 64 * keys * (depth + width) / card.int8
    return -(-int(np.prod(launch.grid)) // card.sms) * max(issue, tensor) / card.ghz / 1e9


def kernels(architecture: str) -> dict[str, dict[str, int]]:
    """What a block of each kernel takes, and what it spills. Shared memory of attention: the most."""
    found = {}
    for name, own in sorted(resources(_compiled(architecture, ())).items()):
        launch = Launch(name, (1, 1, 1), ConvArgs())
        shared = MOST_SHARED if name.startswith("attention") else launch.shared_bytes
        found[name] = {"threads": launch.threads, "registers": own.registers, "shared_bytes": shared, "stack_bytes": own.stack}
    return found


def _table(compiled: Compiler, address: int) -> int:
    return compiled.pool.offsets.index(address - 4096)


def _layer(steps: Any, loop: Loop, card: Card, blocks: int, groups: int, fours: int) -> float:
    resident = min(65536 // (-(-loop.registers // 8) * 8 * loop.threads), card.shared // (loop.shared + SHARED), 16)
    per_sm = -(-blocks // card.sms)
    warps = loop.threads // 32 / SCHEDULERS  # of a block, that a scheduler issues one after the other
    cycles = loop.end[fours] * warps
    for kind, halves, _, row in steps:
        rate = card.int8 * (2 if kind == 1 and card.architecture in NATIVE_INT4 else 1)
        tensor = BLOCK_MACS * loop.columns / 64 / rate * halves / 2
        issue = warps * (loop.step[int(kind)] + (loop.border if row >= 0 and kind else 0.0))
        cycles += max(tensor, issue, LATENCY / min(resident, per_sm)) / groups
    return per_sm * cycles / card.ghz / 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50,vit_b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="whose kernels are listed")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if compilation.compiler_missing():
        note(f"SKIPPED: NO MODEL WITHOUT NVRTC: {compilation.compiler_missing()}")
        return
    rows, found = list[list[str]](), list[dict[str, Any]]()
    for network in options.networks.split(","):
        artifact, _ = prepared(network, options.cache)
        if not artifact.exists():
            note(f"{network}: left out: not prepared (gpu_check.py --prepare)")
            continue
        program = load_program(artifact)
        indices = [0, len(program.ratios) // 2, len(program.ratios) - 1]
        for card in CARDS:
            compiled = Compiler(program, card.architecture in NATIVE_INT4).run()
            compiled.pool.span = Span(4096, compiled.pool.size)
            times = [1e3 * seconds(compiled, card, options.batch, i) for i in indices]
            blocks = [loops(card.architecture, f"conv{kind}_unsigned") for kind in ("", "_wide")]
            kinds = {f"{loop.columns} outputs": {"warp_instructions": loop.step, "border": loop.border,
                                                 "registers": loop.registers} for loop in blocks}  # fmt: skip
            found.append({"network": network, "card": card.name, "batch": options.batch, "modelled_ms": times,
                          "ratios": [program.ratios[i] for i in indices], "blocks": kinds})  # fmt: skip
            counts = [f"{k['warp_instructions'][0]:.0f} / {k['warp_instructions'][1]:.0f} + {k['border']:.0f}"
                      for k in kinds.values()]  # fmt: skip
            figures = [*(f"{t:.2f}" for t in times), f"{times[0] / times[2]:.2f}"]
            rows.append([network, f"{card.name} ({card.architecture})", *figures, *counts])
    said = [f"instructions of a warp, {n} outputs: 8-bit / low + border" for n in (64, 128)]
    columns = ["network", "card", "0 %: ms", "50 %: ms", "100 %: ms", "gain", *said]
    print_table(f"MODELLED, NOT MEASURED: CUDA engine, batch {options.batch}", columns, rows, PAPER)
    taken = {architecture: kernels(architecture) for architecture in options.architectures.split(",")}
    listed = [[name, str(own["threads"]), str(own["shared_bytes"]), *(str(of[name]["registers"]) for of in taken.values())]
              for name, own in next(iter(taken.values())).items()]  # fmt: skip
    spilled = max(own["stack_bytes"] for of in taken.values() for own in of.values())
    print_table("What a block of each kernel takes", ["kernel", "threads", "shared bytes", *taken], listed,
                f"registers of a thread by architecture, from the machine code; bytes that any kernel spills: {spilled}")
    content = {"benchmark": "gpu_model", "model": "predicted from instruction counts; nothing was measured", "paper": PAPER,
               "rows": found, "kernels": taken}  # fmt: skip
    (options.results / "gpu_model.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
