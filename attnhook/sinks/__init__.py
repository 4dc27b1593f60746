"""Sinks: the places where token records go."""

from __future__ import annotations

from attnhook.plugins.contracts import Sink
from attnhook.plugins.hookspecs import RegisterSink, hookimpl
from attnhook.sinks.opening import open_sink

__all__ = ["Sink", "open_sink"]


@hookimpl(tryfirst=True)  # built-ins are listed first
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
