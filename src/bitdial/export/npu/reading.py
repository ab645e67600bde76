"""What a host reads of an export: the folder's four files, checked.

  manifest.json      format, design, ratios, schedule (every instruction of the network: npu or host), host (layer -> why), and
                     per layer: geometry, chunks [activation word, first channel, behind the last], low_word (which instruction
                     word holds SET LOW), low (its value at each ratio) and jobs. A job names its instruction words, weight and
                     shift entries, the rows of input and output, column tiles and how many sums a column holds afterwards.
  instructions.bin   uint32, little endian
  weights.bin        uint8 [entries, columns];  shifts.bin  likewise, 4 bits used

A job: write its words, weights, shifts and input rows to the banks, start, read the sums. Biases, multipliers and all other
operators are the host's, from the .bitdial file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.npu.plan import Design
from bitdial.engines.npu.words import Operation, Setting, Words, decode
from bitdial.errors import EngineError, ExportError

MOST_BYTES = 1 << 26  # of a manifest


@dataclass(frozen=True)
class NpuFolder:
    """words uint32 [n]; weights, shifts uint8 [entries, columns]; layers as in the manifest."""

    design: Design
    ratios: list[float]
    layers: dict[str, Any]
    words: Words
    weights: npt.NDArray[np.uint8]
    shifts: npt.NDArray[np.uint8]

    def at_ratio(self, index: int) -> Words:
        """The words with the dial turned: one changed word a layer."""
        words = self.words.copy()
        for layer in self.layers.values():
            words[layer["low_word"]] = Operation.SET << 28 | Setting.LOW << 20 | layer["low"][index]
        return words


def read_folder(folder: Path) -> NpuFolder:
    """Raises ExportError, naming the file, for one that is missing, cut short or contradicts the manifest."""
    try:
        text = (folder / "manifest.json").read_bytes()
        if len(text) > MOST_BYTES:
            raise ExportError(f"{folder}/manifest.json is larger than {MOST_BYTES} bytes; export the model again")
        manifest = json.loads(text)
        design = Design(**{f.name: _whole(manifest["design"][f.name], 1 << 16) for f in fields(Design)})
        words = np.frombuffer(_bytes(folder, "instructions.bin", 4), "<u4").astype(np.uint32)
        weights = np.frombuffer(_bytes(folder, "weights.bin", design.columns), np.uint8).reshape(-1, design.columns)
        shifts = np.frombuffer(_bytes(folder, "shifts.bin", design.columns), np.uint8).reshape(-1, design.columns)
        ratios, layers = [_share(r) for r in manifest["ratios"]], manifest["layers"]
        for name, layer in layers.items():
            if len(layer["low"]) != len(ratios):
                raise ExportError(f"{folder}: layer '{name:.80}' has no LOW word for every ratio; export the model again")
            for value in layer["low"]:
                _whole(value, 1 << 16)
            for job in layer["jobs"]:
                for what, there, most in (
                    ("words", words, design.words), ("weights", weights, design.weights), ("shifts", shifts, design.shifts),
                ):  # fmt: skip
                    start, stop = (_whole(v, len(there)) for v in job[what])
                    if not start < stop or stop - start > most:
                        raise ExportError(f"{folder}: a job of layer '{name:.80}' has impossible {what}; export the model again")
                decode(words[slice(*job["words"])])
            first = decode(words[slice(*layer["jobs"][0]["words"])])[0]
            if layer["low_word"] != layer["jobs"][0]["words"][0] or first.setting is not Setting.LOW:
                raise ExportError(f"{folder}: layer '{name:.80}' does not begin with its LOW word; export the model again")
    except OSError as error:
        raise ExportError(f"{folder} is no NPU export: {error}") from error
    except EngineError as error:
        raise ExportError(f"{folder}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ExportError(f"{folder}: the manifest is damaged ({error!r:.100}); export the model again") from error
    return NpuFolder(design, ratios, layers, words, weights, shifts)


def _whole(value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is no whole number of 0 to {most}")
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r:.40} is no ratio of 0 to 1")
    return float(value)


def _bytes(folder: Path, name: str, unit: int) -> bytes:
    data = (folder / name).read_bytes()
    if len(data) % unit:
        raise ExportError(f"{folder / name} is cut short: {len(data)} bytes are no multiple of {unit}; export the model again")
    return data
