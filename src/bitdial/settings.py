"""What the configs have in common: they are immutable, and what cannot be set raises ConfigError by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bitdial.errors import BitdialError, ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

__all__ = ["BaseConfig"]


class BaseConfig(BaseModel):
    """Settings given by name. Unknown names and values out of range raise ConfigError, which names class and setting.

    An error of bitdial's own that a validator of a subclass raises reaches the caller as it is. A subclass that holds data
    rather than settings names another error.
    """

    refusal: ClassVar[type[BitdialError]] = ConfigError
    model_config = ConfigDict(frozen=True, extra="forbid")

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
