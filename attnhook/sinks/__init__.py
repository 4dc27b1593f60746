"""Sinks: the places where token records go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from attnhook.hookspecs import RegisterSink, hookimpl
from attnhook.records import TokenRecord


class Sink(ABC):
    """One destination of records.

    One thread at a time calls a sink, in the order open, write*, close; open may run in another thread.

    Subclasses document their delivery guarantee in their docstring.
    """

    #: Whether ``tokens=1`` makes a difference: a sink that counts and forgets the records refuses it.
    keeps_tokens: ClassVar[bool] = True

    @abstractmethod
    def open(self, config: str) -> None:
        """Make ready to write. ``config`` is the part of the sink's URL behind ``scheme:``.

        Raises PluginError (cause, value seen, remedy) where the destination cannot be written to; nothing
        may be left half-made.
        """

    @abstractmethod
    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Store the records, in order. An exception means that none of the batch counts as delivered."""

    def flush(self) -> None:  # noqa: B027 - a sink without a buffer has nothing to do
        """Hand everything written so far to the destination."""

    def close(self) -> None:
        """Flush and let go of the destination; calling it twice is harmless."""
        self.flush()


@hookimpl
def attnhook_register_sinks(register: RegisterSink) -> None:
    from attnhook.sinks.jsonl import JsonlSink
    from attnhook.sinks.memory import MemorySink
    from attnhook.sinks.otlp import OtlpSink
    from attnhook.sinks.parquet import ParquetSink
    from attnhook.sinks.prometheus import PrometheusSink
    from attnhook.sinks.sqlite import SqliteSink
    from attnhook.sinks.websocket import WebsocketSink
    from attnhook.sinks.zmq import ZmqSink

    register("memory", MemorySink)
    register("jsonl", JsonlSink)
    register("parquet", ParquetSink)
    register("sqlite", SqliteSink)
    register("zmq", ZmqSink)
    register("prometheus", PrometheusSink)
    register("otlp", OtlpSink)
    register("websocket", WebsocketSink)
