"""flexiq: one quantized neural network, one dial.

Quantized once to 8 bits, a model decides at run time what share of its feature channels is computed at low precision.
`import flexiq` needs no torch; what needs it imports it when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexiq._version import __version__
from flexiq.errors import FlexiqError

if TYPE_CHECKING:
    from flexiq.api import QuantizedModel, compile, finetune, load, quantize
    from flexiq.finetuning.config import FinetuneConfig
    from flexiq.quantization.config import QuantizeConfig
    from flexiq.selection.layerwise import LayerwiseConfig

__all__ = [
    "FinetuneConfig",
    "FlexiqError",
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
    "QuantizedModel": "flexiq.api",
    "quantize": "flexiq.api",
    "finetune": "flexiq.api",
    "FinetuneConfig": "flexiq.finetuning.config",
    "compile": "flexiq.api",
    "LayerwiseConfig": "flexiq.selection.layerwise",
    "load": "flexiq.api",
    "QuantizeConfig": "flexiq.quantization.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flexiq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
