"""What the configs have in common: they are immutable, what cannot be set raises ConfigError by its name, and a field says all
that there is to say of a setting: type, bounds, default, and the words and panel of its option on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitdial.errors import BitdialError, ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

__all__ = ["BaseConfig", "Strict", "setting"]


def setting(
    default: Any,
    told: str,
    metavar: str = "",
    panel: str = "",
    *,
    option: str = "",
    read: str = "",
    env: str = "",
    **limits: Any,
) -> Any:
    """A field of a config that is also an option of the command line (`bitdial.cli.configs.options_of` makes it).

    told: its help. metavar: "" for a flag, or where the type's own words (Literal) do. option: other than the field's name with
    dashes, or with a short form. read: how the text is read, a key of `bitdial.cli.configs.READERS`. env: variable that may give
    it. limits: as pydantic's Field takes them.
    """
    extra: dict[str, Any] = {"option": option, "metavar": metavar, "panel": panel, "read": read, "env": env}
    return Field(default, description=told, json_schema_extra=extra, **limits)


class Strict(BaseModel):
    """Immutable, and without names of unknown meaning. What the fields' descriptions tell is added to the class's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __pydantic_init_subclass__(cls, **keywords: Any) -> None:
        told = [f"{name}: {field.description}" for name, field in cls.model_fields.items() if field.description]
        if told:
            lines = "\n".join(f"    {line}" for line in told)
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\nSettings:\n{lines}"


class BaseConfig(Strict):
    """Settings given by name. Unknown names and values out of range raise ConfigError, which names class and setting.

    An error of bitdial's own that a validator of a subclass raises reaches the caller as it is. A subclass that holds data
    rather than settings names another error.
    """

    refusal: ClassVar[type[BitdialError]] = ConfigError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, BitdialError):
                raise cause from None
            where = ".".join((type(self).__name__, *_place(first, values)))
            shown = f"{first.get('input')!r:.200}"
            raise self.refusal(f"{where}: {first['msg']} (got {shown})") from None

    def updated(self, **changes: Any) -> Self:
        """A copy with some settings changed (validated)."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _place(error: ErrorDetails, values: Mapping[str, Any]) -> list[str]:
    """The setting that an error is about, and what in it: ["ratios", "1"].

    pydantic also names members of unions and roles ("float", "[key]"). They lead nowhere in `values`, and are left out.
    """
    parts = []
    inner: Any = values
    for part in error["loc"]:
        try:
            inner = inner[part]
        except (TypeError, LookupError):
            if error["type"] != "missing":
                continue
        parts.append(str(part))
    return parts
