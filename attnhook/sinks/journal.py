"""A write-ahead journal of Arrow batches: rows that are safe before they are in a Parquet file.

A journal is an Arrow IPC stream in a local file that its writer keeps locked. One that is not locked was left
behind by a process that died, and whoever opens the folder next takes it over.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from attnhook.record.arrow import arrow_schema, check_version, upgraded
from attnhook.record.columns import now_us

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("attnhook")

SUFFIX = ".arrows"


class Journal:
    """A journal that this process writes to; ``name`` is unique and sorts by the time at which it began."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.rows = 0
        self.size = os.fstat(fd).st_size
        self._fd = fd

    @property
    def name(self) -> str:
        """What the files that come out of it are called, so that making them twice makes no second copy."""
        return self.path.name.removesuffix(SUFFIX)

    @classmethod
    def begin(cls, folder: Path) -> Journal:
        """A new, empty journal. Raises OSError where the folder does not take it."""
        path = folder / f"{now_us():016d}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        journal = cls(path, fd)
        try:
            _lock(fd)
            journal._append(arrow_schema().serialize())
        except BaseException:
            journal.remove()
            raise
        return journal

    @classmethod
    def abandoned(cls, folder: Path) -> Iterator[Journal]:
        """Journals of processes that died, oldest first, now ours."""
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                fd = os.open(path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue  # its writer, or another heir, has finished it
            # the file may have been finished between the open and the lock
            if _lock(fd) and os.fstat(fd).st_nlink:
                yield cls(path, fd)
            else:
                os.close(fd)

    def append(self, batch: pa.RecordBatch) -> None:
        """Add the rows: with the operating system when this returns. Raises OSError and leaves none of them."""
        self._append(batch.serialize())
        self.rows += batch.num_rows

    def read(self) -> Iterator[pa.RecordBatch]:
        """The batches; a last one that a crash cut short is left out.

        Raises RecordError where the journal is of another schema version.
        """
        with pa.memory_map(str(self.path)) as file:
            try:
                reader = pa.ipc.open_stream(file)
            except pa.ArrowInvalid:  # cut short before the first row
                return
            check_version(reader.schema.metadata, str(self.path))
            while True:
                try:
                    yield upgraded(reader.read_next_batch())
                except StopIteration:
                    return
                except (pa.ArrowInvalid, OSError) as error:
                    logger.warning(
                        "%s was cut short, as a crash leaves it; the rows before that are kept: %s", self.path, error
                    )
                    return

    def remove(self) -> None:
        """Delete the journal: its rows are elsewhere now."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """Leave the journal to whoever opens the folder next."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _append(self, data: pa.Buffer) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        self.size += data.size


def _lock(fd: int) -> bool:
    """Lock the file for as long as it stays open here; False where another process has it, or may have."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
