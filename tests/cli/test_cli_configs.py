"""Options made from the fields of a config: what they are called, take, refuse and show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from bitdial.cli.configs import Given, command, options_of
from bitdial.errors import ConfigError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.quantization.config import QuantizeConfig
from bitdial.selection.layerwise.config import LayerwiseConfig
from bitdial.settings import BaseConfig, setting


class Oven(BaseConfig):
    """An oven."""

    degrees: int = setting(180, "How hot.", "N", "Heat", ge=50)
    share: float = setting(0.5, "How full.", "SHARE", read="share", le=0.8)
    mode: Literal["bake", "grill"] = setting("bake", "Where heat comes from.", panel="Heat")
    fan: bool = setting(False, "Move the air.")
    light: bool = setting(True, "Light inside.", option="--light/--dark")
    names: tuple[str, ...] = setting((), "What is inside (repeatable).", "NAME")
    door: Path | None = setting(None, "Another door.", "FILE", option="--door -d")
    hidden: int = 3


@pytest.fixture
def bake() -> Any:
    """bake("--degrees", "200") -> (settings given, the config), or raises what was raised."""
    seen: list[Any] = []

    @command
    def bake(*, first: str = "", given: Annotated[Given, options_of(f"{__name__}:Oven")], last: int = 1) -> None:
        """Bake."""
        seen[:] = [given, Oven(**given), last]

    app = typer.Typer(rich_markup_mode="rich")
    app.command()(bake)

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return seen if result.exit_code == 0 and "--help" not in arguments else result

    return run


def test_only_what_is_given_reaches_the_config(bake: Any) -> None:
    given, config, last = bake()
    assert given == {} and config == Oven() and last == 1
    given, config, last = bake(
        "--degrees", "180", "--share", "25%", "--mode", "grill", "--fan", "--dark", "--names", "a", "--names", "b", "-d", "x",
        "--last", "7",
    )  # fmt: skip
    assert given.flags == ["--degrees", "--share", "--mode", "--fan", "--light", "--names", "--door"]
    assert given == {
        "degrees": 180,  # though it is the default: a file of settings would lose against it
        "share": 0.25, "mode": "grill", "fan": True, "light": False, "names": ("a", "b"), "door": Path("x"),
    }  # fmt: skip
    assert config.degrees == 180 and config.names == ("a", "b") and last == 7


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--share", "90%"], r"^--share: Input should be less than or equal to 0\.8 \(got 0\.9\)$"),
        (["--share", "half"], r"^--share: 'half' is no number"),
        (["--mode", "boil"], r"^--mode: .*'bake' or 'grill' \(got 'boil'\)$"),
    ],
)
def test_what_the_config_refuses_has_the_options_name(bake: Any, arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bake(*arguments)


def test_bounds_that_the_parser_knows_are_its_to_refuse(bake: Any) -> None:
    result = bake("--degrees", "20")
    assert result.exit_code == 2 and "--degrees" in result.output and "50" in result.output


def test_help_has_words_bounds_defaults_and_panels_of_the_fields(bake: Any) -> None:
    text = " ".join(bake("--help").output.split())
    for told in (
        "--degrees N [x>=50] How hot. [default: 180]",
        "--mode bake|grill Where heat comes from. [default: bake]",
        "SHARE How full. [default: 50%]",
        "Light inside. [default: light]",
        "Another door.",
        "─ Heat ─",
    ):
        assert told in text, told
    assert "hidden" not in text and text.index("--first") < text.index("--share") < text.index("--last")


@pytest.mark.parametrize("config", [Oven, FinetuneConfig, QuantizeConfig, LayerwiseConfig])
def test_every_setting_is_in_the_docstring(config: type[BaseConfig]) -> None:
    for name, field in config.model_fields.items():
        assert name == "hidden" or f"\n    {name}: {field.description}" in (config.__doc__ or ""), name


def test_a_new_field_is_a_new_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place: the field. Nothing of the command names it."""
    from bitdial.cli import finetune
    from bitdial.cli.configs import Command

    class Wider(FinetuneConfig):
        """One setting more."""

        loudness: int = setting(3, "How loud.", "N", "Training", ge=0)

    before = finetune.finetune.__signature__.parameters
    monkeypatch.setattr(sys.modules["bitdial.finetuning.config"], "FinetuneConfig", Wider)
    after = Command(finetune.finetune.function).__signature__.parameters
    assert [name for name in after if name not in before] == ["loudness"]
