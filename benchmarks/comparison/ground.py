"""What all methods stand on: one prepared network, one configuration, and what several methods need of both, made once."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.errors import CalibrationError, ConfigError
from bitdial.pipeline import LowTables, Prepared, Progress, eight_bit_program, low_tables, silent
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from comparison.budget import Fill, eligible_layers
from comparison.separability import Documents
from comparison.training import Training
from comparison.uniform import Rounding

Numbers = Literal["uniform", "effective"]


@dataclass(frozen=True)
class Settings:
    """What is open about the methods compared with. Defaults follow the papers where these say.

    numbers          what a low layer of the layer-wise methods is: "uniform" (integers of that width with ranges of their own,
                     as published) or "effective" (bitdial's effective bits: the methods are selectors of whole layers then)
    rounding         of uniform weights: "nearest" (as published) or "compensated" (GPTQ)
    fill             "part": one layer runs low in part, so that the average is met to within half a group; "whole": the
                     average is at most what was asked for
    probes           random vectors of the Hessian trace
    documents        of CSMPQ's score: "classes" or "samples"
    images           calibration samples behind the sensitivities
    kurtosis_weight  of RobustQuant's penalty (lambda)
    iterations, reconstruction_batch  of PTMQ and QDrop, per block
    reconstruction_rate  of PTMQ, in low steps of a layer's weights
    rounding_rate    of QDrop, in the arguments of the sigmoids
    """

    numbers: Numbers = "uniform"
    rounding: Rounding = "nearest"
    fill: Fill = "part"
    probes: int = 64
    documents: Documents = "classes"
    images: int = 256
    kurtosis_weight: float = 1.0
    iterations: int = 300
    reconstruction_rate: float = 0.01
    reconstruction_batch: int = 32
    rounding_rate: float = 0.03

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "numbers": ("uniform", "effective"), "rounding": ("nearest", "compensated"), "fill": ("part", "whole"),
            "documents": ("classes", "samples"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"Settings.{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("probes", "images", "iterations", "reconstruction_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Settings.{name} is {getattr(self, name)}: give at least 1")
        if not self.kurtosis_weight >= 0.0 or not min(self.reconstruction_rate, self.rounding_rate) > 0.0:
            raise ConfigError("Settings.kurtosis_weight must not be negative, rates must be above 0")


@dataclass
class Ground:
    """The common start. labels: int64 [samples] of the calibration data, or None (own answers are used then). training: for the
    methods that train.

    `seconds` sums what the shared steps took, so that each method can be charged for those it uses.
    """

    prepared: Prepared
    config: QuantizeConfig
    labels: npt.NDArray[np.int64] | None = None
    training: Training | None = None
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels.shape != (self.prepared.samples,):
            raise CalibrationError(f"{self.labels.shape} labels for {self.prepared.samples} calibration samples")

    def need_training(self, method: str) -> Training:
        """The training data. Raises ConfigError without them."""
        if self.training is None:
            raise ConfigError(f"'{method}' trains: give Ground(..., training=Training(FinetuneConfig(...), batches))")
        return self.training

    @cached_property
    def eight(self) -> Program:
        """The 8-bit program (one ratio: 0), biases corrected."""
        started = time.perf_counter()
        with torch.no_grad():
            program = eight_bit_program(self.prepared, self.config.updated(ratios=(0.0,)))
        self.seconds["8-bit model"] = time.perf_counter() - started
        return program

    @cached_property
    def _effective(self) -> tuple[Program, LowTables]:
        started = time.perf_counter()
        config = self.config.updated(ratios=(0.0,))
        program = copy.deepcopy(self.eight)
        tables = low_tables(self.prepared, program, config)
        self.seconds["shifts"] = time.perf_counter() - started
        return program, tables

    @property
    def effective(self) -> Program:
        """A copy of the 8-bit program with bitdial's shifts and rounding; nothing is low."""
        return copy.deepcopy(self._effective[0])

    @property
    def group_scores(self) -> dict[str, npt.NDArray[np.float64]]:
        """bitdial's error score of every group, per layer."""
        return self._effective[1].scores

    @property
    def layers(self) -> list[str]:
        """Names of the layers that may run low. Raises SelectionError if there are none."""
        return list(eligible_layers(self.eight))

    def full_masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Every eligible group of every layer."""
        return {n: np.ones(layer.n_groups, np.bool_) for n, layer in eligible_layers(self.eight).items()}

    def batches(self, images: int) -> list[list[Tensor]]:
        """Calibration images, in the memory format that float convolutions are fastest in."""
        return [[channels_last(x) for x in batch] for batch in self.prepared.batches(self.config.batch_size, images)]

    def label_batches(self, images: int) -> list[npt.NDArray[np.int64]] | None:
        if self.labels is None:
            return None
        size, n = self.config.batch_size, min(images, self.prepared.samples)
        return [self.labels[a : min(a + size, n)] for a in range(0, n, size)]
