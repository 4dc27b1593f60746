"""Zones: named kinds of attention pattern, told from a fingerprint alone.

A zone is a summary for people, not a measurement. Two limits matter most (docs/measurements/zones.md has numbers):

- Many heads put much of their mass on the attention sink, the token at position 0, which does nothing.
  In a row at position 256 or later that mass lies in the long bins, so ``long_range`` often just says
  "sink". `without_key` takes it out, exactly, where its score is known.
- Sixteen log2 bins hold no period, so no fingerprint alone is ``structure_ripple``. That zone needs the
  periodicity which `attnhook.record.periodicity` measures from the attended positions of consecutive rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnhook.errors import OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import sink_mass
from attnhook.system import untrusted

ZONE_NAMES: tuple[str, ...] = ("syntax_floor", "semantic_bridge", "structure_ripple", "long_range", "diffuse")
SYNTAX_FLOOR, SEMANTIC_BRIDGE, STRUCTURE_RIPPLE, LONG_RANGE, DIFFUSE = range(5)

MEANINGS: dict[str, str] = {
    "syntax_floor": "Most attention is on the last few tokens, as in grammar and bracket matching.",
    "semantic_bridge": "Most attention is 8 to 255 tokens back, as when a fact is fetched from the last paragraphs.",
    "structure_ripple": "Attention falls on multiples of one distance, row after row, as in counting and repeats.",
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

    ``local_mass``, ``diffuse_entropy`` and ``ripple_periodicity`` are what ``attnhook calibrate`` fitted to
    SmolLM2-135M-Instruct (docs/measurements/zones.md); the others are conventions.

    "Mass" is a fraction of the row's whole attention on keys, in [0, 1]. Conditions are logistic curves:
    one half at the threshold, and 0.12 or 0.88 two softnesses away.
    """

    # masses at which the zones of a band count the same; with equal values the larger band wins
    local_mass: float = 0.3
    mid_mass: float = 0.5
    long_mass: float = 0.5

    diffuse_entropy: float = 0.88  # normalised entropy, in [0, 1]
    diffuse_entropy_softness: float = 0.04  # normalised entropy
    diffuse_keys: float = 12.0  # effective number of keys, exp(entropy in nats): fewer are a focus

    ripple_periodicity: float = 0.14  # periodicity, in [0, 1]; see `attnhook.record.periodicity`
    ripple_softness: float = 0.02  # periodicity

    count_softness: float = 0.2  # nats, for the effective number of keys: 0.2 is a factor of 1.22
    tail_mass: float = 0.003  # mass from a distance on that shows that keys are visible there
    faint_mass: float = 0.001  # total mass at which a row counts half as attending to nothing at all
    tolerance: float = 0.01  # rounding by which a fingerprint may leave [0, 1]
    sharpness: float = 2.0  # exponent that turns weights into a confidence

    def save(self, path: Path, **notes: Any) -> None:
        """Write the table as JSON, with ``notes`` beside it that `load` passes over. Raises OSError."""
        content = {"attnhook_thresholds": _FORMAT, "thresholds": asdict(self), "notes": notes}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Thresholds:
        """Read a table that `save` wrote.

        Raises OptionError where the file cannot be read, is of a newer format, lacks a field, has one that this
        release does not know, or a number that is not positive.
        """
        try:
            content = untrusted.load(path)
        except (OSError, ValueError) as error:
            raise OptionError("thresholds", f"cannot read thresholds from {path}: {error}") from error
        version = content.get("attnhook_thresholds") if isinstance(content, dict) else None
        if version != _FORMAT:
            raise OptionError(
                "thresholds",
                f"{path} has thresholds of format {version!r}; this attnhook reads {_FORMAT}: fit them anew with "
                "attnhook calibrate",
            )
        table, known = content.get("thresholds"), {field.name for field in fields(cls)}
        if not isinstance(table, dict) or set(table) != known:
            odd = sorted(known ^ set(table)) if isinstance(table, dict) else sorted(known)
            raise OptionError(
                "thresholds", f"{path} has unknown or missing thresholds: {', '.join(odd)}; fit them anew"
            )
        for name, value in table.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise OptionError("thresholds", f"{path}: {name} is {value!r}; it must be a positive number")
        return cls(**{name: float(value) for name, value in table.items()})


_FORMAT = 1
DEFAULTS = Thresholds()

_CHUNK = 16384  # rows at a time: temporaries stay in the processor's cache
_TINY = 1e-12


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
    fingerprints: Sequence[Sequence[float]] | np.ndarray,
    *,
    periodicity: np.ndarray | None = None,
    thresholds: Thresholds = DEFAULTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Zones of many fingerprints.

    The histogram is divided by its sum m. Five weights then share out 1, with f logistic curves:

        diffuse            D = 1 - (1 - f(entropy) f(exp(entropy in nats))) m / (m + faint_mass)
        structure_ripple   (1 - D) R, R = f(periodicity), 0 where that was not measured
        the three bands    (1 - D) (1 - R) b, b their masses over their thresholds, made to sum to 1

    The zone has the largest weight w, and confidence ``w**s / sum of all w**s`` with s the sharpness. So a
    pattern that no other zone claims has confidence near 1, n zones that tie have 1/n each, and a small
    change of the fingerprint changes it a little.

    Parameters
    ----------
    fingerprints : [N, 20] float
        N may be 0. Masses below 1 (models with learned attention sinks) are divided by their sum.
    periodicity : [N] float, optional
        What `attnhook.record.periodicity` measured; NaN where it could not. Without it no row is
        ``structure_ripple``.
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
    regular = _regular(periodicity, len(rows))
    codes = np.empty(len(rows), np.int8)
    confidence = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        chunk = rows[part].astype(np.float64)
        _check(chunk, start, thresholds.tolerance)
        weights = _weights(chunk, regular[part], thresholds)
        sharpened = weights**thresholds.sharpness
        codes[part] = weights.argmax(axis=1)
        confidence[part] = sharpened.max(axis=1) / sharpened.sum(axis=1)
    return codes, confidence


def check(fingerprints: np.ndarray) -> None:
    """Raise RecordError, naming row and number, unless `classify_many` takes these fingerprints [N, 20]."""
    rows = _as_rows(fingerprints)
    for start in range(0, len(rows), _CHUNK):
        _check(rows[start : start + _CHUNK].astype(np.float64), start, DEFAULTS.tolerance)


def shares(codes: np.ndarray) -> dict[str, float]:
    """Fraction of the codes in each zone, in the order of `ZONE_NAMES`; all 0 where there are none."""
    codes = np.asarray(codes)
    if codes.size and not (codes.min() >= 0 and codes.max() < len(ZONE_NAMES)):
        raise RecordError(f"zone codes run from 0 to {len(ZONE_NAMES) - 1}, got {codes.min()} to {codes.max()}")
    counts = np.bincount(codes.ravel().astype(np.int64), minlength=len(ZONE_NAMES))
    return {name: float(count / max(codes.size, 1)) for name, count in zip(ZONE_NAMES, counts, strict=True)}


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
    found, sound = sink_mass.without_key(rows, score, distance, keys)
    if not sound.all():
        row = int(sound.argmin())
        bin_ = fp.bin_of(int(distance[row]))
        raise RecordError(
            f"row {row}: score {score[row]:.6g} exceeds the mass {rows[row, fp.HISTOGRAM][bin_]:.6g} of its bin "
            f"{fp.bin_label(bin_)}; take score and distance from the fingerprint's own row and layer"
        )
    return found


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


def are_fingerprints(fingerprints: np.ndarray) -> np.ndarray:
    """bool [N] for float [N, 20]: whether `classify_many` takes the row with the default thresholds."""
    found = np.empty(len(fingerprints), bool)
    for start in range(0, len(fingerprints), _CHUNK):
        part = slice(start, start + _CHUNK)
        good, total = _in_range(fingerprints[part].astype(np.float64), DEFAULTS.tolerance)
        found[part] = good.all(axis=1) & (total <= 1 + DEFAULTS.tolerance)
    return found


def _in_range(rows: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """bool [N, 20] where a number is in [0, 1], and the histograms' sums [N]."""
    return (rows >= -tolerance) & (rows <= 1 + tolerance), rows[:, fp.HISTOGRAM].sum(axis=1)


def _check(rows: np.ndarray, first: int, tolerance: float) -> None:
    """Refuse NaN and out-of-range numbers; ``first`` is the number of the first row."""
    good, total = _in_range(rows, tolerance)
    if not good.all():
        row, column = (int(i) for i in np.argwhere(~good)[0])
        raise RecordError(
            f"fingerprint {first + row}: {fp.NAMES[column]} is {rows[row, column]:g}, outside [0, 1]; "
            "the record is damaged or is no attention fingerprint"
        )
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


def _regular(periodicity: np.ndarray | None, count: int) -> np.ndarray:
    """Periodicity of each row, 0 where it is unknown."""
    if periodicity is None:
        return np.zeros(count)
    measured = np.asarray(periodicity, np.float64)
    if measured.shape != (count,) or ((measured < 0) | (measured > 1)).any():
        raise RecordError(
            f"periodicity has shape {list(measured.shape)} for {count} fingerprints; it must have one number in "
            "[0, 1] or NaN for each"
        )
    return np.nan_to_num(measured)


def _weights(rows: np.ndarray, periodicity: np.ndarray, t: Thresholds) -> np.ndarray:
    """Weight of each zone, ``[N, 5]``, rows summing to 1."""
    histogram, total, entropy = _normalised(rows)
    nats = _nats(histogram, entropy, t)
    focus = 1 - _above(entropy, t.diffuse_entropy, t.diffuse_entropy_softness) * _above(
        nats, np.log(t.diffuse_keys), t.count_softness
    )
    focus *= total / (total + t.faint_mass)
    rippled = _above(periodicity, t.ripple_periodicity, t.ripple_softness)
    rippled[periodicity == 0] = 0  # not measured, or none
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
