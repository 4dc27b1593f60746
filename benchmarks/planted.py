"""Fingerprints of made-up attention with known kinds: what benchmarks and tests of discovery look for again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnhook.record import fingerprint as fp

_STARTS = np.array(fp.BIN_STARTS, np.float64)
_ENDS = np.array([*fp.BIN_STARTS[1:], 2 * fp.BIN_STARTS[-1]], np.float64)
_MIDDLES = np.log2(np.maximum(_STARTS, 1)) + 0.5


@dataclass(frozen=True)
class Kind:
    """One kind of attention: a bump over log2 distance, an even part over all visible keys, and the sink."""

    centre: float  # log2 tokens
    width: float  # standard deviation, log2 tokens
    even: float  # share of the mass that lies evenly on all visible keys
    sink: float  # score of position 0
    used: float  # share of the keys inside a bin that get attention


KINDS: tuple[Kind, ...] = (
    Kind(0.8, 0.6, 0.02, 0.05, 1.0),  # the last tokens
    Kind(0.8, 0.6, 0.02, 0.60, 1.0),  # the same beside a strong sink
    Kind(2.5, 0.7, 0.05, 0.20, 0.6),
    Kind(4.0, 0.6, 0.05, 0.05, 0.3),
    Kind(4.5, 0.7, 0.10, 0.55, 0.3),
    Kind(6.0, 0.6, 0.05, 0.15, 0.1),  # a few keys, some sentences back
    Kind(6.5, 1.8, 0.10, 0.10, 0.2),
    Kind(8.0, 0.7, 0.05, 0.30, 0.05),
    Kind(9.5, 0.6, 0.02, 0.02, 0.02),  # retrieval from afar
    Kind(5.0, 3.0, 0.15, 0.02, 0.7),
    Kind(5.0, 2.0, 0.70, 0.05, 1.0),  # nearly everything
    Kind(3.0, 1.0, 0.05, 0.90, 0.5),  # hardly anything but the sink
)


def planted(count: int, *, seed: int = 0, kinds: tuple[Kind, ...] = KINDS) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints float32 [count, 20] of query rows at positions 2048 to 4095, and the kind of each, int64 [count].

    Histogram and entropy are those of one made-up row of attention each, so that every invariant of
    `attnhook.record.fingerprint` holds:
    bins sum to 1, masses are sums of bins, keys beyond the row's position have none.
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(kinds), count, p=_shares(len(kinds)))
    fingerprints = np.empty((count, fp.SIZE), np.float32)
    for start in range(0, count, 65536):
        part = slice(start, start + 65536)
        fingerprints[part] = _rows(labels[part], kinds, rng)
    return fingerprints, labels


def _shares(count: int) -> np.ndarray:
    """Kinds are not equally frequent: the commonest is four times as frequent as the rarest."""
    weights = np.linspace(4.0, 1.0, count)
    shares: np.ndarray = weights / weights.sum()
    return shares


def _rows(labels: np.ndarray, kinds: tuple[Kind, ...], rng: np.random.Generator) -> np.ndarray:
    centre, width, even, sink, used = np.array(
        [(k.centre, k.width, k.even, k.sink, k.used) for k in kinds], np.float64
    )[labels].T
    rows = len(labels)
    position = rng.integers(2048, 4096, rows)
    visible = np.clip(np.minimum(_ENDS, position[:, None] + 1.0) - _STARTS, 0, None)  # keys in each bin
    centre = centre + rng.normal(0, 0.2, rows)
    bump = np.exp(-0.5 * ((_MIDDLES - centre[:, None]) / width[:, None]) ** 2) * (visible > 0)
    bump /= bump.sum(axis=1, keepdims=True)
    share = np.clip(even * np.exp(rng.normal(0, 0.15, rows)), 0, 1)[:, None]
    body = (1 - share) * bump + share * visible / visible.sum(axis=1, keepdims=True)
    body *= rng.gamma(30, 1 / 30, body.shape)  # no two rows are alike
    score = np.clip(sink * np.exp(rng.normal(0, 0.12, rows)), 0, 0.98)
    body *= ((1 - score) / body.sum(axis=1))[:, None]
    keys = np.maximum(visible * used[:, None], 1)
    nats = -(body * np.log(np.maximum(body, 1e-300) / keys)).sum(axis=1) - score * np.log(score)
    body[:, fp.bin_of(2048)] += score  # position 0 is 2048 to 4095 tokens back
    return fp.assemble(body.astype(np.float32), np.clip(nats / np.log(position + 1), 0, 1))
