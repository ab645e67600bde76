"""Options of a command from the fields of configs: a setting is declared once, where it is used.

A parameter `given: Annotated[Given, options_of("package.module:Config")]` of a command stands for one option per field that
`bitdial.settings.setting` made. The command gets what was given on the command line (or by a variable) by the fields' names;
the config has the defaults, which --help shows. A parameter `terminal: Terminal` stands for --json, --quiet and --debug, and
the command runs inside `Terminal.running`. `command` makes of such a function what typer takes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from bitdial.cli.reading import READERS
from bitdial.cli.terminal import Terminal
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

OUTPUT_PANEL = "Output"
_CONTEXT = "typer_context"
_TERMINAL = {
    "json": ("--json", "Print one JSON object to standard output, and nothing else."),
    "quiet": ("--quiet -q", "No progress bars and no notes."),
    "debug": ("--debug", "Show where an error arose (traceback)."),  # `bitdial.cli.main` looks for it
}


class Given(dict[str, Any]):
    """Settings that were given, by the fields' names. flags: the options that gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.flags: list[str] = []


@dataclass(frozen=True)
class options_of:
    """What a parameter stands for: the options of a config. The module is imported when the options are asked for.

    only     these fields, in this order; all that are options if empty
    without  fields that the command declares otherwise
    panel    of all of them in --help, instead of the fields' own
    told     other words for some of them
    """

    config: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    panel: str = ""
    told: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> Iterator[Option]:
        module, _, name = self.config.partition(":")
        config = getattr(importlib.import_module(module), name)
        fields: dict[str, FieldInfo] = config.model_fields
        for key in self.only or fields:
            info = fields[key]
            if key not in self.without and isinstance(info.json_schema_extra, dict):
                yield Option(key, info, self.told.get(key, info.description or ""), self.panel)


@dataclass(frozen=True)
class Option:
    """One field as an option. told: its help; panel: "" for the field's own."""

    name: str
    info: FieldInfo
    told: str
    panel: str

    @property
    def extra(self) -> dict[str, Any]:
        assert isinstance(self.info.json_schema_extra, dict)
        return dict(self.info.json_schema_extra)

    @functools.cached_property
    def flag(self) -> str:
        """The option's long name."""
        return str(self.extra["option"] or "--" + self.name.replace("_", "-")).split()[0].partition("/")[0]

    def read(self, value: Any) -> Any:
        """The setting, from what the command line has. Raises ConfigError."""
        if reader := self.extra["read"]:
            return READERS[reader].read(value, self.flag)
        return tuple(value) if isinstance(value, list) else value

    def parameter(self) -> inspect.Parameter:
        """As typer takes it."""
        extra, kind = self.extra, _plain(self.info.annotation)
        metavar, bounds = extra["metavar"], {}
        default = None if self.info.is_required() else self.info.get_default(call_default_factory=True)
        if get_origin(kind) is Literal:
            metavar = metavar or "|".join(map(str, get_args(kind)))
            kind = str
        elif get_origin(kind) is tuple and not extra["read"]:
            kind, default = list[get_args(kind)[0]], list(default) if default else None  # type: ignore[misc]
        elif extra["read"]:
            kind, default = str, None if default is None else READERS[extra["read"]].show(default)
        elif kind in (int, float) and ".." not in metavar:
            bounds = _bounds(self.info)
        option = typer.Option(
            *(extra["option"] or self.flag).split(),
            metavar=metavar or None,
            help=self.told,
            rich_help_panel=self.panel or extra["panel"] or None,
            show_default=default is not None and not (kind is bool and "/" not in extra["option"]),
            envvar=extra["env"] or None,
            show_envvar=bool(extra["env"]),
            **bounds,
        )
        annotation = Annotated[kind | None if default is None else kind, option]  # type: ignore[valid-type]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """The type of an annotation without None and what Annotated adds; of another union, the first."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _bounds(info: FieldInfo) -> dict[str, Any]:
    """min and max where they are inclusive: the parser then refuses what lies outside, and --help shows them."""
    limits = list(info.metadata)
    for part in get_args(info.annotation):
        if get_origin(part) is Annotated:  # of a union: Annotated[int, Field(ge=1)] | None
            limits += [limit for found in get_args(part)[1:] for limit in getattr(found, "metadata", [found])]
    bounds = {}
    for limit in limits:
        for name, bound in (("ge", "min"), ("le", "max")):
            if getattr(limit, name, None) is not None:
                value = getattr(limit, name)
                bounds[bound] = int(value) if value == int(value) else value  # 0 reads better than 0.0
    return bounds


class Command:
    """A function of which some parameters stand for configs, called by typer with all their options."""

    __name__: str

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def groups(self) -> dict[str, list[Option]]:
        """The options that a parameter stands for."""
        found = {}
        for name, parameter in inspect.signature(self.function, eval_str=True).parameters.items():
            for part in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(part, options_of):
                    found[name] = list(part.options())
        return found

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(self.function, eval_str=True).parameters.items():
            if name in self.groups:
                parameters += [option.parameter() for option in self.groups[name]]
            elif parameter.annotation is Terminal:
                for own, (names, told) in _TERMINAL.items():
                    option = typer.Option(*names.split(), help=told, rich_help_panel=OUTPUT_PANEL)
                    parameters.append(parameter.replace(name=own, default=False, annotation=Annotated[bool, option]))
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        if self.groups:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(_CONTEXT, kind, annotation=typer.Context))
        return inspect.Signature(parameters)

    def __call__(self, **values: Any) -> Any:
        context: typer.Context | None = values.pop(_CONTEXT, None)
        flags: dict[str, str] = {}
        try:
            for parameter, group in self.groups.items():
                given = Given()
                for option in group:
                    value = values.pop(option.name)
                    source = context.get_parameter_source(option.name) if context is not None else None
                    if source is not None and source.name != "DEFAULT":
                        flags[option.name] = option.flag
                        given[option.name] = option.read(value)
                        given.flags.append(option.flag)
                values[parameter] = given
            if values.pop("debug", None) is None:  # it has no terminal
                return self.function(**values)
            terminal = Terminal(values.pop("json"), values.pop("quiet"))
            with terminal.running():
                return self.function(terminal=terminal, **values)
        except ConfigError as error:  # it names a setting, as in models.0.slo_ms; who gave it as an option knows that name
            place, colon, rest = str(error).partition(": ")
            flag = next((flags[part] for part in place.split(".") if part in flags), None)
            if colon and flag is not None:
                error.args = (f"{flag}: {rest}", *error.args[1:])
            raise


def command(function: Callable[..., Any]) -> Command:
    """See `Command`; a decorator."""
    return Command(function)


class LazyCommand(TyperCommand):
    """A command that reads its configs when its options are asked for, so that `bitdial --help` imports none of them."""

    def get_params(self, ctx: Any) -> Any:
        if (full := getattr(self.callback, "full", None)) is not None:
            app = typer.Typer(add_completion=False)
            app.command()(full)
            made = typer.main.get_command(app)
            self.params, self.callback = made.params, made.callback
        return super().get_params(ctx)


def lazy(full: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a command, without options, until they are asked for (with cls=LazyCommand)."""

    def stand_in() -> None:
        raise AssertionError("a command runs with its options")

    stand_in.__name__, stand_in.__doc__ = full.__name__, full.__doc__
    stand_in.full = full  # type: ignore[attr-defined]
    return stand_in


