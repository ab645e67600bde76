"""`export_npu`: a program as the files that `reading` describes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitdial.engines.npu.images import shift_image, weight_image
from bitdial.engines.npu.lowering import lower, needed
from bitdial.engines.npu.plan import Design, LayerPlan
from bitdial.engines.npu.program import job_instructions
from bitdial.engines.npu.words import encode
from bitdial.errors import EngineError
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.program import Program
from bitdial.quantization.weights import low_integers

FORMAT = 1


@dataclass(frozen=True)
class NpuExport:
    """files: file name -> bytes. host: layers left to the host -> why. The rest: counts of what was made."""

    files: dict[str, bytes]
    host: dict[str, str]
    layers: int
    jobs: int
    words: int
    weight_bytes: int
    switch_words: int


def export_npu(program: Program, design: Design | None = None, pad_groups: bool = False) -> NpuExport:
    """Words, images and schedule of all layers that the array runs, set to the smallest ratio.

    Raises EngineError, naming the layer, for groups that do not fit the array or layers too large for its buffers.
    """
    design = design or Design()
    lowered = lower(program, design, pad_groups)
    needed(program, lowered)
    words: list[np.ndarray[Any, Any]] = []
    weights: list[np.ndarray[Any, Any]] = []
    shifts: list[np.ndarray[Any, Any]] = []
    layers: dict[str, Any] = {}
    at_word = at_weight = at_shift = 0
    for name, plan in lowered.plans.items():
        layer, step = program.layers[name], program.instruction(name)
        signed = program.qparams[step.inputs[0]].signed
        places: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        first_word = at_word
        jobs = []
        for number, job in enumerate(plan.jobs):
            if job.tiles not in places:  # slices of rows share the weights of their column tiles
                image, row = _images(plan, number, layer, design)
                weights.append(image)
                shifts.append(row)
                places[job.tiles] = [at_weight, at_weight + len(image)], [at_shift, at_shift + len(row)]
                at_weight, at_shift = at_weight + len(image), at_shift + len(row)
            own = encode(job_instructions(plan, job, signed, plan.low[0] if number == 0 else None))
            if len(own) > design.words:
                raise EngineError(
                    f"layer '{name}': a job needs {len(own)} instruction words, the NPU has {design.words}; use a larger Design"
                )
            words.append(own)
            jobs.append({
                "words": [at_word, at_word + len(own)], "weights": places[job.tiles][0], "shifts": places[job.tiles][1],
                "out_rows": list(job.out_rows), "in_rows": list(job.in_rows), "tiles": list(job.tiles),
                "sums": plan.pixels(job) * (job.tiles[1] - job.tiles[0]),
            })  # fmt: skip
            at_word += len(own)
        layers[name] = {
            "source": step.source, "input": step.inputs[0], "signed": signed, "kind": layer.kind,
            "geometry": asdict(plan.geometry), "activation_words": plan.words,
            "chunks": [[c.word, *c.channels] for c in dict.fromkeys(c for job in plan.jobs for c in job.chunks)],
            "low_word": first_word, "low": list(plan.low), "jobs": jobs,
        }  # fmt: skip
    manifest = {
        "format": FORMAT,
        "design": asdict(design),
        "ratios": list(program.ratios),
        "schedule": [
            {"name": s.name, "operation": s.operation, "runs": "npu" if s.name in lowered.plans else "host"}
            for s in program.instructions
        ],
        "host": dict(lowered.host),
        "layers": layers,
    }
    files = {
        "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode(),
        "instructions.bin": np.concatenate(words).astype("<u4").tobytes(),
        "weights.bin": np.concatenate(weights).tobytes(),
        "shifts.bin": np.concatenate(shifts).tobytes(),
    }
    jobs_made = sum(len(p.jobs) for p in lowered.plans.values())
    return NpuExport(
        files, dict(lowered.host), len(layers), jobs_made, at_word, len(files["weights.bin"]),
        sum(len(set(p.low)) > 1 for p in lowered.plans.values()),
    )  # fmt: skip


def _images(plan: LayerPlan, number: int, layer: QuantizedLayer, design: Design) -> tuple[Any, Any]:
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)
    low = low_integers(layer).reshape(weight.shape) if layer.low.any() else weight
    job = plan.jobs[number]
    return weight_image(plan, job, weight, low, design), shift_image(job, layer.weight_shift, design)
