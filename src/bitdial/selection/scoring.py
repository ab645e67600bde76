"""Calling the evaluation: remembers what was scored, counts, and checks what comes back. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitdial.errors import SelectionError
from bitdial.selection.problem import BoolArray, Evaluate, FloatArray


def pack(mask: BoolArray) -> bytes:
    """A mask, or masks row by row, as bytes (eight groups each, a row padded with zeros)."""
    return np.packbits(mask, axis=-1).tobytes()


def unpack(packed: bytes, n_groups: int) -> BoolArray:
    """The mask bool [n_groups] of `pack`. Raises ValueError if the length does not fit or padding bits are set."""
    if len(packed) != (n_groups + 7) // 8:
        raise ValueError(f"{len(packed)} bytes do not hold {n_groups} groups")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))
    if bits[n_groups:].any():
        raise ValueError("padding bits are set")
    return bits[:n_groups].astype(np.bool_)


class Scorer:
    """An `Evaluate` with a memory of the candidates scored on the present number of images.

    The memory is dropped when that number changes: searches only ever go to more images, so old entries are never
    needed again, and a checkpoint stays small. evaluate: None where nothing is to be scored.
    """

    def __init__(self, evaluate: Evaluate | None) -> None:
        self._evaluate = evaluate
        self.n_images = 0
        self.memory: dict[bytes, float] = {}
        self.evaluations = 0
        self.image_evaluations = 0
        self.cache_hits = 0

    def counts(self) -> dict[str, Any]:
        """As a `SelectionResult` has them."""
        return {
            "evaluations": self.evaluations, "image_evaluations": self.image_evaluations, "cache_hits": self.cache_hits,
        }  # fmt: skip

    def row(self, target: float, generation: int, fitness: FloatArray, n_images: int) -> dict[str, float]:
        """A row of a `SelectionResult`'s history."""
        return {
            "target": target, "generation": generation, "best": float(fitness.min()), "mean": float(fitness.mean()),
            "n_images": n_images, "evaluations": self.evaluations,
        }  # fmt: skip

    def forget(self) -> None:
        """Drop the memory."""
        self.memory = {}

    def seen(self, mask: BoolArray, n_images: int) -> bool:
        """Is the fitness of `mask` on n_images known? A yes counts as a cache hit."""
        known = n_images == self.n_images and pack(mask) in self.memory
        self.cache_hits += known
        return known

    def score(self, masks: BoolArray, n_images: int) -> FloatArray:
        """float64 [n_candidates]: fitness of masks bool [n_candidates, n_groups] on n_images.

        Each distinct mask is evaluated at most once, all new ones in one call. Raises SelectionError if the evaluation
        returns anything but one finite number per candidate.
        """
        if n_images != self.n_images:
            self.forget()
            self.n_images = n_images
        assert self._evaluate is not None
        keys = [pack(mask) for mask in masks]
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self.memory}
        rows = sorted(new.values())
        if rows:
            fitness = np.asarray(self._evaluate(masks[rows], n_images))
            if fitness.shape != (len(rows),) or fitness.dtype.kind not in "fiu":
                raise SelectionError(
                    f"the evaluation returned {fitness.dtype}{list(fitness.shape)} for {len(rows)} candidates: it must "
                    "return one number each"
                )
            if not np.isfinite(fitness).all():
                bad = int((~np.isfinite(fitness)).sum())
                raise SelectionError(
                    f"the evaluation returned a non-finite fitness for {bad} of {len(rows)} candidates: check the "
                    "calibration data and the model's outputs for NaN and overflow"
                )
            self.memory.update((keys[row], float(f)) for row, f in zip(rows, fitness, strict=True))
            self.evaluations += len(rows)
            self.image_evaluations += len(rows) * n_images
        self.cache_hits += len(keys) - len(rows)
        return np.array([self.memory[key] for key in keys], dtype=np.float64)
