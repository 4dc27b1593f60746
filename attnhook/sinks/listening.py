"""Sinks that others connect to: when they listen, and what becomes of that in a child process."""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from attnhook.errors import DroppedError, PluginError
from attnhook.plugins.contracts import Sink
from attnhook.system import forks

RETRY_SECONDS = 10.0  # a port that was taken is tried again so often, while records come

_listening: set[ListeningSink] = set()  # in this process, so that a forked child can let go of their sockets


class ListeningSink(Sink):
    """A sink that listens on an address of its process.

    With ``later`` (set before `open`) it listens when its first record comes, since every process of an engine or a
    pool opens the process's sinks and one of them has records. Where it cannot listen then, as in a child whose parent
    has the port, records are dropped as ``not_listening``, which is logged once, and the port is tried again every
    `RETRY_SECONDS`. A forked child lets go of its parent's socket.
    """

    def __init__(self) -> None:
        self.port = 0  #: where it listens
        self.later = False
        self._is_open = False
        self._pid = 0  # of the process that listens
        self._tried = 0.0
        self._refusal = ""

    def open(self, config: str) -> None:
        """Check the address and, unless ``later``, listen. Raises PluginError."""
        self.prepare(config)
        if not self.later:
            self._begin()
        self._is_open = True

    @abstractmethod
    def prepare(self, config: str) -> None:
        """Raise PluginError for a bad address, a missing token or library; listen to nothing yet."""

    @abstractmethod
    def listen(self) -> None:
        """Begin to listen, with fresh counts, and set `port`. Raises PluginError where the address is taken."""

    @abstractmethod
    def stop(self) -> None:
        """Stop listening."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: close the parent's sockets here, and wait for no thread, since none of them is here."""

    def ready(self, count: int) -> None:
        """Call at the begin of `write`, with the number of records: listens at the first, and in a child anew.

        Raises DroppedError where that is impossible, ValueError where the sink is closed.
        """
        if not self._is_open:
            raise ValueError("the sink is closed")
        if self._pid == os.getpid():
            return
        now = time.monotonic()
        if not self._refusal or now - self._tried >= RETRY_SECONDS:
            self._tried = now
            try:
                self._begin()
            except PluginError as error:
                self._refusal = str(error)
            else:
                self._refusal = ""
                return
        raise DroppedError("not_listening", count, f"{self._refusal}; the port is tried again while records come")

    def close(self) -> None:
        """Stop listening; harmless in a process that does not listen."""
        self._is_open = False
        if self._pid == os.getpid():
            self._pid = 0
            _listening.discard(self)
            self.stop()

    def _begin(self) -> None:
        self.listen()
        self._pid = os.getpid()
        _listening.add(self)

    def _after_fork(self) -> None:
        self._pid = self.port = 0
        self._refusal = ""
        self.abandon()


@forks.in_child
def _after_fork_in_child() -> None:
    inherited = list(_listening)
    _listening.clear()
    for sink in inherited:
        sink._after_fork()
