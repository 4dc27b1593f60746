"""Periodicity of attention, measured from the positions that consecutive rows attend to.

Text of period P makes attention fall on distances P, 2 P, 3 P, ... from row after row. A fingerprint cannot show that
(a log2 bin holds many distances); the stored top-k positions of neighbouring rows can. docs/measurements/zones.md says
how well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from attnhook.record.token_record import TokenRecord

WINDOW = 32  # rows, the judged one included, whose attended distances are counted together
MIN_ROWS = 8  # fewer rows in the window show nothing
PERIODS = range(4, 65)  # tokens
REACH = 512  # distances from here on are left out

_SINK_POSITION = 0
_TINY = 1e-12


def measure(records: Sequence[TokenRecord]) -> np.ndarray:
    """Periodicity of each record's attention over its captured layers, float64 ``[N]`` in [0, 1); see `comb`.

    Rows of the same request and choice are taken together, in any order. NaN where fewer than `MIN_ROWS` of the
    `WINDOW` positions up to a row have a record, or the records hold no positions.
    """
    found = np.full(len(records), np.nan)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if record.token_positions.shape[1]:
            groups[record.key[:2]].append(i)
    for group in groups.values():
        group.sort(key=lambda i: records[i].query_position)
        width = max(records[i].token_positions.size for i in group)
        positions = np.full((len(group), width), -1, np.int64)
        scores = np.zeros((len(group), width))
        for row, i in enumerate(group):
            flat = records[i].token_positions.ravel()
            positions[row, : flat.size] = flat
            scores[row, : flat.size] = records[i].attention_scores.ravel()
        found[group] = comb(positions, scores, np.array([records[i].query_position for i in group]))
    return found


def comb(positions: np.ndarray, scores: np.ndarray, query_positions: np.ndarray) -> np.ndarray:
    """Periodicity of the rows of one request, in ascending order of their positions.

    With H(d) the sum of the square roots of the scores at distance d, over the rows of the last `WINDOW` positions,
    for distances from ``PERIODS[0]`` to `REACH` and without the key at position 0:

        C(P) = sum over m of (H(m P) - mean of H from m P - P/2 to m P + P/2) / sum of H

    and the periodicity is the largest C(P) over `PERIODS`, at least 0. Square roots keep one strong key from counting
    as a period; the mean around each tooth is what the same attention would bring to it without one. It is near 1
    where every attended distance is a multiple of a long P, and near 0 for attention that is spread evenly.

    Parameters
    ----------
    positions : [N, m] int
        Attended key positions; negative ones are no entries.
    scores : [N, m] float
        Their attention scores, of one or several layers.
    query_positions : [N] int
        Positions of the rows, ascending.

    Returns
    -------
    [N] float64
        NaN where fewer than `MIN_ROWS` rows are in the window.
    """
    count = len(query_positions)
    if not count:
        return np.zeros(0)
    nearest = PERIODS[0]
    distance = query_positions[:, None] - positions
    kept = (positions > _SINK_POSITION) & (distance >= nearest) & (distance < REACH)
    row, column = np.nonzero(kept)
    # a zero row first: the rows of a window are then the difference of two cumulated ones
    at_distance = np.zeros((count + 1, REACH))
    np.add.at(at_distance, (row + 1, distance[row, column]), np.sqrt(scores[row, column]))
    np.cumsum(at_distance, axis=0, out=at_distance)
    end = np.arange(1, count + 1)
    start = np.searchsorted(query_positions, query_positions - WINDOW, side="right")
    window = at_distance[end] - at_distance[start]
    np.maximum(window, 0, out=window)  # differences of equal sums may be off by a rounding
    up_to = np.concatenate([np.zeros((count, 1)), window.cumsum(axis=1)], axis=1)
    best = np.zeros(count)
    for period in PERIODS:
        teeth = np.arange(period, REACH, period)
        low, high = np.maximum(teeth - period // 2, nearest), np.minimum(teeth + period // 2 + 1, REACH)
        expected = (up_to[:, high] - up_to[:, low]) / (high - low)
        np.maximum(best, (window[:, teeth] - expected).sum(axis=1), out=best)
    best /= np.maximum(up_to[:, -1], _TINY)
    best[end - start < MIN_ROWS] = np.nan
    return best
