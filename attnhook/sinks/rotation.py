"""Rotated files of a jsonl sink: how they are called, found, compressed and removed."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, cast

from attnhook.errors import PluginError, needs
from attnhook.sinks import config
from attnhook.sinks.retention import Retention
from attnhook.system.untrusted import count_lines

logger = logging.getLogger("attnhook")

COMPRESSED = ".zst"
#: Options of the jsonl sink and what they must be.
OPTIONS: Mapping[str, config.Parser] = {
    "rotate": config.size,
    "every": config.seconds,
    "zstd": config.flag,
    "keep_days": config.days,
}


class Rotation:
    """When the live file of a sink gets another name, and what becomes of it then; by default never."""

    def __init__(
        self,
        path: str = "",
        *,
        rotate: int | None = None,
        every: float | None = None,
        zstd: bool = False,
        keep_days: float | None = None,
    ) -> None:
        self._path = Path(path)
        self._size, self._every, self._zstd = rotate, every, zstd
        self._retention = Retention(keep_days)
        self._since = time.monotonic()
        self._active = rotate is not None or every is not None
        if (zstd or keep_days is not None) and not self._active:
            raise PluginError(
                f"sink jsonl:{path}: zstd=1 and keep_days are for files that are rotated; add rotate=64MB or every=1h"
            )
        if self._active and sys.platform == "win32":
            raise PluginError(f"sink jsonl:{path}: an open file cannot be renamed on Windows; drop rotate and every")
        if zstd:
            with needs("zstd=1", "sinks"):
                import zstandard  # noqa: F401

    def refuse(self, place: str) -> None:
        """Raise PluginError if there is anything to rotate: ``place`` is no file."""
        if self._active:
            raise PluginError(f"sink jsonl: {place} is no file that can be rotated; drop rotate and every")

    def moved(self, fd: int) -> bool:
        """Whether the open file is no longer the live one; ask with the file locked."""
        if not self._active:
            return False
        try:
            live = self._path.stat()
        except FileNotFoundError:
            return True
        mine = os.fstat(fd)
        return (live.st_ino, live.st_dev) != (mine.st_ino, mine.st_dev)

    def step(self, fd: int) -> bool:
        """After an append, with the file locked: rename and compress it if it is time; whether it was."""
        if not self._active:
            return False
        full = self._size is not None and os.fstat(fd).st_size >= self._size
        old = self._every is not None and time.monotonic() - self._since >= self._every
        if not (full or old):
            return False
        self._since = time.monotonic()
        target = rotated_name(self._path)
        try:
            self._path.rename(target)
        except OSError as error:  # the records are written all the same: the file grows on
            logger.warning("%s cannot be rotated: %s", self._path, error)
            return False
        if self._zstd:
            try:
                compress(target)
            except OSError as error:
                logger.warning("%s stays uncompressed: %s", target, error)
        self.retain()
        return True

    def retain(self) -> None:
        """Remove rotated files that are past their days."""
        self._retention.keep(lambda: _newest(self._path), self.prune)

    def prune(self, before: int) -> int:
        """Remove rotated files last changed before that time (microseconds since 1970); returns their lines."""
        lines = 0
        for file in list(_candidates(self._path)):
            if file.stat().st_mtime_ns // 1000 < before:
                with open_rotated(file) as source:
                    lines += count_lines(source)
                file.unlink()
        return lines


@contextmanager
def open_rotated(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A live or rotated file for reading, decompressed where its name ends in ``.zst``.

    Raises OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        if not os.fspath(path).endswith(COMPRESSED):
            yield file
            return
        with needs(f"reading {path}", "sinks"):
            import io

            import zstandard
        try:
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader)))
        except zstandard.ZstdError as error:
            raise OSError(f"{path} is damaged: {error}") from error


def rotated_name(path: Path) -> Path:
    """A new name for ``path`` as it is now: ``records-20261123T153000.123456Z-4711.jsonl``, with the process's id."""
    now = datetime.now(timezone.utc)
    return path.with_name(f"{path.stem}-{now:%Y%m%dT%H%M%S.%f}Z-{os.getpid()}{path.suffix}")


def rotated_files(path: Path) -> list[Path]:
    """Files that were rotated away from ``path``, oldest first; one that is there twice only compressed."""
    found = {}
    for file in _candidates(path):
        name = file.name.removesuffix(COMPRESSED)
        if name not in found or file.name.endswith(COMPRESSED):
            found[name] = file
    return [found[name] for name in sorted(found)]


def compress(path: Path) -> Path:
    """Replace a file by its zstd form. Raises OSError where that cannot be written; the file is then still there."""
    with needs("zstd=1", "sinks"):
        import zstandard
    target = path.with_name(path.name + COMPRESSED)
    scratch = path.with_name(f".{target.name}.tmp")
    try:
        with open(path, "rb") as source, open(scratch, "wb") as sink:
            zstandard.ZstdCompressor(level=3).copy_stream(source, sink)
            sink.flush()
            os.fsync(sink.fileno())
        times = path.stat()
        os.utime(scratch, ns=(times.st_atime_ns, times.st_mtime_ns))
        scratch.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            scratch.unlink()
        raise
    path.unlink()
    return target


def _candidates(path: Path) -> Iterator[Path]:
    """Files whose name `rotated_name` may have given."""
    start, end = path.stem + "-", path.suffix
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        name = file.name.removesuffix(COMPRESSED)
        if not (name.startswith(start) and name.endswith(end)):
            continue
        stamp = name[len(start) : len(name) - len(end)].rsplit("-", 1)
        with suppress(ValueError):
            datetime.strptime(stamp[0], "%Y%m%dT%H%M%S.%fZ")
            if len(stamp) == 2 and stamp[1].isdigit():
                yield file


def _newest(path: Path) -> int | None:
    return max((file.stat().st_mtime_ns // 1000 for file in [path, *_candidates(path)] if file.is_file()), default=None)
