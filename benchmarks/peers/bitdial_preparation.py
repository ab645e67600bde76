"""bitdial quantizes one of the networks of `real_networks_data.py`, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdial.errors import ArtifactError
from peers.preparation import Stages, timed

if TYPE_CHECKING:
    import torch

    from bitdial.quantization.program import Program

CHECKED = 4  # samples that the saved file must give the same outputs for

_SEARCH = ("selector", "search", "evaluations", "predictions", "seconds", "deviation", "fitness")


class BitdialPreparation:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: network, samples (.npy files, one per input), config, threads (or None), artifact (file to write), hook (a
        step to leave out, of `real_networks_ablation`, if any)."""
        import torch

        from bitdial.artifact import save_program
        from bitdial.pipeline import prepare, quantize_prepared
        from bitdial.quantization.config import QuantizeConfig
        from real_networks_ablation import switched_off
        from real_networks_data import NETWORKS, UNTRAINED

        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        model = (NETWORKS | UNTRAINED)[settings["network"]].load()
        inputs = [torch.from_numpy(np.load(path)) for path in settings["samples"]]
        config = QuantizeConfig(**settings["config"])
        stages = Stages()
        programs = []

        def work() -> None:
            prepared = prepare(model, inputs, config, progress=stages)
            program = quantize_prepared(prepared, config, progress=stages)
            stages("save", 0.0)
            save_program(program, Path(settings["artifact"]))
            programs.append(program)

        with switched_off(settings.get("hook", "")):
            preparation = timed(work)
        check_file(programs[0], Path(settings["artifact"]), [x[:CHECKED] for x in inputs])
        provenance = programs[0].provenance
        return {
            "preparation": {**preparation, "stages": stages.close()},
            "search": {k: v for k, v in provenance["search"].items() if k in _SEARCH},
            "answers": provenance.get("answers"),
        }

    def run(self, **arguments: Any) -> Any:
        raise NotImplementedError("this contestant only prepares")

    output = run


def check_file(program: Program, path: Path, inputs: Sequence[torch.Tensor]) -> None:
    """Raises ArtifactError if the file gives other outputs than the program that was saved in it."""
    from bitdial.artifact import load_program
    from bitdial.engines.reference.engine import ReferenceEngine

    prepared, loaded = (ReferenceEngine(p, check_finite=False) for p in (program, load_program(path)))
    batch = list(inputs) if len(inputs) > 1 else inputs[0]
    for ratio in program.ratios:
        if not prepared.run(batch, ratio).equal(loaded.run(batch, ratio)):
            raise ArtifactError(f"{path.name} gives other outputs at {100 * ratio:.0f} % than what was saved in it: report this")


def create() -> BitdialPreparation:
    return BitdialPreparation()
