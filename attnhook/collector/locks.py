"""One collector per store."""

from __future__ import annotations

import os
import sys

from attnhook.errors import PluginError
from attnhook.sinks import config
from attnhook.store.base import SCHEMES

if sys.platform != "win32":
    import fcntl


class StoreLock:
    """Holds ``<store>.lock`` while a collector writes the store; a process that dies lets go of it.

    Two collectors on one store would each keep a journal and counts of their own that say half of the truth.
    Raises PluginError where another collector holds it, naming its process, or the folder cannot be written to.
    """

    def __init__(self, url: str) -> None:
        self._fd: int | None = None
        scheme, _, rest = url.partition(":")
        path, _ = config.split(rest)
        if scheme not in SCHEMES or "://" in path or sys.platform == "win32":
            return
        path = os.path.realpath(os.path.expanduser(path)) + ".lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise PluginError(f"{url} cannot be locked: {error}; make its folder, and make it writable") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise PluginError(
                f"{url} is written by another collector already (process {holder}): send the records to that one, or "
                "name another store"
            ) from error
        except OSError:  # a file system without locks
            os.close(fd)
            return
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except OSError:  # a full disk: the lock holds all the same, without a name
            return

    def close(self) -> None:
        """Let go of the store."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
