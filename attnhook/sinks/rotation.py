"""Rotated files of a jsonl sink: how they are called, found, compressed and removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from attnhook.sinks import needs

COMPRESSED = ".zst"


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
    with needs("zstd=1"):
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


def prune(path: Path, before: int) -> list[Path]:
    """Remove rotated files last changed before that time (microseconds since 1970); returns them."""
    old = [file for file in _candidates(path) if file.stat().st_mtime_ns // 1000 < before]
    for file in old:
        file.unlink()
    return old


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
