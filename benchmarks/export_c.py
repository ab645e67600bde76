"""C export: flash, RAM and instructions per inference, per target and ratio.

ResNet-20 (trained, from the data folder), the digits net and a small MobileNet-like one (random weights: cost does not depend
on training). Cross compilers and QEMU where they are installed; every build must pass the self-test (bit-identical to the
reference engine) before it is counted. Instructions are QEMU's count of executed guest instructions, counted by a plugin that
this command compiles, as the difference between runs of one and of two inferences; they are not cycles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdial.errors import DataError
from bitdial.export.c import CExport, export_c, write_folder
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.zoo.registry import build_model
from common import (
    calibration_images,
    file_digest,
    machine_caption,
    make_parser,
    note,
    open_results,
    print_table,
    read_options,
    run_command,
    trained_network,
    weights_file,
)

CALIBRATION = 64
TIMEOUT = 300  # seconds for one emulated run
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion"]

# Counts guest instructions. Prototypes are this program's own; they are QEMU's plugin interface.
PLUGIN = r"""
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint64_t id_t_;
struct qemu_plugin_tb;
__attribute__((visibility("default"))) int qemu_plugin_version = VERSION;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_trans_cb(id_t_, void (*)(id_t_, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(id_t_, void (*)(id_t_, void *), void *);
static uint64_t total;
static void run(unsigned cpu, void *n) { (void)cpu; total += (uintptr_t)n; }
static void seen(id_t_ id, struct qemu_plugin_tb *tb) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, run, 0, (void *)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}
static void end(id_t_ id, void *p) { (void)id; (void)p; fprintf(stderr, "instructions %" PRIu64 "\n", total); }
__attribute__((visibility("default"))) int qemu_plugin_install(id_t_ id, const void *info, int argc, char **argv) {
    (void)info; (void)argc; (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, seen);
    qemu_plugin_register_atexit_cb(id, end, NULL);
    return 0;
}
"""


@dataclass(frozen=True)
class Target:
    """A processor: compiler, its options, and the emulator that runs the result. bare: needs start-up code."""

    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...]
    bare: bool = False

    def missing(self) -> str:
        return next((tool for tool in (self.compiler, self.emulator[0]) if shutil.which(tool) is None), "")


def _board(machine: str) -> tuple[str, ...]:
    return ("qemu-system-arm", "-M", machine, "-nographic", "-semihosting-config", "enable=on,target=native", "-kernel")


TARGETS = {
    "Cortex-M4, plain C": Target("arm-none-eabi-gcc", ("-mthumb", "-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16",
                                                    "-DBITDIAL_PLAIN"), _board("mps2-an386"), True),
    "Cortex-M4": Target("arm-none-eabi-gcc", ("-mthumb", "-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
                        _board("mps2-an386"), True),
    "Cortex-M55 (Helium)": Target("arm-none-eabi-gcc", ("-mthumb", "-mcpu=cortex-m55", "-mfloat-abi=hard"),
                                  _board("mps3-an547"), True),
    "AArch64": Target("aarch64-linux-gnu-gcc", ("-static",), ("qemu-aarch64",)),
    "AArch64 dotprod": Target("aarch64-linux-gnu-gcc", ("-static", "-march=armv8.2-a+dotprod"), ("qemu-aarch64", "-cpu", "max")),
}  # fmt: skip


class SmallMobileNet(nn.Module):
    """Depthwise separable, MobileNetV1-like: 3 x 96 x 96 input, widths 8 to 128, ReLU6; 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []

        def conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
            layers.extend(
                [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
                 nn.BatchNorm2d(outputs), nn.ReLU6()]
            )  # fmt: skip

        conv(3, 8, 3, 2)
        width = 8
        for outputs, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
            conv(width, width, 3, stride, width)
            conv(width, outputs, 1, 1)
            width = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


def random_network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, BatchNorm statistics estimated on random images, and such images; by a fixed seed."""
    torch.manual_seed(0)
    shape = (1, 16, 16) if name == "digits" else (3, 96, 96)
    model = build_model("zoo:digits") if name == "digits" else SmallMobileNet()
    images = torch.randn(CALIBRATION, *shape)
    with torch.no_grad():
        model.train()(images)
    return model.eval(), images


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name == "resnet20":
        return trained_network("resnet20"), calibration_images(n=CALIBRATION)
    return random_network(name)


def build_plugin(folder: Path) -> Path | None:
    """The counting plugin, in the version that the installed QEMU takes; None where there is no compiler."""
    source = folder / "count.c"
    source.write_text(PLUGIN)
    path = folder / "libcount.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-DVERSION=1", str(source), "-o", str(path)]
    done = shutil.which("cc") is not None and subprocess.run(command, capture_output=True).returncode == 0
    return path if done else None


def compile_test(target: Target, folder: Path, *defines: str) -> Path:
    """The self-test built for a target; stack usage (.su) beside it. Raises DataError with the compiler's words."""
    program = folder / "test"
    sources = [str(folder / "net.c"), str(folder / "net_test.c")]
    extra = ["-DBITDIAL_QUIET"]
    if target.bare:
        board = Path(str(resources.files("bitdial.export.c") / "cortex_m"))
        sources.append(str(board / "startup.c"))
        extra += ["-ffreestanding", "-nostartfiles", "-T", str(board / "link.ld")]
    command = [target.compiler, "-std=c99", "-O2", *WARNINGS, *target.flags, *extra, *defines, "-fstack-usage",
               "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", *sources, "-o", str(program)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise DataError(f"{target.compiler} failed: {done.stderr[:2000]}")
    return program


def run_test(target: Target, program: Path, plugin: Path | None) -> int | None:
    """Run a self-test in the emulator; executed instructions, None if they cannot be counted. Raises DataError if it fails."""
    emulator = list(target.emulator)
    if plugin is not None:
        emulator[1:1] = ["-plugin", str(plugin)]
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if plugin is not None and "instructions" not in done.stderr:  # another version of the plugin interface
        return run_test(target, program, None)
    if done.returncode != 0:
        raise DataError(
            f"self-test failed under {emulator[0]} ({done.returncode}): {done.stderr[:500]}{done.stdout[:500]}"
        )
    found = re.search(r"instructions (\d+)", done.stderr)
    return int(found.group(1)) if found else None


def code_and_constants(target: Target, folder: Path) -> tuple[int, int]:
    """(code, const data) bytes of net.c alone, from its object file."""
    size = target.compiler.replace("gcc", "size")
    command = [target.compiler, "-std=c99", "-O2", *target.flags, "-ffreestanding", "-c", str(folder / "net.c"), "-o",
               str(folder / "net.o")]  # fmt: skip
    subprocess.run([f for f in command if f != "-static"], check=True, capture_output=True)
    text = subprocess.run([size, "-A", str(folder / "net.o")], check=True, capture_output=True, text=True).stdout
    code = constants = 0
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[1].isdigit():
            code += int(fields[1]) if fields[0].startswith(".text") else 0
            constants += int(fields[1]) if fields[0].startswith((".rodata", ".data")) else 0
    return code, constants


def stack_bytes(folder: Path) -> int:
    """Sum of the frames along the deepest path of net.c: entry, network, kernel, and the largest function it calls."""
    frames: dict[str, int] = {}
    for path in folder.glob("*net.su"):
        for line in path.read_text().splitlines():
            place, size, _ = line.split("\t")
            frames[place.rsplit(":", 1)[-1]] = int(size)
    entry = frames.get("net_run", 0) + frames.get("fq_network", 0)
    kernels = {"fq_conv", "fq_depthwise"}
    inner = sum(size for name, size in frames.items() if name in ("fq_conv", "fq_conv_fours"))
    inner += max(
        (s for n, s in frames.items() if n in ("fq_gather_fours", "fq_lower_weights", "fq_pack_rows")), default=0
    )
    other = max((s for n, s in frames.items() if n not in kernels and not n.startswith("net_")), default=0)
    return entry + max(inner, other)


def measure_target(target: Target, exported: CExport, plugin: Path | None, ratios: Sequence[int]) -> dict[str, Any]:
    """Sizes and instructions of one export on one target; `ratios`: indices to count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "c"
        write_folder(exported, folder)
        code, constants = code_and_constants(target, folder)
        run_test(target, compile_test(target, folder), None)  # every ratio, or nothing is counted
        stack = stack_bytes(folder)
        counted: dict[str, int | None] = {}
        for index in ratios:
            once, twice = (
                run_test(
                    target, compile_test(target, folder, f"-DBITDIAL_RATIO={index}", f"-DBITDIAL_REPEAT={n}"), plugin
                )
                for n in (1, 2)
            )
            counted[f"{exported.ratios[index]:g}"] = twice - once if once is not None and twice is not None else None
    return {
        "code": code, "constants": constants, "flash": code + constants, "arena": exported.arena,
        "arena_lower_bound": exported.bound, "stack": stack, "ram": exported.arena + stack, "instructions": counted,
    }  # fmt: skip


def measure(name: str, config: QuantizeConfig, wanted: dict[str, Target]) -> dict[str, Any]:
    """All exports of a network on all targets."""
    model, images = network(name)
    program: Program = quantize_prepared(prepare(model, [images], config), config)
    last = len(program.ratios) - 1
    exports = {"all ratios": export_c(program), "0 % alone": export_c(program, ratios=[0]),
               "100 % alone": export_c(program, ratios=[last]),
               "all ratios, --ram 250000": export_c(program, ram=250_000)}  # fmt: skip
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plugin = build_plugin(Path(folder))
        for label, target in wanted.items():
            for kind, exported in exports.items():
                note(f"{name}: {label}, {kind}")
                indices = range(0, last + 1, max(1, last // 2)) if kind.startswith("all") else [0]
                rows[f"{label}; {kind}"] = measure_target(target, exported, plugin, list(indices))
    macs = exports["all ratios"].macs
    weights = sum(layer.weight.size for layer in program.layers.values() if layer.weight is not None)
    return {"targets": rows, "macs": macs, "weights": weights, "ratios": list(program.ratios)}


def table_rows(name: str, row: dict[str, Any]) -> list[list[str]]:
    lines = []
    for label, figures in row["targets"].items():
        counts = [
            f"{float(ratio) * 100:g} %: {count / 1e6:,.2f} ({count / row['macs']:.2f})"
            if count is not None
            else f"{ratio}: -"
            for ratio, count in figures["instructions"].items()
        ]
        lines.append([
            name, label, f"{figures['code'] / 1024:.1f}", f"{figures['flash'] / 1024:.1f}",
            f"{figures['arena'] / 1024:.1f}", f"{figures['arena_lower_bound'] / 1024:.1f}", f"{figures['stack']:,}",
            "; ".join(counts),
        ])  # fmt: skip
    return lines


# What others publish, quoted, not measured here: (network, model, tensor arena, source). The arenas are what the reference code
# of MLPerf Tiny reserves for TensorFlow Lite Micro, not the least it could do with; its own code and kernels come on top.
PUBLISHED = (
    ("MLPerf Tiny ResNet, CIFAR-10", "96 KB", "100 KiB", "image_classification/submitter_implemented.cpp"),
    (
        "MLPerf Tiny MobileNet 96x96, person detection",
        "325 KB",
        "200 KiB",
        "person_detection/submitter_implemented.cpp",
    ),
)


def print_published() -> None:
    rows = [[network, model, arena, source] for network, model, arena, source in PUBLISHED]
    print_table(
        "TensorFlow Lite Micro, as published (quoted, not measured)",
        ["network", "model", "tensor arena", "github.com/mlcommons/tiny, benchmark/reference_submissions"], rows,
        "Model sizes: Linley Newsletter, 3 August 2021, on MLPerf Tiny 0.5. Other networks than ours.",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table. Raises BitdialError."""
    known = ("resnet20", "digits", "mobile")
    options = read_options(make_parser("export_c", __doc__, known, 0), arguments, known)
    file = open_results(options, "export_c", "export_c")
    wanted = {}
    for label, target in TARGETS.items():
        if target.missing():
            note(f"{label} LEFT OUT: {target.missing()} is not installed")
        else:
            wanted[label] = target
    lines: list[list[str]] = []
    machine = file.machine
    for name in options.networks:
        if name == "resnet20":
            try:
                weights_file(name)
            except DataError as error:
                note(f"resnet20 LEFT OUT: {error}")
                continue
        config = options.config(selector="greedy", calibration_images=CALIBRATION)
        settings = {
            "network": name, "targets": {k: [t.compiler, *t.flags] for k, t in wanted.items()},
            "versions": sorted({_version(tool) for t in wanted.values() for tool in (t.compiler, t.emulator[0])}),
            "weights": file_digest(weights_file(name)) if name == "resnet20" else "random, seed 0",
            "config": config.model_dump(mode="json"),
        }  # fmt: skip
        work: Callable[[], dict[str, Any]] = lambda name=name, config=config: measure(name, config, wanted)  # type: ignore[misc]  # noqa: E731
        row, _ = file.measure(name, settings, work, changed=options.changed)
        machine = row["machine"]
        lines += table_rows(name, row)
    columns = ["network", "target; ratios", "code, KiB", "flash, KiB", "arena, KiB", "bound, KiB", "stack, bytes",
               "M instructions a run (per multiply-accumulate)"]  # fmt: skip
    print_table(
        "C export: sizes and emulated instruction counts (not cycles)", columns, lines, machine_caption(machine)
    )
    print_published()


def _version(tool: str) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [tool])[0]


if __name__ == "__main__":
    run_command(main)
