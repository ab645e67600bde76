"""bitdial quantizes one of the networks of `real_networks.py`, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peers.preparation import Stages, timed

_SEARCH = ("selector", "search", "evaluations", "predictions", "seconds", "deviation", "fitness")


class BitdialPreparation:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: network, samples (.npy files, one per input), config, threads (or None), artifact (file to write)."""
        import torch

        from bitdial.artifact import save_program
        from bitdial.pipeline import prepare, quantize_prepared
        from bitdial.quantization.config import QuantizeConfig
        from real_networks_data import NETWORKS

        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        model = NETWORKS[settings["network"]].load()
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

        preparation = timed(work)
        provenance = programs[0].provenance
        return {
            "preparation": {**preparation, "stages": stages.close()},
            "search": {k: v for k, v in provenance["search"].items() if k in _SEARCH},
            "answers": provenance.get("answers"),
        }

    def run(self, **arguments: Any) -> Any:
        raise NotImplementedError("this contestant only prepares")

    output = run


def create() -> BitdialPreparation:
    return BitdialPreparation()
