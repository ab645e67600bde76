"""What users may say of the NPU that time is modelled for; one place for all commands and the server. NumPy only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from bitdial.engines.npu.costs import Energy
from bitdial.errors import ConfigError
from bitdial.settings import Strict, setting

_PANEL = "Engine"
_MOST_BYTES = 1 << 16  # of a table of energies
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NpuOptions(Strict):
    """Of the engine `npu`; None: its own default."""

    npu_array: tuple[int, int] | None = setting(
        None, "Of the npu engine: size of the array. Default: 32x32.", "ROWSxCOLUMNS", _PANEL, read="size"
    )
    npu_mhz: Above0 | None = setting(None, "Its clock. Default: 1000.", "MHZ", _PANEL)
    npu_bandwidth: Above0 | None = setting(None, "Bytes a cycle from and to memory. Default: 32.", "BYTES", _PANEL)
    npu_energy: Path | None = setting(
        None, "Table of pJ in place of 45 nm figures; inspect --engine npu --json shows the names.", "FILE.json", _PANEL
    )
    pad_groups: bool | None = setting(None, "Allow groups that leave lanes of the array empty.", "", _PANEL)

    @classmethod
    def of(cls, **given: Any) -> NpuOptions:
        """Raises ConfigError that names the setting."""
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.100})") from None

    def engine_options(self, engine: str | None) -> dict[str, Any]:
        """As `create_engine` takes them. Raises ConfigError for another engine, and for a table that is none."""
        given = {name: getattr(self, name) for name in NpuOptions.model_fields if getattr(self, name) is not None}
        if given and engine != "npu":
            named = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"{named}: belongs to the 'npu' engine; add --engine npu")
        found: dict[str, Any] = {}
        if self.npu_array is not None:
            found["rows"], found["columns"] = self.npu_array
        for name, option in (("npu_mhz", "megahertz"), ("npu_bandwidth", "dram_bytes_per_cycle"), ("pad_groups", "pad_groups")):
            if name in given:
                found[option] = given[name]
        if self.npu_energy is not None:
            found["energy"] = read_energy(self.npu_energy)
        return found


def read_energy(path: Path) -> dict[str, float]:
    """A JSON object of pJ by name; what it leaves out keeps its default. Raises ConfigError, naming file and entry."""
    try:
        with path.open("rb") as stream:
            found = json.loads(stream.read(_MOST_BYTES))
    except OSError as error:
        raise ConfigError(f"--npu-energy {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--npu-energy {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--npu-energy {path}: an object of pJ is needed, such as {{\"dram_byte\": 20}}")
    Energy.of(found, f"--npu-energy {path}")
    return found
