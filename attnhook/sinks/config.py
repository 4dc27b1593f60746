"""``path?key=value&key=value``: the options behind a sink's path, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from attnhook.errors import PluginError

Parser = Callable[[str], Any]

_QUERY = re.compile(r"\w+=[^&=]*(&\w+=[^&=]*)*")
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def split(config: str) -> tuple[str, dict[str, str]]:
    """Path and options of ``path?key=value&...``; a last ``?`` without ``key=value`` behind it is part of the path."""
    path, mark, query = config.rpartition("?")
    if not mark or not _QUERY.fullmatch(query):
        return config, {}
    return path, dict(part.split("=", 1) for part in query.split("&"))


def join(path: str, options: Mapping[str, str]) -> str:
    """The opposite of `split`."""
    return path + ("?" + "&".join(f"{key}={value}" for key, value in options.items()) if options else "")


def parse(scheme: str, config: str, known: Mapping[str, Parser]) -> tuple[str, dict[str, Any]]:
    """Path and checked options; those not given are absent.

    Raises PluginError for an unknown option, or a value that its parser refuses.
    """
    path, given = split(config)
    values = {}
    for key, text in given.items():
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
            raise PluginError(f"sink {scheme}:{config}: unknown option {key!r}; {hint}")
        try:
            values[key] = known[key](text)
        except ValueError as error:
            raise PluginError(f"sink {scheme}:{config}: {key}={text!r} must be {error}") from None
    return path, values


def flag(text: str) -> bool:
    """``0``/``1``, ``false``/``true``."""
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError("0 or 1")
    return text.lower() in ("1", "true")


def size(text: str) -> int:
    """Bytes: ``64MB``, ``1GiB``, ``4096``; at least 4096."""
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B|B)?", text, re.IGNORECASE)
    count = int(match[1]) * _SIZES.get((match[2] or "B").upper(), 1) if match else 0
    if not 4096 <= count < 2**50:
        raise ValueError("a size of at least 4096 bytes, such as 64MB")
    return count


def seconds(text: str) -> float:
    """``30s``, ``10m``, ``1h``, ``7d``: a second to ten years."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    value = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 1 <= value <= 3660 * 86400:
        raise ValueError("a time from 1s to ten years, such as 30s, 10m, 1h or 7d")
    return value


def days(text: str) -> float:
    """Days, fractions allowed: 0.01 to 36600."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 36600:
        raise ValueError("a number of days from 0.01 to 36600")
    return value


def between(low: int, high: int) -> Parser:
    """A whole number in a range."""

    def check(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return check
