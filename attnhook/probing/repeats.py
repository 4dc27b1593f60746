"""After a kill: which records of an unfinished probe the output has already."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.privacy import id_in
from attnhook.store import open_store
from attnhook.store.base import SCHEMES

_KEYS = ("request_id", "choice", "query_position")


@dataclass(frozen=True)
class Repeats:
    """Keys of records that a sink's store has, request ids as the sink stores them."""

    sink: Sink
    keys: set[tuple[str, int, int]] = field(default_factory=set)

    def without(self, records: Sequence[TokenRecord]) -> Sequence[TokenRecord]:
        """The records that the store lacks."""
        if not self.keys:
            return records
        return [
            record
            for record in records
            if (id_in(self.sink, record.request_id), record.choice, record.query_position) not in self.keys
        ]


def find(out: str, sink: Sink, done: Collection[str]) -> Repeats | None:
    """What the store that ``out`` names has of probes whose request ids are not in ``done``.

    ``sink`` is that store, open: it has taken over what the killed process left. None where the store cannot be
    read back.
    """
    if out.partition(":")[0] not in SCHEMES:
        return None
    try:
        store = open_store(out)
    except PluginError:
        return None  # a device, or a store elsewhere
    finished = {id_in(sink, name) for name in done}
    keys: set[tuple[str, int, int]] = set()
    with store:
        for batch in store.fingerprints(columns=_KEYS):
            rows = zip(*(batch.column(name).to_pylist() for name in _KEYS), strict=True)
            keys.update(key for key in rows if key[0] not in finished)
    return Repeats(sink, keys)
