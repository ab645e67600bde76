"""Scores candidates of the selection: distance between a candidate's soft labels (see `labels`) and the 8-bit model's.

This is the fast evaluation of the search: float32 sums without a proof of exactness per layer, and the first-order bias
correction (a vector per low group) instead of the sequential one. `deviation` measures how far its soft labels are from
the exact engine's. Candidates of one call are walked as a prefix tree: layers before the first differing gene run once;
prefixes met again in later calls come from a bounded cache, the longest remembered one of each candidate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.executor import Executor, Setting
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.engines.reference.labels import Labels
from bitdial.graph.ir import samples_per_step
from bitdial.quantization.program import Program

CHUNK = 64  # samples per pass: activations of a small network stay in the processor's cache


@dataclass
class SearchStatistics:
    """What the search cost. multiplies: multiply-accumulates executed; saved: not executed thanks to shared prefixes."""

    evaluations: int = 0
    images: int = 0
    multiplies: int = 0
    saved: int = 0
    cache_hits: int = 0
    cache_lookups: int = 0
    cache_bytes: int = 0

    def counts(self) -> dict[str, int]:
        """What adds up over the processes of an interrupted search."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cache_bytes"}

    def plus(self, former: Mapping[str, float]) -> SearchStatistics:
        """With the counts of the processes before this one (see `bitdial.selection.Costs`)."""
        return SearchStatistics(**{name: value + int(former.get(name, 0)) for name, value in self.counts().items()})

    def summary(self) -> dict[str, float]:
        total = self.multiplies + self.saved
        return {
            "evaluations": self.evaluations,
            "candidate_images": self.images,
            "multiplies": self.multiplies,
            "multiplies_saved_share": self.saved / total if total else 0.0,
            "cache_hits": self.cache_hits,
            "cache_lookups": self.cache_lookups,
        }


@dataclass
class _Stage:
    """Nodes up to and including one searched layer (the last stage: the rest of the network)."""

    nodes: list[int]
    layer: str | None
    macs: int = 0  # per sample, of the nodes in this stage


class _Prefix:
    """The values alive after some stages, computed when first asked for: where a longer prefix is remembered, never."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._values: dict[str, Tensor] | None = None

    def values(self) -> dict[str, Tensor]:
        if self._values is None:
            self._values = self._compute()
        return self._values


@dataclass
class CandidateEvaluator:
    """Callable (masks [n, groups], n_images) -> distances [n], for the selectors.

    program: shifts are set; layer.bias[0] is the 8-bit row. layers: names of the searched layers in order.
    mean_shifts: layer -> [n_groups, O] (see `group_mean_shifts`); empty: no correction. inputs: calibration samples.
    cache_limit: bytes of prefixes that are remembered from call to call; may be changed between calls.
    """

    program: Program
    layers: Sequence[str]
    inputs: Sequence[Tensor]
    mean_shifts: Mapping[str, npt.NDArray[np.float64]]
    cache_limit: int = 1 << 30
    statistics: SearchStatistics = field(default_factory=SearchStatistics)
    progress: Callable[[float], None] | None = None  # told the share of a call that is done, after every candidate

    def __post_init__(self) -> None:
        self.executor: Executor = FastExecutor(self.program)
        self.base = self.executor.settings(0)
        self.slices: list[slice] = []
        start = 0
        for name in self.layers:
            n = self.program.layers[name].n_groups
            self.slices.append(slice(start, start + n))
            start += n
        self.n_groups = start
        self.shifts = {k: torch.from_numpy(v) for k, v in self.mean_shifts.items()}
        self.stages: list[_Stage] = []
        nodes: list[int] = []
        searched = set(self.layers)
        for index, step in enumerate(self.program.instructions):
            nodes.append(index)
            if step.name in searched:
                self._add_stage(nodes, step.name)
                nodes = []
        self._add_stage(nodes, None)
        self.order = [stage.layer for stage in self.stages if stage.layer is not None]
        self.gene = dict(zip(self.layers, self.slices, strict=True))
        total = self.inputs[0].shape[0]
        chunk = samples_per_step(self.program.types, CHUNK)
        self.chunks = [(a, min(a + chunk, total)) for a in range(0, total, chunk)]
        self.cache: OrderedDict[tuple[int, int, bytes], dict[str, Tensor]] = OrderedDict()
        # prefixes are kept at every second stage: a kept one costs memory, a missed one at most one layer
        self.keep_stages = {i for i in range(1, len(self.stages)) if i % 2 == 0}
        exact = [self.executor.run(self._batch(number), self.base)[0] for number in range(len(self.chunks))]
        self.labels = Labels.of(torch.cat(exact))
        self.reference = [self.labels(outputs) for outputs in exact]

    def _add_stage(self, nodes: list[int], layer: str | None) -> None:
        names = [self.program.instructions[i].name for i in nodes]
        macs = sum(self.program.layers[n].macs for n in names if n in self.program.layers)
        self.stages.append(_Stage(nodes, layer, macs))

    def _batch(self, number: int) -> list[Tensor]:
        a, b = self.chunks[number]
        return [x[a:b] for x in self.inputs]

    def setting(self, name: str, low: npt.NDArray[np.bool_]) -> Setting:
        """Setting of one layer for a set of low groups, bias corrected to first order."""
        state = self.executor.layers[name]
        bias = torch.from_numpy(state.layer.bias[0].astype(np.float64))
        mask = torch.from_numpy(np.ascontiguousarray(low))
        if name in self.shifts and low.any():
            bias = torch.round(bias + self.shifts[name][mask].sum(dim=0))
        return state.setting(mask, bias)

    def __call__(self, masks: npt.NDArray[np.bool_], n_images: int = 0) -> npt.NDArray[np.float64]:
        masks = np.ascontiguousarray(masks, dtype=np.bool_)
        total = self.inputs[0].shape[0]
        n_images = min(n_images or total, total)
        self.statistics.evaluations += len(masks)
        self.statistics.images += len(masks) * n_images
        keys = [[masks[i, self.gene[layer]].tobytes() for layer in self.order] for i in range(len(masks))]
        squares = np.zeros(len(masks))
        cached: dict[tuple[str, bytes], Setting] = {}
        self._done, self._wanted = 0, len(masks) * sum(a < n_images for a, _ in self.chunks)
        multiplies, macs, alone = self.statistics.multiplies, sum(stage.macs for stage in self.stages), 0
        with torch.no_grad():
            for number, (a, b) in enumerate(self.chunks):
                take = min(b, n_images) - a
                if take <= 0:
                    break
                start = _Prefix(partial(self._start, number))
                self._walk(number, take, 0, start, list(range(len(masks))), masks, keys, squares, cached)
                alone += macs * (b - a) * len(masks)
        self.statistics.saved += alone - (self.statistics.multiplies - multiplies)
        result: npt.NDArray[np.float64] = np.sqrt(squares / n_images)
        return result

    def _start(self, number: int) -> dict[str, Tensor]:
        return dict(zip(self.program.inputs, self._batch(number), strict=True))

    def _walk(
        self,
        number: int,
        take: int,
        depth: int,
        prefix: _Prefix,
        members: list[int],
        masks: npt.NDArray[np.bool_],
        keys: list[list[bytes]],
        squares: npt.NDArray[np.float64],
        cached: dict[tuple[str, bytes], Setting],
    ) -> None:
        """Run stage `depth` for the candidates `members`, which agree in all genes before it."""
        stage = self.stages[depth]
        samples = self.chunks[number][1] - self.chunks[number][0]
        if stage.layer is None:
            out = self._run_stage(stage, dict(prefix.values()), self.base, samples)
            soft = self.labels(out[self.program.outputs[0]])
            squares[members] += (soft[:take] - self.reference[number][:take]).double().pow(2).sum().item()
            self._done += len(members)
            if self.progress is not None:
                self.progress(self._done / self._wanted)
            return
        branches: dict[bytes, list[int]] = {}
        for i in members:
            branches.setdefault(keys[i][depth], []).append(i)
        for gene, own in branches.items():
            key = (number, depth, b"".join(keys[own[0]][: depth + 1])) if self._keeps(depth) else None
            setting = cached.get((stage.layer, gene))
            if setting is None:
                setting = self.setting(stage.layer, masks[own[0], self.gene[stage.layer]])
                cached[(stage.layer, gene)] = setting
            hit = self._recall(key)
            after = _Prefix(partial(self._extend, prefix, stage, setting, samples, key) if hit is None else hit)
            self._walk(number, take, depth + 1, after, own, masks, keys, squares, cached)

    def _extend(
        self, prefix: _Prefix, stage: _Stage, setting: Setting, samples: int, key: tuple[int, int, bytes] | None
    ) -> dict[str, Tensor]:
        """The values after one more stage; remembered under `key`."""
        assert stage.layer is not None
        after = self._run_stage(stage, dict(prefix.values()), {**self.base, stage.layer: setting}, samples)
        if key is not None:
            self._remember(key, after)
        return after

    def _keeps(self, depth: int) -> bool:
        return self.cache_limit > 0 and depth in self.keep_stages

    def _recall(self, key: tuple[int, int, bytes] | None) -> Callable[[], dict[str, Tensor]] | None:
        """What gives the remembered values of a prefix, if there are any."""
        if key is None:
            return None
        self.statistics.cache_lookups += 1
        hit = self.cache.get(key)
        if hit is None:
            return None
        self.cache.move_to_end(key)
        self.statistics.cache_hits += 1
        eight_bit = self.program.qparams
        return lambda: {k: v.float() if k in eight_bit else v for k, v in hit.items()}

    def _run_stage(
        self, stage: _Stage, values: dict[str, Tensor], settings: Mapping[str, Setting], samples: int
    ) -> dict[str, Tensor]:
        self.statistics.multiplies += stage.macs * samples
        return self.executor.schedule.run(
            values, lambda step, own: self.executor.step(step, own, settings, samples), indices=stage.nodes
        )

    def _remember(self, key: tuple[int, int, bytes], values: dict[str, Tensor]) -> None:
        packed = {}
        for name, x in values.items():
            q = self.program.qparams.get(name)
            packed[name] = x if q is None else x.to(torch.int8 if q.signed else torch.uint8)
        size = sum(x.numel() * x.element_size() for x in packed.values())
        if size > self.cache_limit:
            return
        while self.statistics.cache_bytes + size > self.cache_limit and self.cache:
            _, old = self.cache.popitem(last=False)
            self.statistics.cache_bytes -= sum(x.numel() * x.element_size() for x in old.values())
        self.cache[key] = packed
        self.statistics.cache_bytes += size

    def deviation(self, masks: npt.NDArray[np.bool_]) -> dict[str, float]:
        """Largest difference of soft labels between this evaluation and the exact engine, same candidates and biases."""
        exact = Executor(self.program)
        worst = 0.0
        with torch.no_grad():
            for mask in masks:
                fast = {n: self.setting(n, mask[self.gene[n]]) for n in self.layers}
                settings = exact.settings(0)
                for name in self.layers:
                    low = torch.from_numpy(mask[self.gene[name]])
                    settings[name] = exact.layers[name].setting(low, fast[name].bias)
                batch = self._batch(0)
                a = self.labels(self.executor.run(batch, {**self.base, **fast})[0])
                b = self.labels(exact.run(batch, settings)[0])
                worst = max(worst, float((a - b).abs().max()))
        return {"largest_soft_label_difference": worst, "candidates": float(len(masks)), "images": float(len(a))}
