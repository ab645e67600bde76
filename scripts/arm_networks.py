"""Networks for scripts/arm.sh: quantized on this machine with the reference engine's answers, checked where there is no torch.

python scripts/arm_networks.py make FOLDER     small conv nets and transformers of the tests, as artifacts with inputs and outputs
python scripts/arm_networks.py check FOLDER    every instruction set of the processor at hand gives these outputs, bit for bit
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def outputs_of(result: Any) -> list[Any]:
    """A run's outputs as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def make(folder: Path) -> None:
    """Write NAME.bitdial and NAME.npz (inputs x0, x1, ..., outputs y<ratio>_<output>) for every network."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "engines" / "cpu")]
    import cpu_networks
    import transformer_networks

    from bitdial.artifact import save_program
    from bitdial.engines.reference.engine import ReferenceEngine

    def keep(name: str, program: Any, inputs: list[Any]) -> None:
        engine = ReferenceEngine(program)
        arrays = {f"x{i}": a for i, a in enumerate(inputs)}
        for r, ratio in enumerate(program.ratios):
            for i, y in enumerate(outputs_of(engine.run(inputs if len(inputs) > 1 else inputs[0], ratio))):
                arrays[f"y{r}_{i}"] = np.asarray(y)
        save_program(program, folder / f"{name}.bitdial")
        np.savez(folder / f"{name}.npz", **arrays)

    folder.mkdir(parents=True, exist_ok=True)
    wide = cpu_networks.QUICK.updated(group_size=16, ratios=(0.0, 0.5, 1.0), bias_correction=False)
    for name, build in {**cpu_networks.NETWORKS, "wide": cpu_networks.wide_net}.items():
        graph = build()
        program = cpu_networks.quantized(graph, wide) if name == "wide" else cpu_networks.quantized(graph)
        keep(name, program, [cpu_networks.samples(graph, 3)])
    for name in sorted(transformer_networks.NETWORKS):
        program, inputs = transformer_networks.transformer(name)
        keep(name, program, [a[:3] for a in inputs])


def check(folder: Path) -> None:
    """Compare; print a line per network. Raises AssertionError at the first difference."""
    from bitdial.artifact import load_program
    from bitdial.engines.cpu import native
    from bitdial.engines.cpu.engine import CpuEngine

    names = sorted(path.stem for path in folder.glob("*.npz"))
    assert names, f"{folder} holds no network"
    for name in names:
        arrays = dict(np.load(folder / f"{name}.npz"))
        inputs = [arrays[f"x{i}"] for i in range(sum(key[0] == "x" for key in arrays))]
        program = load_program(folder / f"{name}.bitdial")
        for isa in native.isas():
            for kernels in ("fixed", "direct"):
                engine = CpuEngine(program, isa=isa, kernels=kernels)
                assert not engine.compiled.reasons, f"{name} is not compiled whole: {engine.compiled.reasons}"
                for r, ratio in enumerate(program.ratios):
                    for n in (1, 3):
                        batch = [a[:n] for a in inputs]
                        result = engine.run(batch if len(batch) > 1 else batch[0], ratio)
                        for i, y in enumerate(outputs_of(result)):
                            want = arrays[f"y{r}_{i}"][:n] + 0.0  # without the sign of zero, which is the reference's own
                            same = (np.asarray(y) + 0.0).view(np.int32) == want.view(np.int32)
                            assert same.all(), f"{name}, {isa}, {kernels}, ratio {ratio}, batch {n}: {(~same).sum()} differ"
        print(f"{name}: equal to the bit on {', '.join(native.isas())}", flush=True)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
