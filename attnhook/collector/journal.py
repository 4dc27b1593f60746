"""The journal: frames that have come and are not yet in every store, in files that outlast the process.

A folder of segments ``<number of its first entry>.journal``. An entry is a header (bytes of meta and of body, CRC-32
of both), msgpack meta ``[kind, ...]`` and a body. Each segment begins with the ledger's state, so that older ones
can go. There is no fsync: what was appended survives the process, a power cut may take the last seconds.

An entry that cannot be used is never a reason not to start: it is put into a file of its own and told of.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from msgspec import DecodeError, msgpack

from attnhook.errors import PluginError

logger = logging.getLogger("attnhook")

SEGMENT_BYTES = 64 * 2**20
_HEADER = struct.Struct("<III")
_VERSION = 1
_MAX_ASIDE = 100  # entries that are put aside as files at one start


class Entry(NamedTuple):
    """One entry; ``number`` counts up over all segments."""

    number: int
    kind: str  # state, frame, passed, ack; "" where it cannot be read
    meta: list[Any]
    body: bytes

    @property
    def state(self) -> dict[str, Any]:
        """The ledger's state that a state entry holds."""
        found: dict[str, Any] = msgpack.decode(self.body, type=dict)
        return found


class Journal:
    """Append-only, by one thread; `acknowledge` may come from others, under the collector's lock."""

    def __init__(self, folder: Path, stores: list[str]) -> None:
        self.folder = folder
        self.failed = 0  #: entries that the disk did not take
        self.error = ""  #: why, while it does not
        self.unusable = 0  #: entries that an earlier process left and that this one could not use
        self._acknowledged = dict.fromkeys(stores, -1)
        self._segments: list[tuple[int, Path]] = []  # first entry, ascending
        self._fd: int | None = None
        self._size = 0
        self._next = 0
        self._frames: dict[int, int] = {}  # last frame of each segment, by the segment's first entry

    def read(self) -> Iterator[Entry]:
        """Entries that a process before this one left, oldest first; the last one may be cut short and is left out.

        Raises PluginError where the folder cannot be made or read, or a segment is of a newer version.
        """
        try:
            self.folder.mkdir(parents=False, exist_ok=True)
            names = [path for path in self.folder.glob("*.journal") if path.stem.isascii() and path.stem.isdigit()]
            self._segments = sorted((int(path.stem), path) for path in names)
        except OSError as error:
            raise PluginError(
                f"the collector's journal {self.folder} cannot be used: {error}; make its folder writable or name "
                "another with --journal"
            ) from error
        for first, path in self._segments:
            number = first
            for entry in _entries(path, first):
                meta = entry.meta
                if entry.kind == "state" and len(meta) > 1 and type(meta[1]) is int and meta[1] > _VERSION:
                    raise PluginError(
                        f"{path} is of journal version {meta[1]}; this attnhook reads {_VERSION}: upgrade attnhook"
                    )
                if entry.kind == "frame":
                    self._frames[first] = entry.number
                elif entry.kind == "ack":
                    if len(meta) != 3 or type(meta[1]) is not str or type(meta[2]) is not int:
                        entry = entry._replace(kind="")
                    elif meta[1] in self._acknowledged:
                        self._acknowledged[meta[1]] = meta[2]
                yield entry
                number = entry.number + 1
            self._next = max(self._next, number)

    def frames(self) -> Iterator[Entry]:
        """The frames among what `read` gave."""
        for first, path in self._segments:
            yield from (entry for entry in _entries(path, first) if entry.kind == "frame")

    def put_aside(self, entry: Entry, why: object) -> None:
        """Keep an entry that cannot be used in a file of its own, say so, and count it."""
        self.unusable += 1
        path = self.folder / f"{entry.number:016d}.unusable"
        if self.unusable > _MAX_ASIDE:
            return
        try:
            path.write_bytes((msgpack.encode(entry.meta) if entry.meta else b"") + entry.body)
        except OSError as error:
            logger.error("entry %d of the journal %s cannot be kept aside: %s", entry.number, self.folder, error)
        logger.error(
            "entry %d of the journal cannot be used and is left out: %s; its %d bytes are kept in %s",
            entry.number,
            why,
            len(entry.body),
            path,
        )

    def begin(self, state: dict[str, Any]) -> None:
        """Start a segment with the ledger's state. Raises OSError where the disk does not take it."""
        path = self.folder / f"{self._next:016d}.journal"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        old, size, first = self._fd, self._size, self._next
        self._fd, self._size = fd, 0
        try:
            self._write(["state", _VERSION], msgpack.encode(state))
        except OSError as error:
            os.close(fd)
            self._fd, self._size, self.error = old, size, str(error)
            path.unlink(missing_ok=True)
            raise
        self.error = ""
        if old is not None:
            os.close(old)
        self._segments = [entry for entry in self._segments if entry[0] != first] + [(first, path)]
        self._remove_done()

    @property
    def full(self) -> bool:
        """Whether it is time to `begin` another segment: also where entries are missing in this one."""
        return self._fd is None or self._size >= SEGMENT_BYTES or bool(self.error)

    @property
    def idle(self) -> bool:
        """Whether every store has everything, and a new segment would be a smaller one."""
        return self._size > SEGMENT_BYTES // 4 and self._done(self._frames.get(self._segments[-1][0], -1))

    def append(self, kind: str, *meta: Any, body: bytes = b"") -> int | None:
        """Append an entry; its number, or None where the disk does not take it (counted in `failed`)."""
        number = self._next
        try:
            self._write([kind, *meta], body)
        except OSError as error:
            self.failed += 1
            self.error = str(error)
            return None
        if kind == "frame":
            self._frames[self._segments[-1][0]] = number
        return number

    def acknowledge(self, store: str, number: int) -> None:
        """``store`` has every frame up to entry ``number``; segments that nobody needs go."""
        self._acknowledged[store] = number
        self.append("ack", store, number)
        self._remove_done()

    def acknowledged(self, store: str) -> int:
        """The last entry that ``store`` has."""
        return self._acknowledged[store]

    @property
    def nbytes(self) -> int:
        """Size of the segments on disk."""
        sizes = 0
        for _, path in list(self._segments):
            try:
                sizes += path.stat().st_size
            except FileNotFoundError:  # removed meanwhile
                continue
        return sizes

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write(self, meta: list[Any], body: bytes) -> None:
        if self._fd is None:
            raise OSError("the journal is closed")
        packed = msgpack.encode(meta)
        head = _HEADER.pack(len(packed), len(body), crc32(body, crc32(packed))) + packed
        total = len(head) + len(body)
        written = 0
        try:
            written = os.writev(self._fd, [head, body])
            while written < total:
                rest = (head + body)[written:]  # a disk that is about to be full took a part
                written += os.write(self._fd, rest)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += total
        self._next += 1

    def _done(self, number: int) -> bool:
        return all(acknowledged >= number for acknowledged in self._acknowledged.values())

    def _remove_done(self) -> None:
        while len(self._segments) > 1 and self._done(self._frames.get(self._segments[0][0], -1)):
            first, path = self._segments.pop(0)
            self._frames.pop(first, None)
            path.unlink(missing_ok=True)


def _entries(path: Path, number: int) -> Iterator[Entry]:
    """The entries of a segment whose first one has ``number``; of kind "" where an entry's bytes are damaged."""
    with open(path, "rb") as file:
        while len(head := file.read(_HEADER.size)) == _HEADER.size:
            meta_size, body_size, crc = _HEADER.unpack(head)
            if not 0 < meta_size + body_size < 2 * SEGMENT_BYTES:
                return  # a power cut can leave zeros
            packed, body = file.read(meta_size), file.read(body_size)
            if len(packed) + len(body) != meta_size + body_size:
                return  # cut short, as a crash leaves it
            meta: Any = None
            if crc32(body, crc32(packed)) == crc:
                try:
                    meta = msgpack.decode(packed)
                except (DecodeError, UnicodeDecodeError, RecursionError):
                    meta = None
            if isinstance(meta, list) and meta and isinstance(meta[0], str):
                yield Entry(number, meta[0], meta, body)
            else:
                yield Entry(number, "", [], packed + body)
            number += 1
