"""Readers of what is written on the command line: text in, a setting out. They raise ConfigError, naming the option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdial.errors import ConfigError

_UNITS = {"b": 1.0, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "kib": 1024.0, "mib": 1024.0**2}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def parse_share(text: str, option: str) -> float:
    """A share in 0..1 from text: "25%" is 25 percent; without the sign numbers above 1 are percent ("25"), others
    shares ("0.25", and "1" is all). Raises ConfigError.
    """
    stripped = text.strip()
    signed = stripped.endswith("%")
    try:
        value = float(stripped.rstrip("%").strip())
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is no number; write 25, 25% or 0.25") from None
    share = value / 100 if signed or value > 1 else value
    if not math.isfinite(value) or not 0.0 <= share <= 1.0:
        raise ConfigError(f"{option}: {stripped} is outside 0..1 (or 0..100 percent)")
    return share


def parse_ratios(text: str, option: str = "--ratios") -> tuple[float, ...]:
    """Ascending, distinct ratios from "0,25,50" or "0,0.25,0.5"; each entry by the rule of `parse_share`."""
    return tuple(sorted({parse_share(part, option) for part in text.split(",")}))


def parse_band(text: str) -> tuple[float, float]:
    """The two ends of "LOW..HIGH". Raises ConfigError."""
    low, separator, high = text.partition("..")
    if not separator:
        raise ConfigError(f"--band: '{text}' is not of the form LOW..HIGH, for example 50..100")
    ends = parse_share(low, "--band"), parse_share(high, "--band")
    if ends[0] > ends[1]:
        raise ConfigError(f"--band: {text} has its larger end first; write {high}..{low}")
    return ends


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated finite numbers. Raises ConfigError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is no list of numbers; write for example 0.485,0.456,0.406") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{option}: '{text}' holds a number that is not finite")
    return numbers


def parse_size(text: str, option: str = "--resize") -> tuple[int, int]:
    """(height, width) of "224" or "224x320". Raises ConfigError."""
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(f"{option}: '{text}' is no size; write 224 or 224x320 (height x width)")
    sizes = [int(part) for part in parts]
    if min(sizes) < 1 or max(sizes) > 1 << 14:
        raise ConfigError(f"{option}: {text} must lie between 1 and {1 << 14}")
    return sizes[0], sizes[-1]


def parse_low_bits(text: str, option: str = "--low-bits") -> int | str:
    """The word auto, or the number; its range is the config's to check. Raises ConfigError."""
    if text.strip() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} {text} is neither a number of bits, 2 to 7, nor auto") from None


def parse_words(text: str, option: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(part.strip() for part in text.split(","))


def parse_amount(text: str, units: dict[str, float], option: str, example: str) -> float | str:
    """"300k" or "5ms" -> the number in the base unit; "80%" stays a share. Raises ConfigError."""
    given = text.strip()
    if given.endswith("%"):
        return given
    number = given.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = given[len(number) :].strip().lower()
    try:
        return float(number) * (units[unit] if unit else 1.0)
    except (ValueError, KeyError):
        raise ConfigError(f"{option}: '{text}' is no amount; write for example {example}") from None


def parse_ms(text: str, option: str) -> float:
    """Seconds, of milliseconds."""
    try:
        return 1e-3 * float(text)
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is no number of milliseconds") from None


@dataclass(frozen=True)
class Reader:
    """How a kind of setting is written. read: (text, option) to the value. show: a default as it would be written."""

    read: Callable[[str, str], Any]
    show: Callable[[Any], str] = str


READERS = {
    "share": Reader(parse_share, lambda share: f"{100 * share:g}%"),
    "ratios": Reader(parse_ratios, lambda ratios: ",".join(f"{100 * ratio:g}" for ratio in ratios)),
    "low bits": Reader(parse_low_bits),
    "words": Reader(parse_words, ",".join),
    "metrics": Reader(lambda text, _: text, "+".join),
    "path": Reader(lambda text, _: Path(text)),
    "ms": Reader(parse_ms, lambda seconds: f"{1e3 * seconds:g}"),
    "bytes": Reader(lambda text, option: parse_amount(text, _UNITS, option, "300k, 1.5MB or 80%")),
    "seconds": Reader(lambda text, option: parse_amount(text, _TIMES, option, "5ms or 80%")),
    "numbers": Reader(parse_numbers),
    "size": Reader(parse_size, lambda size: f"{size[0]}x{size[1]}"),
}
