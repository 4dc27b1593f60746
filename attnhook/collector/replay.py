"""After a crash: which of the journal's records a store has already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from attnhook.errors import PluginError
from attnhook.record.block import RowBlock

Key = tuple[str, int, int]

_KEYS = ("request_id", "choice", "query_position")
_FEW_REQUESTS = 32  # up to so many are asked for one by one


def not_stored(
    url: str, waiting: Sequence[tuple[int, RowBlock]], stored_id: Callable[[str], str]
) -> list[tuple[int, RowBlock]]:
    """The blocks without the records that the store has, where request ids are as ``stored_id`` makes them.

    A process that is killed between a write and its acknowledgement leaves records in both. The sqlite store finds
    out by itself; one that would keep them twice is asked.
    """
    if not waiting or url.startswith("sqlite:"):
        return list(waiting)
    names = {stored_id(name): name for _, block in waiting for name in block.ids}
    known = {(names[name], choice, position) for name, choice, position in _stored(url, set(names))}
    if not known:
        return list(waiting)
    return [(number, block.without(known)) for number, block in waiting]


def _stored(url: str, requests: set[str]) -> set[Key]:
    from attnhook.store import open_store
    from attnhook.store.base import SCHEMES

    if url.partition(":")[0] not in SCHEMES:
        return set()  # it cannot be read back
    try:
        store = open_store(url)
    except PluginError:
        return set()  # there is no store yet; its sink says what is wrong otherwise
    with store:
        if len(requests) <= _FEW_REQUESTS:
            batches: Iterable[Any] = chain.from_iterable(
                store.fingerprints(request_id=name, columns=_KEYS) for name in requests
            )
        else:
            batches = store.fingerprints(columns=_KEYS)
        known: set[Key] = set()
        for batch in batches:
            columns = [batch.column(name).to_pylist() for name in _KEYS]
            known.update(key for key in zip(*columns, strict=True) if key[0] in requests)
        return known
