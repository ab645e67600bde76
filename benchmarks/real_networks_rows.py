"""The rows of `real_networks.py`: the float network, the int8 quantizers of others, and bitdial in several configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitdial.errors import ConfigError
from bitdial.quantization.config import QuantizeConfig

FLOAT = "float"
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Peer:
    """A quantizer of others: its adapter in `peers`, the modules that it needs, and the suffix of what it writes."""

    name: str
    label: str
    adapter: str
    needs: tuple[str, ...]
    suffix: str


@dataclass(frozen=True)
class Configuration:
    """Settings of bitdial that differ from the default.

    hook: a step that is switched off inside the package, of `real_networks_ablation`. transformer: for transformers alone.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    hook: str = ""
    transformer: bool = False

    def unknown(self) -> list[str]:
        """Settings that this version of bitdial does not have."""
        return [setting for setting in self.changes if setting not in QuantizeConfig.model_fields]


PEERS = (
    Peer("nncf", "OpenVINO int8 (NNCF)", "nncf_preparation", ("nncf", "openvino"), ".xml"),
    Peer("onnxruntime", "ONNX Runtime int8 (static)", "onnxruntime_preparation", ("onnxruntime", "onnx"), ".onnx"),
)
CONFIGURATIONS = (
    Configuration("paper", "bitdial, 4 bits"),  # what `Options.config` starts from
    Configuration("default", "bitdial, widths of this processor", {"target": "cpu", "low_bits": "auto"}),
    Configuration("high", "bitdial, 4 bits, effort high", {"effort": "high"}),
    Configuration("greedy", "bitdial, 4 bits, greedy", {"selector": "greedy"}),
    Configuration("derived", "bitdial, 4 bits, derived low weights", {"low_weights": "derived"}),
)


def row_names() -> list[str]:
    """All rows in the order of work and of the tables."""
    return [FLOAT, *(peer.name for peer in PEERS), *(configuration.name for configuration in CONFIGURATIONS)]


def choose_names(text: str | None, names: list[str]) -> list[str]:
    """Those of `names` that a comma-separated text holds, in their order; None is all. Raises ConfigError."""
    wanted = names if text is None else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ConfigError(f"--rows: {', '.join(unknown) or 'nothing'} is not among {', '.join(names)}")
    return [name for name in names if name in wanted]


def choose_rows(text: str | None, note: Callable[[str], None]) -> list[str]:
    """The rows named in a comma-separated text, in the order of work; None is all. float is always among them.

    note: told of configurations that are left out because this version of bitdial does not know a setting. Raises ConfigError.
    """
    names = row_names()
    wanted = choose_names(text, names)
    left_out = set()
    for configuration in CONFIGURATIONS:
        if configuration.name in wanted and (settings := configuration.unknown()):
            note(f"row '{configuration.name}' left out: QuantizeConfig has no {', '.join(settings)}")
            left_out.add(configuration.name)
    return [name for name in names if name in {FLOAT, *wanted} - left_out]
