"""The compiled steps of a program run layer by layer, while the layers' bias rows, low weights and their shifts are being found.

An engine packs weights once. Here every layer uses the one kernel that is exact whatever the weights, and takes other ones from
one run to the next. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitdial.engines.cpu import native, tuning
from bitdial.engines.cpu.compiler import Compiler
from bitdial.engines.cpu.loaded import Array, Loaded
from bitdial.engines.cpu.values import own
from bitdial.errors import EngineError
from bitdial.quantization.program import Program


class LayerWalk(Loaded):
    """isa, threads: as `CpuEngine`'s. Activation shifts and low groups are those that the program has now.

    Raises EngineError where the program does not compile whole, or there is no extension.
    """

    def __init__(self, program: Program, isa: str | None = None, threads: int = 1) -> None:
        module, isa = native.extension(), native.choose_isa(isa)
        steps = module.Program(isa, threads, [float(r) for r in program.ratios])
        super().__init__(
            program, steps, Compiler(program, steps).run(), isa=isa, threads=threads, kernels="direct", memory="fast",
            batch_hint=1, check_finite=False,
        )  # fmt: skip
        self._places = {name: i for i, (name, kind) in enumerate(steps.steps()) if kind in ("conv", "depthwise")}
        weighted = {name for name, layer in program.layers.items() if layer.weight is not None}
        if not self.can_profile or weighted - set(self._places):
            raise EngineError(f"the program does not compile whole: {next(iter(self.compiled.reasons.values()), 'its outputs')}")
        for name in program.outputs:
            steps.set_external(self.compiled.buffers[name].tensor, True)
        self._contexts: list[Any] = []
        tuning.choose_kernels(self)

    def layers(self, index: int, batches: Sequence[Sequence[Array]]) -> Iterator[str]:
        """Names of the conv and linear layers in order, of a walk at a ratio index over all batches (C-contiguous inputs). Each
        layer runs when the next one is asked for."""
        program, buffers, steps = self.program, self.compiled.buffers, self.native
        self._contexts, self._outputs = [], []
        bound = []  # what the contexts refer to must live
        try:
            for batch in batches:
                n = len(batch[0])
                self._contexts.append(steps.acquire(n))
                self._outputs.append([np.empty(self.shape(v, n), program.types[v].dtype) for v in program.outputs])
                values = (*program.inputs, *program.outputs)
                for name, array in zip(values, (*batch, *self._outputs[-1]), strict=True):
                    if name in buffers:
                        bound.append(np.asarray(array, order="C"))
                        steps.bind(self._contexts[-1], buffers[name].tensor, bound[-1])
            done = 0
            for name, place in self._places.items():
                self._run(index, done, place)
                done = place
                yield name
            self._run(index, done, len(steps.steps()))
        finally:
            for context in self._contexts:
                steps.release(context)
            self._contexts = []

    def _run(self, index: int, first: int, last: int) -> None:
        for context in self._contexts:
            self.native.run_in(context, index, first, last)

    def inputs(self, name: str) -> list[Array]:
        """uint8 or int8 [N, ...] per batch: the input of the layer that `layers` gave last. Valid until the layer runs."""
        value = self.program.instruction(name).inputs[0]
        source, margins = self.compiled.pads.get(value, (value, (0, 0, 0, 0)))
        buffer = self.compiled.buffers[source]
        found = []
        for context in self._contexts:
            x: Array = self.native.view(context, buffer.tensor)
            if buffer.halo != (0, 0) or any(margins):
                top, bottom, left, right = margins
                zero = 128 if buffer.signed else 0
                x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=zero)
            if buffer.signed:
                x = (x ^ 128).view(np.int8)
            if buffer.channels_first:
                x = x.transpose(0, 3, 1, 2)
            else:
                place, shape = buffer.place or 0, list(buffer.shape)
                x = np.moveaxis(x.reshape(context.samples, *shape), 0, place)
                shape[place] *= context.samples
                x = x.reshape(shape)
            found.append(x)
        return found

    def renew(self, name: str) -> None:
        """Take over a layer's bias rows, weight shifts and low weights from the program."""
        layer = self.program.layers[name]
        low = None if layer.low_weight is None or not layer.low.any() else own(layer.low_weight, np.int8)
        self.native.renew(self._places[name], own(layer.bias, np.int32), own(layer.weight_shift, np.uint8), low)

    def outputs(self) -> list[Array]:
        """The first output per batch, after a walk."""
        return [arrays[0] for arrays in self._outputs]
