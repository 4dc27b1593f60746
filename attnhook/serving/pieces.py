"""Records in HTTP replies, written piece by piece beside the event loop.

A reply that brings megabytes of records would hold everybody else up while it is made. So a route's reply names them by
a mark only, and `RouteGuard`, which sees the reply's bytes last, puts the JSON of the records in the mark's place: a
few records at a time, made in a thread, sent before the next are made.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import msgspec.json
import numpy as np

from attnhook.record.key_mass import KeyMass
from attnhook.record.token_record import TokenRecord, fill_zones

_PIECE = 4096  # numbers that are written at once: a few milliseconds
_MARK = re.compile(rb'"(attnhook-records-[0-9a-f]{32})"')


class Layer(NamedTuple):
    """One layer of a key mass, which is written as one piece."""

    mass: KeyMass
    layer: int

    def to_dict(self, encoding_format: str) -> dict[str, Any]:
        """Its JSON."""
        return self.mass.entry(self.layer, encoding_format)


Written = TokenRecord | Layer


class Pieces:
    """The records of one HTTP reply, by the marks that stand for them in its body."""

    def __init__(self) -> None:
        self._records: dict[bytes, Sequence[Written]] = {}
        self._formats: dict[bytes, str] = {}  # of those that are in base64
        self._texts: dict[int, bytes] = {}  # of records that come again, by their identity
        self._again: dict[int, Written] = {}  # those records, which keeps their identities theirs
        self._ends: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._records)

    def mark(self, records: Sequence[Written], *, again: bool = False, encoding_format: str = "float") -> str:
        """A JSON string's value that stands for the JSON array of these records.

        ``again``: they come under later marks too, for which their texts are kept.
        """
        mark = f"attnhook-records-{secrets.token_hex(16)}"
        self._records[mark.encode()] = records
        if encoding_format != "float":
            self._formats[mark.encode()] = encoding_format
        if again:
            self._again.update((id(record), record) for record in records)
        return mark

    def at_end(self, function: Callable[[], None]) -> None:
        """Call a function once the reply is sent, or its client gone."""
        self._ends.append(function)

    def end(self) -> None:
        """The reply is over."""
        self._records.clear()
        self._formats.clear()
        self._texts.clear()
        self._again.clear()
        while self._ends:
            self._ends.pop()()

    async def expand(self, body: bytes) -> AsyncIterator[bytes]:
        """A part of the body with the records in the place of their marks; no mark lies across two parts."""
        at = 0
        for found in _MARK.finditer(body) if self._records else ():
            records = self._records.pop(found[1], None)
            if records is None:
                continue  # somebody's text that looks like one
            form = self._formats.pop(found[1], "float")
            yield body[at : found.start()] + b"["
            at = found.end()
            parts = _parts(records)
            if len(parts) == 1:  # as most chunks of streams: a thread would cost more than the writing
                yield self._written(records, form, first=True)
                parts = []
            for n, some in enumerate(parts):
                began = time.perf_counter()
                yield await asyncio.to_thread(self._written, some, form, first=n == 0)
                # the thread has held the interpreter: the loop gets as long for everybody else
                await asyncio.sleep(time.perf_counter() - began)
            yield b"]"
        yield body[at:]

    def _written(self, records: Sequence[Written], encoding_format: str, *, first: bool) -> bytes:
        new = [record for record in records if id(record) not in self._texts]
        fill_zones([record for record in new if isinstance(record, TokenRecord)])
        texts = {id(record): msgspec.json.encode(record.to_dict(encoding_format)) for record in new}
        self._texts.update((name, text) for name, text in texts.items() if name in self._again)
        return (b"" if first else b",") + b",".join(texts.get(id(r)) or self._texts[id(r)] for r in records)


def _parts(records: Sequence[Written]) -> list[Sequence[Written]]:
    if not records:
        return []
    one = records[0]
    values = [one.mass[one.layer]] if isinstance(one, Layer) else vars(one).values()
    numbers = [value for value in values if isinstance(value, np.ndarray)]
    count = max(1, _PIECE // (sum(array.size for array in numbers) + 1))
    return [records[at : at + count] for at in range(0, len(records), count)]


#: Those of the HTTP reply that this task makes; None where nobody would put the records in.
pieces: ContextVar[Pieces | None] = ContextVar("attnhook_pieces", default=None)
