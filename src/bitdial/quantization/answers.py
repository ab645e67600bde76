"""How much of the 8-bit model's answers each ratio keeps: found while quantizing, stored in the file, respected when serving.

No NumPy, no torch. The record lies in a program's provenance under KEY and is checked when a file is written or read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bitdial.quantization.curve import non_increasing
from bitdial.quantization.program import Program

KEY = "answers"
TOP_ANSWERS, OUTPUTS = "top answers", "outputs"
DOUBT = 1.645  # standard errors, one-sided 95 %


@dataclass(frozen=True)
class KeptAnswers:
    """What quantizing found on its calibration samples, of the network's first output.

    ratios    ascending
    kept      per ratio, 0..1: by "top answers" the share of answers that are the same as at the smallest ratio (the 8-bit model);
              by "outputs" (no classes, or the same class for every sample) Lin's concordance with its outputs, at least 0: twice
              their covariance over the sum of their variances, about the mean sample. 97 % is an SQNR of about 12 dB
    by        "top answers" | "outputs"
    samples   that were compared
    wanted    what a useful ratio keeps, 0..1; 0: nothing is asked for
    ceiling   one of the ratios: the highest that keeps what is wanted (`judged`)

    Raises ValueError for values that contradict this.
    """

    ratios: tuple[float, ...]
    kept: tuple[float, ...]
    by: str
    samples: int
    wanted: float
    ceiling: float

    def __post_init__(self) -> None:
        if self.by not in (TOP_ANSWERS, OUTPUTS):
            raise ValueError(f"'by' is {self.by!r:.40}, not '{TOP_ANSWERS}' or '{OUTPUTS}'")
        if not self.ratios or len(self.ratios) != len(self.kept):
            raise ValueError("it needs one share per ratio")
        if not all(map(_is_share, (*self.ratios, *self.kept, self.wanted))):
            raise ValueError("ratios and shares must be numbers in 0..1")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or not 0 < self.samples < 2**53:
            raise ValueError("samples must be a positive whole number")
        if self.ceiling not in self.ratios:
            raise ValueError("its ceiling is none of its ratios")

    @staticmethod
    def judged(ratios: Sequence[float], kept: Sequence[float], by: str, samples: int, wanted: float) -> KeptAnswers:
        """The record of what was found, with its ceiling: the highest ratio that keeps what is wanted, as do all below it; the
        smallest where none above it does.

        Few samples say little: of 32 images one that changes is 3 %. A ratio is refused only where the wanted share lies above
        the 95 % upper bound (Wilson's) of the one that was found, so that a network is not held back by chance.
        """
        best = ratios[0]
        for ratio, share in zip(ratios[1:], non_increasing(kept)[1:], strict=True):
            assert share is not None
            if (_upper_bound(share, samples) if by == TOP_ANSWERS else share) < wanted:
                break
            best = ratio
        return KeptAnswers(tuple(ratios), tuple(kept), by, samples, wanted, best)

    def restricted(self, ratios: Sequence[float]) -> KeptAnswers:
        """Of some of the ratios, at least one."""
        pairs = [(r, k) for r, k in zip(self.ratios, self.kept, strict=True) if r in ratios]
        own = tuple(r for r, _ in pairs)
        ceiling = max((r for r in own if r <= self.ceiling), default=own[0])
        return replace(self, ratios=own, kept=tuple(k for _, k in pairs), ceiling=ceiling)

    def as_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return {**asdict(self), "ratios": list(self.ratios), "kept": list(self.kept)}

    @staticmethod
    def from_json(data: Any) -> KeptAnswers:
        """Raises ValueError that says what is wrong."""
        names = [f.name for f in fields(KeptAnswers)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"it must be an object of {', '.join(names)}")
        if not isinstance(data["ratios"], list) or not isinstance(data["kept"], list):
            raise ValueError("ratios and kept must be lists")
        return KeptAnswers(**{**data, "ratios": tuple(data["ratios"]), "kept": tuple(data["kept"])})

    # ---- in words --------------------------------------------------------------------------------------------------------

    @property
    def what(self) -> str:
        """What is kept, in words."""
        same = "of the 8-bit model's answers" if self.by == TOP_ANSWERS else "of the 8-bit model's outputs (concordance)"
        return f"{same} on {self.samples} calibration sample{'s' if self.samples > 1 else ''}"

    def found_beyond(self) -> str:
        """What the ratios above the ceiling keep; "" where there is none."""
        beyond = [(r, k) for r, k in zip(self.ratios, self.kept, strict=True) if r > self.ceiling]
        return f"{_each(beyond)} {self.what}" if beyond else ""

    def summary(self) -> str:
        """One line for `inspect` and reports."""
        kept = _each(zip(self.ratios, self.kept, strict=True))
        return (
            f"keeps {self.what}: {kept}; useful up to {_percent(self.ceiling)} ({_percent(self.wanted)} asked for, within the "
            "chance of so few samples)"
        )

    def warning(self) -> str:
        """What the user must know, and the remedy; "" where every ratio is useful."""
        beyond = self.found_beyond()
        if not beyond:
            return ""
        useful = _percent(self.ceiling)
        highest = f"the highest ratio that keeps them is {useful}"
        if self.ceiling == self.ratios[0]:
            highest = f"no ratio above {useful} keeps them"
        return (
            f"at high ratios this network loses too many answers: it keeps {beyond}, where {_percent(self.wanted)} are asked for "
            f"(keep_answers); {highest}, and `bitdial serve` stops there unless --max-ratio says otherwise. Wider low bits "
            "(low_bits, up to 7), keep_8bit for sensitive layers or finetuning help"
        )


def kept_answers(program: Program) -> KeptAnswers | None:
    """The record of a program; None where quantizing left none. Raises ValueError where it is malformed."""
    stored = program.provenance.get(KEY)
    return None if stored is None else KeptAnswers.from_json(stored)


def _each(pairs: Iterable[tuple[float, float]]) -> str:
    return ", ".join(f"{_percent(kept)} at {_percent(ratio)}" for ratio, kept in pairs)


def _upper_bound(share: float, samples: int) -> float:
    """Of Wilson's interval: the largest true share that a find of `share` does not speak against."""
    z, n = DOUBT, samples
    spread = z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    return min(1.0, (share + z * z / (2.0 * n) + spread) / (1.0 + z * z / n))


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _percent(share: float) -> str:
    return f"{100.0 * share:.4g} %"
