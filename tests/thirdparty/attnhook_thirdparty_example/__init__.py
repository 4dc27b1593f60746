"""A plugin of attnhook: an engine, a sink and an observer, and nothing of it is known to attnhook itself."""

from __future__ import annotations

from attnhook import TokenRecord
from attnhook.plugins import RegisterBackend, RegisterSink, RegisterVariable, hookimpl

seen: list[tuple[str, int]] = []  # what the observer was shown: (request id, query position)


@hookimpl
def attnhook_register_backends(register: RegisterBackend) -> None:
    from attnhook_thirdparty_example.backend import EchoBackend

    register(EchoBackend())


@hookimpl
def attnhook_register_sinks(register: RegisterSink) -> None:
    from attnhook_thirdparty_example.csvfile import CsvSink

    register("csvfile", CsvSink)


@hookimpl
def attnhook_register_variables(register: RegisterVariable) -> None:
    register("ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITER")


@hookimpl
def attnhook_token(record: TokenRecord) -> None:
    seen.append((record.request_id, record.query_position))
