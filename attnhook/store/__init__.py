"""Stores: reading back what the sinks ``sqlite:``, ``parquet:`` and ``jsonl:`` keep."""

from __future__ import annotations

from attnhook.errors import PluginError, needs
from attnhook.store.base import SCHEMES, Filters, Store
from attnhook.system.addresses import hiding, masked

__all__ = ["SCHEMES", "Filters", "Store", "open_store"]


def open_store(url: str) -> Store:
    """Open ``sqlite:path``, ``parquet:dir`` or ``jsonl:path`` for reading; a sink's options in it are ignored.

    Raises PluginError where it is none of these, does not exist, is damaged or of a newer schema.
    """
    with hiding(url):
        return _open_store(url)


def _open_store(url: str) -> Store:
    from attnhook.sinks import config

    scheme, colon, rest = url.partition(":")
    if scheme not in SCHEMES or not colon:
        raise PluginError(
            f"{masked(url)!r} is no store that can be read; known: {', '.join(f'{name}:' for name in SCHEMES)}"
        )
    path, _ = config.split(rest)
    with needs(f"reading {scheme}:", "sinks"):
        import pyarrow  # noqa: F401
    if scheme == "sqlite":
        from attnhook.store.sqlite import SqliteStore

        return SqliteStore(path)
    if scheme == "parquet":
        from attnhook.store.parquet import ParquetStore

        return ParquetStore(rest)
    from attnhook.store.jsonl import JsonlStore

    return JsonlStore(path)
