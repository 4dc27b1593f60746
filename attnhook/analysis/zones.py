"""Zones: named kinds of attention pattern, told from a fingerprint alone.

A zone is a summary for people, not a measurement. Two limits matter most (docs/zones.md has numbers):

- Many heads put much of their mass on the attention sink, the token at position 0, which does nothing.
  In a row at position 256 or later that mass lies in the long bins, so ``long_range`` often just says
  "sink". `without_key` takes it out, exactly, where its score is known.
- Sixteen log2 bins hold no period. `ripple` sees that attention skips keys at several scales at once and
  leaves the nearest ones out, as regular attention does; irregular sparse attention can look the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnhook import fingerprint as fp
from attnhook.errors import RecordError

if TYPE_CHECKING:
    from attnhook.records import TokenRecord

ZONE_NAMES: tuple[str, ...] = ("syntax_floor", "semantic_bridge", "structure_ripple", "long_range", "diffuse")
SYNTAX_FLOOR, SEMANTIC_BRIDGE, STRUCTURE_RIPPLE, LONG_RANGE, DIFFUSE = range(5)

MEANINGS: dict[str, str] = {
    "syntax_floor": "Most attention is on the last few tokens, as in grammar and bracket matching.",
    "semantic_bridge": "Most attention is 8 to 255 tokens back, as when a fact is fetched from the last paragraphs.",
    "structure_ripple": "Attention skips from key to key over many distances, as in counting, tables and repeats.",
    "long_range": "Most attention is 256 tokens back or more: retrieval from afar, or the attention sink.",
    "diffuse": "Attention is spread almost evenly over what is visible, with no focus.",
}

#: Each at 3:1 or better on white and on near-black, and apart under the three colour vision deficiencies.
COLOURS: dict[str, str] = {
    "syntax_floor": "#1D66D5",
    "semantic_bridge": "#00A584",
    "structure_ripple": "#E37110",
    "long_range": "#A282D3",
    "diffuse": "#636363",
}


@dataclass(frozen=True)
class Thresholds:
    """Every number that the classification rests on; nothing else in attnhook knows one.

    "Mass" is a fraction of the row's whole attention on keys, in [0, 1]. Conditions are logistic curves:
    one half at the threshold, and 0.12 or 0.88 two softnesses away.
    """

    # masses at which the zones of a band count the same: with equal values the larger band wins
    local_mass: float = 0.5
    mid_mass: float = 0.5
    long_mass: float = 0.5

    diffuse_entropy: float = 0.8  # normalised entropy, in [0, 1]
    diffuse_entropy_softness: float = 0.04  # normalised entropy
    diffuse_keys: float = 12.0  # effective number of keys, exp(entropy in nats): fewer are a focus

    ripple_scales: float = 2.5  # effective number of bins
    ripple_teeth: float = 6.0  # effective number of keys inside a bin
    ripple_spacing: float = 2.0  # visible keys per attended key inside a bin
    ripple_near_mass: float = 0.03  # mass at distances 2..7 that divides the signal by e
    count_softness: float = 0.2  # nats, for the effective numbers above: 0.2 is a factor of 1.22

    tail_mass: float = 0.003  # mass from a distance on that shows that keys are visible there
    faint_mass: float = 0.001  # total mass at which a row counts half as attending to nothing at all
    tolerance: float = 0.01  # rounding by which a fingerprint may leave [0, 1]
    sharpness: float = 2.0  # exponent that turns weights into a confidence


DEFAULTS = Thresholds()

_CHUNK = 16384  # rows at a time: temporaries stay in the processor's cache
_TINY = 1e-12
# keys that a bin can hold, in nats; the last bin has no end, and is taken to end at twice its start
_LOG_WIDTHS = np.log(np.diff(np.array([*fp.BIN_STARTS, 2 * fp.BIN_STARTS[-1]], np.float64)))


class Zone(NamedTuple):
    """A zone's name and the confidence in it, in [0, 1]."""

    name: str
    confidence: float


def classify(fingerprint: Sequence[float] | np.ndarray) -> Zone:
    """Zone of one fingerprint, float[20]; see `classify_many`."""
    row = _as_array(fingerprint)
    if row.shape != (fp.SIZE,):
        raise RecordError(f"a fingerprint has shape ({fp.SIZE},), got {row.shape}; use classify_many for several")
    codes, confidence = classify_many(row[None])
    return Zone(ZONE_NAMES[codes[0]], float(confidence[0]))


def classify_many(
    fingerprints: Sequence[Sequence[float]] | np.ndarray, *, thresholds: Thresholds = DEFAULTS
) -> tuple[np.ndarray, np.ndarray]:
    """Zones of many fingerprints.

    The histogram is divided by its sum m. Five weights then share out 1, with f logistic curves:

        diffuse            D = 1 - (1 - f(entropy) f(exp(entropy in nats))) m / (m + faint_mass)
        structure_ripple   (1 - D) R, R as in `ripple`
        the three bands    (1 - D) (1 - R) b, b their masses over their thresholds, made to sum to 1

    The zone has the largest weight w, and confidence ``w**s / sum of all w**s`` with s the sharpness. So a
    pattern that no other zone claims has confidence near 1, n zones that tie have 1/n each, and a small
    change of the fingerprint changes it a little.

    Parameters
    ----------
    fingerprints : [N, 20] float
        N may be 0. Masses below 1 (models with learned attention sinks) are divided by their sum.
    thresholds : Thresholds
        The table to use.

    Returns
    -------
    codes : [N] int8
        Indices into `ZONE_NAMES`; ties go to the lower one.
    confidence : [N] float32
        In [1/5, 1].

    Raises
    ------
    RecordError
        Wrong shape, or a number that is NaN or out of range; the message names it.
    """
    rows = _as_rows(fingerprints)
    codes = np.empty(len(rows), np.int8)
    confidence = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        chunk = rows[part].astype(np.float64)
        _check(chunk, start, thresholds.tolerance)
        weights = _weights(chunk, thresholds)
        sharpened = weights**thresholds.sharpness
        codes[part] = weights.argmax(axis=1)
        confidence[part] = sharpened.max(axis=1) / sharpened.sum(axis=1)
    return codes, confidence


def shares(codes: np.ndarray) -> dict[str, float]:
    """Fraction of the codes in each zone, in the order of `ZONE_NAMES`; all 0 where there are none."""
    codes = np.asarray(codes)
    if codes.size and not (codes.min() >= 0 and codes.max() < len(ZONE_NAMES)):
        raise RecordError(f"zone codes run from 0 to {len(ZONE_NAMES) - 1}, got {codes.min()} to {codes.max()}")
    counts = np.bincount(codes.ravel().astype(np.int64), minlength=len(ZONE_NAMES))
    return {name: float(count / max(codes.size, 1)) for name, count in zip(ZONE_NAMES, counts, strict=True)}


def ripple(fingerprints: np.ndarray, *, thresholds: Thresholds = DEFAULTS) -> np.ndarray:
    """The periodicity signal R of fingerprints ``[N, 20]``, float64 ``[N]`` in [0, 1].

    A row that attends to every P-th key fills its bins with holes. With the normalised histogram h, bin
    widths w (in keys), and the row's entropy H in nats:

        H_bins  = -sum h ln h                 scales  = exp(H_bins)           effective number of bins
        inside  = H - H_bins                  teeth   = exp(inside)           effective keys per bin
        even    = sum h ln w                  spacing = exp(even - inside)    about P, and 1 without holes
        near    = mass at distances 2..7

        R = f(scales) f(teeth) f(spacing) exp(-near / ripple_near_mass)

    where f is a logistic curve in the logarithm. H needs the number of visible keys, which a fingerprint
    does not hold: the end of the furthest bin that has mass is taken. That is up to twice too far, so
    spacing errs low and teeth err high by at most 2. Where not even ``tail_mass`` lies in the further half
    of the visible keys (rare under a softmax, common in made-up rows) it is too near, and a dense band can
    look full of holes. A period below about 5, or with fewer than some 30 repeats, does not show.
    """
    rows = _as_rows(fingerprints).astype(np.float64)
    _check(rows, 0, thresholds.tolerance)
    histogram, _, entropy = _normalised(rows)
    return _ripple(histogram, _nats(histogram, entropy, thresholds), thresholds)


def without_sink(records: Sequence[TokenRecord], span: str) -> list[Zone]:
    """Zones of records as if the key at position 0 were not there.

    ``span`` names the captured span ``(0, 1)``, whose mass is that key's score in each layer. Each layer's
    fingerprint is freed of it, then averaged and classified. Raises KeyError if a record lacks the span.
    """
    if not records:
        return []
    means = []
    for record in records:
        column = record.span_names.index(span) if span in record.span_names else None
        if column is None:
            raise KeyError(f"record {record.key} has no span {span!r}: capture with spans={{{span!r}: (0, 1)}}")
        p, layers = record.query_position, len(record.layers)
        freed, scores = record.fingerprints, record.span_mass[:, column]
        if p > 0:  # a layer whose window hides position 0 gives it 0 and stays as it is
            without = without_key(freed, scores, np.full(layers, p), np.full(layers, p + 1))
            freed = np.where((scores > 0)[:, None], without, freed)
        means.append(freed.mean(axis=0, dtype=np.float64))
    codes, confidence = classify_many(np.stack(means))
    return [Zone(ZONE_NAMES[code], float(sure)) for code, sure in zip(codes, confidence, strict=True)]


def without_key(fingerprints: np.ndarray, scores: np.ndarray, distances: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fingerprints as if one key of each row, such as the attention sink, were not there.

    The result is exact, not an estimate: it is the fingerprint of the other keys' scores (whose mass is then
    below 1). It holds for one layer's fingerprint, not for a mean over layers.

    Parameters
    ----------
    fingerprints : [N, 20] float
        One layer's fingerprints.
    scores : [N] float
        The key's attention score, as in `TokenRecord.attention_scores`.
    distances : [N] int
        Query position minus key position; the query position itself for the key at position 0.
    visible : [N] int
        Number of visible keys of the row, that key included.

    Returns
    -------
    [N, 20] float32

    Raises
    ------
    RecordError
        A score exceeds the mass of its bin: it belongs to another row, layer or distance.
    """
    rows = _as_rows(fingerprints).astype(np.float64)
    _check(rows, 0, DEFAULTS.tolerance)
    score, distance, keys = (np.asarray(x) for x in (scores, distances, visible))
    histogram, entropy = rows[:, fp.HISTOGRAM], rows[:, fp.ENTROPY]
    bins = np.array([fp.bin_of(int(d)) for d in distance], np.int64)
    total = histogram.sum(axis=1)
    index = np.arange(len(rows))
    if (wrong := score > histogram[index, bins] + DEFAULTS.tolerance).any():
        row = int(wrong.argmax())
        raise RecordError(
            f"row {row}: score {score[row]:.6g} exceeds the mass {histogram[row, bins[row]]:.6g} of its bin "
            f"{fp.bin_label(int(bins[row]))}; take score and distance from the fingerprint's own row and layer"
        )
    histogram[index, bins] = np.maximum(histogram[index, bins] - score, 0)
    part = np.clip(score / np.maximum(total, _TINY), 0, 1)
    rest = 1 - part
    nats = (entropy * np.log(keys) + part * np.log(np.maximum(part, _TINY))) / np.maximum(rest, _TINY)
    nats += np.log(np.maximum(rest, _TINY))
    left = np.log(np.maximum(keys - 1, 2))
    return fp.assemble(histogram, np.where((keys > 2) & (rest > _TINY), np.clip(nats / left, 0, 1), 0))


def _as_array(numbers: Any) -> np.ndarray:
    try:
        array = np.asarray(numbers)
        return array if array.dtype.kind == "f" else array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise RecordError(f"fingerprints are arrays of {fp.SIZE} numbers a row: {error}") from error


def _as_rows(numbers: Any) -> np.ndarray:
    rows = _as_array(numbers)
    if rows.shape == (0,):  # an empty list
        rows = rows.reshape(0, fp.SIZE)
    if rows.ndim != 2 or rows.shape[1] != fp.SIZE:
        raise RecordError(f"fingerprints have shape [N, {fp.SIZE}], got {list(rows.shape)}")
    return rows


def _check(rows: np.ndarray, first: int, tolerance: float) -> None:
    """Refuse NaN and out-of-range numbers; ``first`` is the number of the first row."""
    good = (rows >= -tolerance) & (rows <= 1 + tolerance)
    if not good.all():
        row, column = (int(i) for i in np.argwhere(~good)[0])
        raise RecordError(
            f"fingerprint {first + row}: {fp.NAMES[column]} is {rows[row, column]:g}, outside [0, 1]; "
            "the record is damaged or is no attention fingerprint"
        )
    total = rows[:, fp.HISTOGRAM].sum(axis=1)
    if (total > 1 + tolerance).any():
        row = int((total > 1 + tolerance).argmax())
        raise RecordError(
            f"fingerprint {first + row}: its histogram sums to {total[row]:g}, outside [0, 1]; "
            "the record is damaged or is no attention fingerprint"
        )


def _normalised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Histogram that sums to 1 (or is 0), total mass and entropy in [0, 1]."""
    histogram = np.clip(rows[:, fp.HISTOGRAM], 0, 1)
    total = histogram.sum(axis=1)
    return histogram / np.maximum(total, _TINY)[:, None], total, np.clip(rows[:, fp.ENTROPY], 0, 1)


def _nats(histogram: np.ndarray, entropy: np.ndarray, t: Thresholds) -> np.ndarray:
    """Entropy in nats, with the visible keys taken to end where the furthest bin that has mass ends."""
    tail = histogram[:, ::-1].cumsum(axis=1) ** 2
    doublings = (tail / (tail + t.tail_mass**2)).sum(axis=1)
    nats: np.ndarray = entropy * doublings * np.log(2)
    return nats


def _ripple(histogram: np.ndarray, nats: np.ndarray, t: Thresholds) -> np.ndarray:
    across = -(histogram * np.log(np.maximum(histogram, _TINY))).sum(axis=1)
    even = histogram @ _LOG_WIDTHS
    inside = np.clip(nats - across, 0, even)
    near = fp.masses(histogram)[0] - histogram[:, 0]
    signal: np.ndarray = np.exp(-near / t.ripple_near_mass)
    for count, threshold in (
        (across, t.ripple_scales),
        (inside, t.ripple_teeth),
        (even - inside, t.ripple_spacing),
    ):
        signal *= _above(count, np.log(threshold), t.count_softness)
    return signal


def _weights(rows: np.ndarray, t: Thresholds) -> np.ndarray:
    """Weight of each zone, ``[N, 5]``, rows summing to 1."""
    histogram, total, entropy = _normalised(rows)
    nats = _nats(histogram, entropy, t)
    focus = 1 - _above(entropy, t.diffuse_entropy, t.diffuse_entropy_softness) * _above(
        nats, np.log(t.diffuse_keys), t.count_softness
    )
    focus *= total / (total + t.faint_mass)
    rippled = _ripple(histogram, nats, t)
    local, mid, long = fp.masses(histogram)
    bands = np.stack([local / t.local_mass, mid / t.mid_mass, long / t.long_mass], axis=1)
    bands /= np.maximum(bands.sum(axis=1, keepdims=True), _TINY)
    bands *= (focus * (1 - rippled))[:, None]

    weights = np.empty((len(rows), len(ZONE_NAMES)))
    weights[:, [SYNTAX_FLOOR, SEMANTIC_BRIDGE, LONG_RANGE]] = bands
    weights[:, STRUCTURE_RIPPLE] = focus * rippled
    weights[:, DIFFUSE] = 1 - focus
    return weights


def _above(value: np.ndarray, threshold: float, softness: float) -> np.ndarray:
    """Logistic curve: 0 well below the threshold, one half at it, 1 well above."""
    curve: np.ndarray = 0.5 * (1 + np.tanh((value - threshold) / (2 * softness)))
    return curve
