"""One prompt and its answer, with their records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnhook.record.key_mass import KeyMass
from attnhook.record.token_record import TokenRecord
from attnhook.record.zones import Zone

#: Span of the attention sink, position 0, which most heads give mass to whatever they read.
SINK = "sink"


@dataclass(frozen=True)
class Answer:
    """One prompt, its answer and their records."""

    model: str
    token_ids: list[int]  # prompt and answer
    tokens: list[str]  # decoded text of each
    prompt_length: int
    text: str  # the answer
    records: list[TokenRecord]
    zones: list[Zone]  # of each record, without the attention sink
    dropped: Mapping[str, int] = field(default_factory=dict)
    key_mass: KeyMass | None = None  # where it was asked for
