"""What all configs do with settings that cannot be: name class and setting, in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, field_validator

from bitdial.errors import ConfigError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.quantization.config import QuantizeConfig
from bitdial.selection.layerwise.config import LayerwiseConfig
from bitdial.settings import BaseConfig


class OvenError(ConfigError):
    """What the oven cannot do."""


class Oven(BaseConfig):
    """A config with every kind of setting that messages must name."""

    degrees: int | str = Field(180, ge=50)
    shelves: tuple[int, ...] = (1,)
    times: dict[str, float] = {}
    mode: str = "bake"

    @field_validator("mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        if value == "melt":
            raise OvenError("it would melt")
        return value


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"colour": 1}, r"^Oven\.colour: Extra inputs .* \(got 1\)$"),
        ({"degrees": None}, r"^Oven\.degrees: "),  # not Oven.degrees.int, the first member of the union
        ({"shelves": (1, "top")}, r"^Oven\.shelves\.1: .*\(got 'top'\)$"),
        ({"times": {"pie": "long"}}, r"^Oven\.times\.pie: "),
        ({"times": {3: 1.0}}, r"^Oven\.times\.3: .*\(got 3\)$"),
    ],
)
def test_errors_name_class_and_setting(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Oven(**given)
    with pytest.raises(ConfigError, match=told):
        Oven().updated(**given)


def test_a_config_error_of_a_validator_is_raised_as_it_is() -> None:
    with pytest.raises(OvenError, match=r"^it would melt$"):
        Oven(mode="melt")


@pytest.mark.parametrize(
    "config",
    [Oven(degrees=200), QuantizeConfig(low_bits=5), FinetuneConfig(epochs=3), LayerwiseConfig(budget_size="80%")],
)
def test_updated_keeps_the_class_and_what_is_not_changed(config: BaseConfig) -> None:
    assert type(config.updated()) is type(config) and config.updated() == config
    if "seed" in type(config).model_fields:
        changed = config.updated(seed=7)
        assert changed.model_dump() == {**config.model_dump(), "seed": 7}
    with pytest.raises(ConfigError, match=rf"^{type(config).__name__}\.colour: "):
        config.updated(colour="red")
