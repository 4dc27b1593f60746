"""A probe's text before a tokenizer has seen it, and the words that the generators choose from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from random import Random
from typing import Any


@dataclass(frozen=True)
class Draft:
    """What a generator or a data file says about one probe."""

    id: str  # new in its pack
    text: str = ""  # to be continued; empty where there are turns
    turns: tuple[str, ...] = ()  # of user and assistant in turn, the user's first and last
    answer: str | None = None  # what the text should be continued with, without its leading space
    filler: int | None = None  # where in the text filler goes, an index of a character
    distance: int | None = None  # tokens from the answer's place in the text to the last token
    found: int | None = None  # where the answer stands in the text, an index of a character; else nowhere


@cache
def data(name: str) -> Any:
    """A JSON file of this package."""
    return json.loads((resources.files("attnhook.analysis.packs") / f"{name}.json").read_text(encoding="utf-8"))


def words(kind: str) -> list[str]:
    """One of the word lists."""
    found: list[str] = data("words")[kind]
    return found


def random(pack: str, number: int | str) -> Random:
    """The generator of one probe, so that no probe depends on how many there are before it."""
    return Random(f"attnhook {pack} {number}")  # strings are seeded the same way everywhere and always


def numbered(pack: str, number: int) -> str:
    """The id of a pack's probe that has no better one."""
    return f"{pack}-{number:02d}"
