"""PyTorch, eager and compiled (inductor), float32 and bfloat16: channels_last, inference mode, BatchNorm folded.

BatchNorm is folded into the convolutions for the eager contestants too (torch.fx, as torch documents for inference);
inductor folds it by freezing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.inputs import read_inputs
from peers.networks import float_network


class TorchPeer:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: network, data, inputs (see `peers.inputs`), threads, precision "float32" | "bfloat16", compiled."""
        torch.set_num_threads(settings["threads"])
        data = settings.get("data")
        model: nn.Module = float_network(settings["network"], Path(data) if data else None)
        dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
        batch = [torch.from_numpy(x) for x in read_inputs(settings["inputs"])]
        info: dict[str, Any] = {"torch": torch.__version__, "dtype": str(dtype).removeprefix("torch.")}
        if not settings["compiled"] and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            from torch.fx.experimental.optimization import fuse

            model = fuse(model)
        model = model.to(dtype=dtype, memory_format=torch.channels_last)
        self.batch: list[Tensor] = [
            x.to(dtype=dtype, memory_format=torch.channels_last) if x.is_floating_point() else x for x in batch
        ]
        if settings["compiled"]:
            from torch._inductor import config

            config.freezing = True  # constants folded, weights packed for oneDNN
            model = torch.compile(model, fullgraph=True, dynamic=False)
            info["compiled"] = "inductor, freezing"
        self.model = model
        with torch.inference_mode():
            for _ in range(3):
                self.model(*self.batch)
        info["primitives"] = self.primitives()
        return info

    def run(self) -> Any:
        with torch.inference_mode():
            return self.model(*self.batch)

    def output(self) -> Any:
        with torch.inference_mode():
            return self.model(*self.batch).float().numpy()

    def primitives(self) -> dict[str, int]:
        """Convolution operators of one run, by name: the proof that oneDNN runs them."""
        with (
            torch.inference_mode(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            self.model(*self.batch)
        return {
            e.key: int(e.count) for e in profile.key_averages() if "convolution" in e.key or "linear" in e.key.lower()
        }


def create() -> TorchPeer:
    return TorchPeer()
