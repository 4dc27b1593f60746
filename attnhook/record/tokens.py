"""Token ids in records: filled in from a request's token sequence, only while a sink asks for them.

Ids and not text: who has the tokenizer can decode them. They are read off the sequence by position after the fact, so
how a pass was scheduled (in chunks, from a cached prefix, again after a preemption, with drafts) does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from attnhook.record.row import UNKNOWN
from attnhook.record.token_record import TokenRecord

Lookup = Callable[[int], int]  # position in the request -> token id, or UNKNOWN


def fill(records: Sequence[TokenRecord], token_at: Lookup, mask_prefix: int = 0) -> list[TokenRecord]:
    """The records with the ids of their query tokens and of the tokens at their positions.

    Ids of positions below ``mask_prefix`` are left out, that of the query token too.
    """
    return [_fill(record, token_at, mask_prefix) for record in records]


def sequence(*parts: Sequence[int], hidden: int = 0, vocabulary: int = 2**31) -> Lookup:
    """Look up positions in sequences that follow one another.

    The first ``hidden`` positions have no ids (a prompt given as embeddings), nor have those whose number is not below
    ``vocabulary`` (stand-ins of images), nor those behind the end.
    """
    ends = np.cumsum([len(part) for part in parts]).tolist()

    def token_at(position: int) -> int:
        start = 0
        for part, end in zip(parts, ends, strict=True):
            if position < end:
                token = int(part[position - start]) if position >= hidden else UNKNOWN
                return token if 0 <= token < vocabulary else UNKNOWN
            start = end
        return UNKNOWN

    return token_at


def _fill(record: TokenRecord, token_at: Lookup, mask_prefix: int) -> TokenRecord:
    def look_up(position: int) -> int:
        return token_at(position) if position >= max(mask_prefix, 0) else UNKNOWN

    positions = record.token_positions
    ids = np.array([look_up(position) for position in positions.ravel().tolist()], np.int32)
    return replace(record, query_token=look_up(record.query_position), token_ids=ids.reshape(positions.shape))
