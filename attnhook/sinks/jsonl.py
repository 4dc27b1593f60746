"""The sink that appends one JSON object per record to a file, and the reader of such files."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from attnhook.errors import PluginError, RecordError
from attnhook.plugins.contracts import Sink
from attnhook.record.row import SCHEMA_VERSION, TOKENS_VERSION, VERSIONS
from attnhook.record.token_record import TokenRecord, fill_zones
from attnhook.sinks.config import parse
from attnhook.sinks.rotation import OPTIONS, Rotation, open_rotated
from attnhook.system.untrusted import TooDeepError, lines, loads

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("attnhook")


class JsonlSink(Sink):
    """``jsonl:path`` appends to a file, ``jsonl:-`` writes to standard output.

    Options: ``rotate=64MB`` and ``every=1h`` (size and age at which the file gets another name, with the time, and
    a new one begins), ``zstd=1`` (rotated files are compressed), ``keep_days=30`` (rotated files last changed
    before that go). Processes that share a file should all have the same options.

    A line is ``request_id``, ``choice``, ``model`` and then what `TokenRecord.to_dict` gives, in ASCII.

    Delivery guarantee: when `write` returns, every line of the batch is with the operating system: a killed
    process loses none of them, a power cut may lose what was not yet on disk (there is no fsync). A batch
    that fails leaves no part of a line behind in a regular file, and is not retried. Several processes may
    append to one local file: their batches do not mix.
    """

    def __init__(self) -> None:
        self._path = ""
        self._fd: int | None = None
        self._regular = False
        self._torn = False  # a failed write may have left a part of a line
        self._moved = False  # the open file has been rotated away
        self._rotation = Rotation()

    def open(self, config: str) -> None:
        """Open the path for append, making the file but not its folder.

        A file whose last line was cut short by a crash gets a line break first, and a log warning.
        Raises PluginError where the path cannot be opened or mended.
        """
        path, options = parse("jsonl", config, OPTIONS)
        self._path = os.path.expanduser(path)  # no shell expands the ~ behind "jsonl:"
        self._rotation = Rotation(self._path, **options)
        self._torn = False
        if path == "-":
            self._rotation.refuse("standard output")
            return
        if not path:
            raise PluginError("sink jsonl: has no path; write jsonl:records.jsonl, or jsonl:- for standard output")
        try:
            self._open_file()
        except (OSError, ValueError) as error:
            self.close()
            raise PluginError(f"sink jsonl:{config} cannot be opened: {error}. {_remedy(self._path, error)}") from error
        if not self._regular:
            self._rotation.refuse(self._path)
        self._rotation.retain()

    def _open_file(self) -> None:
        self._close_file()
        # reading is needed to see whether the last line is whole
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._regular:
            self._finish_torn_line(self._fd)
        self._moved = False

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Append the records, all lines in one write.

        Raises OSError where the file does not take them, RecordError or ValueError where a number is NaN or out
        of range; the file is then as it was.
        """
        fill_zones(batch)
        whole = (json.dumps(_entry(record), separators=(",", ":"), allow_nan=False) for record in batch)
        text = "".join(line + "\n" for line in whole)
        if self._path == "-":
            # the stream, not its descriptor: a notebook's has none, and the script's own prints stay whole
            sys.stdout.write(text)
            sys.stdout.flush()
        elif self._fd is None and not self._moved:
            raise ValueError(f"sink jsonl:{self._path} is closed")
        elif self._regular:
            self._append_lines(text.encode("ascii"))
        elif self._fd is not None:
            _write_all(self._fd, text.encode("ascii"))

    def _append_lines(self, data: bytes) -> None:
        if self._moved:
            self._open_file()
        assert self._fd is not None
        if self._torn:
            self._finish_torn_line(self._fd)
        self._torn = True
        with _exclusive(self._fd):
            self._moved = self._rotation.moved(self._fd)  # by another process, while we waited for the lock
            if not self._moved:
                _append(self._fd, data)
                self._moved = self._rotation.step(self._fd)
                data = b""
        self._torn = False
        if data:
            self._append_lines(data)

    def prune(self, before: int) -> int:
        """Remove rotated files last changed before that time (microseconds since 1970); returns their lines."""
        return self._rotation.prune(before)

    def delete(self, request_id: str) -> int:
        """Remove the lines of a request from the live file, in place; returns how many.

        A crash meanwhile can spoil the lines behind the first one that goes.
        """
        start = f'{{"request_id":{json.dumps(request_id)},'.encode("ascii")
        removed = 0
        if self._fd is None:
            raise ValueError(f"sink jsonl:{self._path} is closed")
        with _exclusive(self._fd), open(self._path, "rb") as source, open(self._path, "r+b") as target:
            for line in source:
                if line.startswith(start):
                    removed += 1
                elif removed:
                    target.write(line)
                else:
                    target.seek(len(line), os.SEEK_CUR)
            target.truncate()
        return removed

    def close(self) -> None:
        """Close the file; standard output stays open."""
        self._moved = False
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _finish_torn_line(self, fd: int) -> None:
        with _exclusive(fd):
            if os.lseek(fd, 0, os.SEEK_END) == 0:
                return
            os.lseek(fd, -1, os.SEEK_END)
            if os.read(fd, 1) == b"\n":
                return
            _append(fd, b"\n")
        logger.warning(
            "%s ends in an unfinished line, as a crash leaves it; new records start on a fresh line below it",
            self._path,
        )


def read_jsonl(path: str | os.PathLike[str], *, tolerate_torn_tail: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a file that `JsonlSink` wrote, oldest first, as plain dicts.

    With ``tolerate_torn_tail`` a line that a crash cut short is skipped with a log warning: the last one, or
    one that a later run continued below. Nothing else is ever skipped.
    Raises OSError where the file cannot be read, RecordError naming the line that is no record, or has more than
    `attnhook.system.untrusted.LINE_BYTES`.
    """
    return (entry for _, entry in numbered(path, tolerate_torn_tail=tolerate_torn_tail))


def numbered(path: str | os.PathLike[str], *, tolerate_torn_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` with the number of each line, from 1."""
    with open_rotated(path) as file:
        whole, number = lines(file), 0
        while True:
            number += 1
            try:
                line = next(whole, b"")
            except ValueError as error:
                raise RecordError(
                    f"{path}, line {number}: {error}, which is no record; name a file that the jsonl sink wrote"
                ) from error
            if not line:
                return
            try:
                entry = loads(line)
            except ValueError as error:  # not UTF-8, or not JSON
                torn = line.startswith(b"{") and not isinstance(error, TooDeepError)
                if torn and tolerate_torn_tail:
                    logger.warning("%s, line %d: skipped, it was cut short", path, number)
                    continue
                raise RecordError(
                    f"{path}, line {number} is not a record: {error}. "
                    + (
                        "A crash may have cut it short: read with tolerate_torn_tail=True to skip such lines."
                        if torn
                        else f"It begins with {line[:20]!r}; remove it, or name a file that the jsonl sink wrote."
                    )
                ) from error
            version = entry.get("schema_version") if isinstance(entry, dict) else None
            if version not in VERSIONS or isinstance(version, (bool, float)):
                raise RecordError(
                    f"{path}, line {number} has schema version {str(version)[:40]!r}; this attnhook reads "
                    f"{SCHEMA_VERSION} and {TOKENS_VERSION}: upgrade attnhook, or name a file that the jsonl sink wrote"
                )
            yield number, entry


def _entry(record: TokenRecord) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "choice": record.choice,
        "model": record.model,
        **record.to_dict(),
    }


@contextmanager
def _exclusive(fd: int) -> Iterator[None]:
    """Keep other processes' appends out, so that taking back a failed write cannot hit theirs."""
    if sys.platform == "win32":
        yield
        return
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks; appends are still in order of arrival
        yield
        return
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)


def _append(fd: int, data: bytes) -> None:
    """Append all of ``data`` to a regular file, or raise OSError and leave none of it there."""
    size = os.fstat(fd).st_size
    try:
        _write_all(fd, data)
    except OSError:
        # only our own part goes: where locks do not work, another process may have appended behind it
        with suppress(OSError):
            if os.fstat(fd).st_size < size + len(data):
                os.ftruncate(fd, size)
        raise


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        # one call takes it all, unless the disk is full (the next call then raises) or this is a pipe
        view = view[os.write(fd, view) :]


def _remedy(path: str, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT:
        return f"Its folder does not exist: mkdir -p {os.path.dirname(path)}"
    if code == errno.EISDIR:
        return f"It is a folder: name a file in it, such as jsonl:{os.path.join(path, 'records.jsonl')}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "This process may not read and write it: change its permissions, or name another file."
    if code == errno.ENOSPC:
        return "The disk is full: make room, or name a file on another disk."
    return "Name a file that this process can read and write."
