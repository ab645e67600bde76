"""Every error that bitdial raises on purpose, and its warnings. Each message names the thing that is wrong and the remedy."""

from __future__ import annotations


class BitdialError(Exception):
    """Base class of all errors raised by bitdial."""


class ConfigError(BitdialError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class CaptureError(BitdialError):
    """A model could not be turned into a graph; the message names the op and the module path."""


class GraphError(BitdialError):
    """A graph breaks one of its own rules (found by the verifier between passes)."""


class CalibrationError(BitdialError, ValueError):
    """Calibration data are empty, of the wrong shape or type, or not finite."""


class InputError(BitdialError, ValueError):
    """A batch handed to a quantized model has the wrong shape, type or non-finite values."""


class RatioError(BitdialError, ValueError):
    """A ratio outside 0..1, or not a number."""


class SelectionError(BitdialError, ValueError):
    """A selection of low groups is impossible or a resumed search does not match its checkpoint."""


class ArtifactError(BitdialError):
    """A .bitdial file is truncated, tampered with, of an unknown version, or otherwise unreadable."""

    @classmethod
    def damaged(cls, where: str, problem: str) -> ArtifactError:
        """Of what no program would have written there."""
        return cls(f"{where}: {problem}; get a sound copy of the file")


class ArtifactVersionError(ArtifactError):
    """A .bitdial file was written by a newer bitdial."""


class EngineError(BitdialError):
    """An engine is unknown, unavailable on this machine, or lacks an op of the model."""


class EngineLostError(EngineError):
    """An engine, or what it runs on, can do nothing more in this process; a new one may."""


class DataError(BitdialError, ValueError):
    """A data set is missing, empty, or not of a supported form."""


class OutputError(BitdialError, OSError):
    """A result could not be written to the place asked for."""


class BudgetError(ConfigError):
    """A budget of a layer-wise plan cannot be met. `nearest`: the nearest value that can be reached, in the budget's unit
    (bytes, seconds, or a share for accuracy), nan where it is not known."""

    def __init__(self, message: str, nearest: float = float("nan")) -> None:
        super().__init__(message)
        self.nearest = nearest


class ExportError(BitdialError):
    """A model cannot be exported as asked: an operator that the export lacks (named with its module path), or a bad name."""


class LostAnswersWarning(UserWarning):
    """At some ratios a network keeps too little of the 8-bit model's answers (`QuantizeConfig.keep_answers`)."""
