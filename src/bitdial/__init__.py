"""bitdial: one quantized neural network, one dial.

Quantized once to 8 bits, a model decides at run time what share of its feature channels is computed at low precision.
`import bitdial` needs no torch; what needs it imports it when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitdial._version import __version__
from bitdial.errors import BitdialError

if TYPE_CHECKING:
    from bitdial.api import QuantizedModel, compile, finetune, load, quantize
    from bitdial.finetuning.config import FinetuneConfig
    from bitdial.quantization.config import QuantizeConfig
    from bitdial.selection.layerwise import LayerwiseConfig

__all__ = [
    "FinetuneConfig",
    "BitdialError",
    "LayerwiseConfig",
    "QuantizeConfig",
    "QuantizedModel",
    "__version__",
    "compile",
    "finetune",
    "load",
    "quantize",
]

_LAZY = {
    "QuantizedModel": "bitdial.api",
    "quantize": "bitdial.api",
    "finetune": "bitdial.api",
    "FinetuneConfig": "bitdial.finetuning.config",
    "compile": "bitdial.api",
    "LayerwiseConfig": "bitdial.selection.layerwise",
    "load": "bitdial.api",
    "QuantizeConfig": "bitdial.quantization.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitdial' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
