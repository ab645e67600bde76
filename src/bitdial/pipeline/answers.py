"""What each ratio keeps of the 8-bit model's answers on the calibration samples (`quantization.answers` says what that means).

The bias table's last pass at a ratio ends with the outputs of the finished program, so that this costs one more pass, at ratio
0. The samples are those that everything else was fitted to: at ratio 1 nothing is chosen by them but shifts and means, and
where a ratio fails on the very samples it was fitted to, it fails on others. Withholding some would cost every network ranges and
shifts to judge a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.engines.reference.labels import are_class_scores
from bitdial.quantization.answers import KEY, OUTPUTS, TOP_ANSWERS, KeptAnswers
from bitdial.quantization.program import Program

CHUNK = 16  # samples compared at once


class AnswerComparison:
    """Compares the first output of a program at its ratios with that at ratio index 0.

    batches: calibration samples, as the engine takes them. Ratios that `compare` is not told of are run when they are needed.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Tensor]]) -> None:
        self.program, self.batches = program, batches
        self.samples = sum(batch[0].shape[0] for batch in batches)
        self._kept: dict[int, float | None] = {0: 1.0}
        self._base: Tensor | None = None
        self._by = TOP_ANSWERS

    def compare(self, index: int, outputs: Sequence[Tensor]) -> None:
        """Take in the first output of every batch at a ratio index; only their comparison is kept."""
        if self._base is None:
            self._base = torch.cat(list(outputs) if index == 0 else self._run(0))
            self._by = TOP_ANSWERS if answers_differ(self._base) else OUTPUTS
        own = torch.cat(list(outputs)) if index else self._base
        self._kept[index] = (same_answers if self._by == TOP_ANSWERS else concordance)(self._base, own)

    def provenance(self, wanted: float) -> dict[str, Any]:
        """The entry for a program's provenance, under its key; none where the samples say nothing (a constant output, or one
        that does not have the batch first)."""
        ratios = self.program.ratios
        for index in range(len(ratios)):
            if index not in self._kept:
                self.compare(index, self._run(index))
        kept = [share for i in range(len(ratios)) if (share := self._kept[i]) is not None]
        if len(ratios) < 2 or len(kept) < len(ratios):
            return {}
        return {KEY: KeptAnswers.judged(ratios, kept, self._by, self.samples, wanted).as_json()}

    def _run(self, index: int) -> list[Tensor]:
        executor = FastExecutor(self.program)
        settings = executor.settings(index)
        with torch.no_grad():
            return [executor.run(list(batch), settings)[0] for batch in self.batches]


def top_answers(outputs: Tensor) -> Tensor | None:
    """[N, answers]: the classes of scores [N, classes], or outputs that are whole numbers as they are; None for others."""
    if not outputs.is_floating_point():
        return outputs.reshape(len(outputs), -1)
    return outputs.argmax(1, keepdim=True) if outputs.dim() == 2 and outputs.shape[1] > 1 else None


def answers_differ(outputs: Tensor) -> bool:
    """Whether outputs are answers, and not the same ones for every sample, which would say nothing."""
    if outputs.is_floating_point() and not are_class_scores(outputs):
        return False
    answers = top_answers(outputs)
    return answers is not None and not bool((answers == answers[:1]).all())


def same_answers(base: Tensor, other: Tensor) -> float | None:
    """Share of answers that are the same; both must be answers."""
    ours, theirs = top_answers(base), top_answers(other)
    return None if ours is None or theirs is None else float((ours == theirs).double().mean())


def concordance(base: Tensor, other: Tensor) -> float | None:
    """1 - sum (x - y)^2 / (sum (x - m)^2 + sum (y - m)^2), at least 0, with m the mean over the samples of `base`; None where the
    samples do not differ."""
    mean = torch.nan_to_num(base).mean(0, keepdim=True, dtype=torch.float64)
    error = exact_spread = spread = 0.0
    for start in range(0, len(base), CHUNK):
        exact = torch.nan_to_num(base[start : start + CHUNK]).double()
        noisy = torch.nan_to_num(other[start : start + CHUNK]).double()
        error += float((exact - noisy).square().sum())
        exact_spread += float((exact - mean).square().sum())
        spread += float((noisy - mean).square().sum())
    return max(0.0, 1.0 - error / (exact_spread + spread)) if exact_spread > 0.0 else None
