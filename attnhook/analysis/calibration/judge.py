"""How well predicted zones agree with what the probes should show: counts, intervals over probes, permutations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnhook.analysis.calibration.rows import Rows
from attnhook.record import zones

ROUNDS = 1000  # bootstraps, and permutations
BLOCK = 10  # probes of about the same length, among which labels are permuted
_ZONES = len(zones.ZONE_NAMES)
_ABSENT = np.full(_ZONES, np.nan)  # the line of a zone without probes
_INTERVAL = (2.5, 97.5)  # percent


@dataclass(frozen=True)
class Judgement:
    """Agreement of one view of the rows; all numbers give every probe the same weight.

    Zones without a probe have NaN in their lines, and are left out of means and of what precision compares with.
    """

    confusion: np.ndarray  # int [5, 5], rows (of the store) by wanted zone and predicted zone
    rates: np.ndarray  # float [5, 5], each line the mean over its probes; sums to 1
    probes: np.ndarray  # int [5]
    recall: np.ndarray  # float [5]
    recall_interval: np.ndarray  # float [5, 2], 95%, over bootstraps of probes
    precision: np.ndarray  # float [5], as if the five kinds were equally frequent; NaN: never predicted
    precision_interval: np.ndarray  # float [5, 2]
    balanced: float
    balanced_interval: tuple[float, float]
    chance: float  # mean balanced accuracy with the labels permuted over probes
    chance_bound: float  # its 97.5th percentile
    chance_at_length: float  # the same, labels permuted only among probes whose rows see about as many keys
    chance_at_length_bound: float  # its 97.5th percentile
    p_value: float  # share of permutations that reach the balanced accuracy, at least 1 / (ROUNDS + 1)

    @property
    def supported(self) -> tuple[bool, ...]:
        """Whether each zone is told apart: its precision is above chance with 97.5% confidence.

        Chance is 1 over the number of judged zones. That is the same as the zone's recall being above the rate at
        which probes of other kinds are given the zone. A zone that was not judged is not supported.
        """
        return tuple(bool(low > self.chance_precision) for low in np.nan_to_num(self.precision_interval[:, 0]))

    @property
    def chance_precision(self) -> float:
        """Precision of a guess: 1 over the number of zones that have probes."""
        return 1 / int((self.probes > 0).sum())


@dataclass(frozen=True)
class Control:
    """How often a zone is given to the rows that have to show it, and to others of the same prompts."""

    probes: int
    recall: float
    rate: float  # in the control rows
    difference_interval: tuple[float, float]  # of recall - rate, 95%, over bootstraps of probes

    @property
    def passed(self) -> bool:
        """Whether the zone tells those rows apart, and not only the kind and length of the prompt."""
        return self.difference_interval[0] > 0


def against_controls(
    rows: Rows, codes: np.ndarray, controls: Rows, control_codes: np.ndarray, zone: int, *, seed: int = 0
) -> Control | None:
    """Compare a zone's rows with the control rows of the same probes; None where there are none."""
    both = np.intersect1d(rows.probe, controls.probe)
    both = both[rows.labels[both] == zone]
    if not len(both):
        return None
    given, by_chance = (
        np.array([(found[part.probe == one] == zone).mean() for one in both])
        for part, found in ((rows, codes), (controls, control_codes))
    )
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(both), (ROUNDS, len(both)))
    low, high = np.percentile((given - by_chance)[draws].mean(axis=1), _INTERVAL)
    return Control(len(both), float(given.mean()), float(by_chance.mean()), (float(low), float(high)))


def recalls(rows: Rows, codes: np.ndarray) -> np.ndarray:
    """Recall of each zone with a probe, every probe with the same weight; codes int [N]."""
    labels = rows.labels
    hits = np.bincount(rows.probe, (codes == labels[rows.probe]) * rows.weights(), minlength=len(labels))
    present = np.zeros(len(labels), bool)
    present[rows.probe] = True
    return np.array([hits[present & (labels == zone)].mean() for zone in np.unique(labels[present & (labels >= 0)])])


def shares(rows: Rows, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each zone in every probe's rows, float [P, 5], and the labels of those probes, int [P]."""
    table = np.zeros((len(rows.probes), _ZONES))
    np.add.at(table, (rows.probe, codes), rows.weights())
    present = table.sum(axis=1) > 0
    return table[present], rows.labels[present]


def judge(rows: Rows, codes: np.ndarray, *, seed: int = 0, rounds: int = ROUNDS) -> Judgement:
    """Judge the predicted ``codes``, int [N]; the same seed gives the same intervals."""
    table, labels = shares(rows, codes)
    keys = np.bincount(rows.probe, rows.keys * rows.weights(), minlength=len(rows.probes))[np.unique(rows.probe)]
    table, labels, keys = table[labels >= 0], labels[labels >= 0], keys[labels >= 0]
    rng = np.random.default_rng(seed)
    rates = _rates(table, labels)
    boots = np.full((rounds, _ZONES, _ZONES), np.nan)
    members = [np.flatnonzero(labels == zone) for zone in range(_ZONES)]
    for zone, own in enumerate(members):
        if len(own):
            boots[:, zone] = table[rng.choice(own, (rounds, len(own)))].mean(axis=1)
    anywhere = np.argsort(rng.random((rounds, len(labels))), axis=1)
    permuted = _balanced_with(table, labels[anywhere])
    # in blocks of probes of about equal length: the whole part of the sorting key is the block
    alike = np.argsort(keys, kind="stable")
    nearby = np.argsort(np.arange(len(labels)) // BLOCK + rng.random((rounds, len(labels))), axis=1)
    matched = _balanced_with(table[alike], labels[alike][nearby])
    confusion = np.zeros((_ZONES, _ZONES), np.int64)
    wanted = rows.labels[rows.probe]
    np.add.at(confusion, (wanted[wanted >= 0], codes[wanted >= 0]), 1)
    balanced = _balanced(rates)
    low, high = np.percentile(np.nanmean(boots.diagonal(axis1=1, axis2=2), axis=1), _INTERVAL)
    return Judgement(
        confusion=confusion,
        rates=rates,
        probes=np.array([len(own) for own in members]),
        recall=rates.diagonal().copy(),
        recall_interval=np.percentile(boots.diagonal(axis1=1, axis2=2), _INTERVAL, axis=0).T,
        precision=_precision(rates),
        precision_interval=np.percentile(np.nan_to_num(_precision(boots)), _INTERVAL, axis=0).T,
        balanced=balanced,
        balanced_interval=(float(low), float(high)),
        chance=float(permuted.mean()),
        chance_bound=float(np.percentile(permuted, _INTERVAL[1])),
        chance_at_length=float(matched.mean()),
        chance_at_length_bound=float(np.percentile(matched, _INTERVAL[1])),
        p_value=float((1 + (permuted >= balanced).sum()) / (rounds + 1)),
    )


def _balanced_with(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Balanced accuracy, float [R], of shares [P, 5] under each of R assignments of labels, int [R, P]."""
    counts = np.bincount(labels[0], minlength=_ZONES)
    hits = table[np.arange(len(table)), labels] / counts[labels]
    means: np.ndarray = hits.sum(axis=1) / int((counts > 0).sum())
    return means


def _rates(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    kinds = [table[labels == zone] for zone in range(_ZONES)]
    return np.stack([_mean(kind) if len(kind) else _ABSENT for kind in kinds])


def _mean(table: np.ndarray) -> np.ndarray:
    mean: np.ndarray = table.mean(axis=0)
    return mean


def _balanced(rates: np.ndarray) -> float:
    return float(np.nanmean(rates.diagonal()))


def _precision(rates: np.ndarray) -> np.ndarray:
    """Precision by zone of rates [..., 5, 5], the kinds taken as equally frequent; NaN where never predicted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision: np.ndarray = rates.diagonal(axis1=-2, axis2=-1) / np.nansum(rates, axis=-2)
    return precision
