"""What the records of one request say together: hubs, agreement of the layers, entropy and zones over time.

Hubness and consensus rest on the stored top-k positions, not on the whole distribution: what lies outside the top k
counts as no attention. `Session.coverage` says how much of the attention is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import without_sink

#: Captured span that holds position 0 alone, the attention sink; zones are judged without it where it is there.
SINK = "sink"

_SINK_POSITION = 0
_HUBS = 10


@dataclass(frozen=True)
class Moment:
    """One row of a session."""

    query_position: int
    decode_step: int | None  # None: a prompt row
    entropy: float  # of the mean over the captured layers, normalised, in [0, 1]
    zone: str
    confidence: float
    consensus: float | None  # without the sink; None where only one layer was captured, or none attends elsewhere


@dataclass(frozen=True)
class Session:
    """Metrics of one answer of one request."""

    request_id: str
    choice: int
    model: str
    layers: tuple[int, ...]
    visible: int  # key positions that a row could see, the sink included
    coverage: float  # mean share of a row's attention that its top k hold
    hubness: float  # Gini coefficient of the attention on positions, in [0, 1)
    hubness_without_sink: float | None  # None where nothing but the sink is attended to
    hubs: tuple[tuple[int, float], ...]  # (position, share of the attention inside the top k), largest first
    consensus: float | None  # mean over rows, with the sink; None where only one layer was captured
    consensus_without_sink: float | None  # the same without position 0
    zone_shares: dict[str, float]
    sink_left_out: bool  # whether zones are those of the attention without position 0
    moments: tuple[Moment, ...]  # by query position

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, for JSON."""
        return asdict(self)


def gini(amounts: np.ndarray) -> float:
    """Gini coefficient of non-negative amounts ``[n]``: 0 where all are equal, (n - 1) / n where one has all.

    With the amounts x in ascending order, i from 1: ``2 sum(i x_i) / (n sum x) - (n + 1) / n``, which is half the
    relative mean absolute difference (Gini 1912; Hurley and Rickard 2009 compare it with other measures of sparsity).
    Raises ValueError where there is no amount, one is negative or not finite, or all are 0.
    """
    x = np.sort(np.asarray(amounts, np.float64).ravel())
    total = x.sum()
    if not (x.size and np.isfinite(total) and x[0] >= 0 and total > 0):
        raise ValueError(f"gini needs non-negative amounts with a positive sum; got {x.size} that sum to {total:g}")
    n = x.size
    return max(0.0, float(2 * (np.arange(1, n + 1) @ x) / (n * total) - (n + 1) / n))


def weighted_jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """``sum min / sum max`` of two non-negative arrays of equal shape: 1 where equal, 0 where disjoint.

    Also known as Ruzicka similarity (Ioffe 2010). Two arrays of zeros have no similarity: NaN.
    """
    larger = float(np.maximum(one, other).sum())
    return float(np.minimum(one, other).sum()) / larger if larger else float("nan")


def consensus(record: TokenRecord, *, without_sink: bool = False) -> float | None:
    """How far the captured layers attend to the same positions: the mean weighted Jaccard over pairs of layers.

    Each layer is the vector of its top-k scores over positions. The mean over pairs, not min over all layers against
    max over all, so that the number does not sink with the number of layers captured. None for one layer, and where no
    pair attends to anything. ``without_sink`` leaves out position 0, on which most layers agree.
    """
    dense = _dense(record, without_sink)
    pairs = [weighted_jaccard(dense[i], dense[j]) for i, j in combinations(range(len(dense)), 2)]
    known = [pair for pair in pairs if pair == pair]
    return float(np.mean(known)) if known else None


def attended(records: Sequence[TokenRecord]) -> np.ndarray:
    """Attention that each position gets, float64 ``[n]``, n the positions that any of the rows could see.

    The sum over rows of the mean over layers of the top-k scores. Early positions are seen by more rows, so even
    attention spread evenly over what each row sees is not flat.
    """
    amounts = np.zeros(1 + max(record.query_position for record in records))
    for record in records:
        kept = record.token_positions >= 0
        np.add.at(amounts, record.token_positions[kept], record.attention_scores[kept] / len(record.layers))
    return amounts


def measure(records: Sequence[TokenRecord]) -> Session:
    """The metrics of one request's rows, in any order.

    Raises RecordError where there are none, they are of more than one request or choice, a row is there twice, their
    layers differ, or they hold no positions (mode ``fingerprint``, or a sink that kept fingerprints only).
    """
    rows = sorted(records, key=lambda record: record.query_position)
    _check(rows)
    first = rows[0]
    amounts = attended(rows)
    if not amounts.sum():
        raise RecordError(
            f"the records of {first.request_id!r} name no attended position: every one is masked or empty; capture "
            "without attention_mask_prefix"
        )
    rest = amounts[1:]
    shared = amounts / amounts.sum()
    hubs = [int(i) for i in np.argsort(-amounts, kind="stable")[:_HUBS] if amounts[i] > 0]
    free = all(record.sink_mass is not None or SINK in record.span_names for record in rows)
    named = without_sink(rows, SINK) if free else _zones(rows)
    agreed = [consensus(record, without_sink=True) for record in rows]
    moments = tuple(
        Moment(
            record.query_position,
            record.decode_step,
            float(record.fingerprint[fp.ENTROPY]),
            zone.name,
            zone.confidence,
            same,
        )
        for record, zone, same in zip(rows, named, agreed, strict=True)
    )
    codes = np.array([zones.ZONE_NAMES.index(zone.name) for zone in named], np.int8)
    return Session(
        request_id=first.request_id,
        choice=first.choice,
        model=first.model,
        layers=first.layers,
        visible=len(amounts),
        coverage=float(np.mean([record.topk_mass.mean() for record in rows])),
        hubness=gini(amounts),
        hubness_without_sink=gini(rest) if rest.sum() else None,
        hubs=tuple((i, float(shared[i])) for i in hubs),
        consensus=_mean([consensus(record) for record in rows]),
        consensus_without_sink=_mean(agreed),
        zone_shares=zones.shares(codes),
        sink_left_out=free,
        moments=moments,
    )


def _check(rows: Sequence[TokenRecord]) -> None:
    if not rows:
        raise RecordError("no records to measure: give those of one request")
    first = rows[0]
    for record, before in zip(rows, [None, *rows[:-1]], strict=True):
        if record.mode == "fingerprint" or not record.token_positions.shape[1]:
            raise RecordError(
                f"record {record.key!r} holds fingerprints only, without the attended positions that hubness and "
                "consensus need: capture with mode 'raw' or 'sketch', into a sink without fingerprints=1"
            )
        if record.key[:2] != first.key[:2]:
            raise RecordError(
                f"records of {first.key[:2]!r} and of {record.key[:2]!r}: give those of one request and choice"
            )
        if record.layers != first.layers:
            raise RecordError(
                f"record {record.key!r} has layers {list(record.layers)}, the first one {list(first.layers)}: metrics "
                "need the same layers in every row"
            )
        if before is not None and before.key == record.key:
            raise RecordError(f"record {record.key!r} is there twice: keep each row once (sqlite: stores do)")


def _dense(record: TokenRecord, without_sink: bool) -> np.ndarray:
    """Top-k scores over the positions that any layer names, float64 ``[L, m]``."""
    kept = record.token_positions >= 0
    if without_sink:
        kept &= record.token_positions != _SINK_POSITION
    named, column = np.unique(record.token_positions[kept], return_inverse=True)
    dense = np.zeros((len(record.layers), len(named)))
    np.add.at(dense, (np.nonzero(kept)[0], column), record.attention_scores[kept])
    return dense


def _zones(rows: Sequence[TokenRecord]) -> list[zones.Zone]:
    codes, sure = zones.classify_many(np.stack([record.fingerprint for record in rows]))
    return [zones.Zone(zones.ZONE_NAMES[code], float(one)) for code, one in zip(codes, sure, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
