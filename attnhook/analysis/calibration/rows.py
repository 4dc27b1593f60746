"""The rows of a probe run by which zones are judged, with what each should show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from attnhook.analysis import probes
from attnhook.analysis.session import SINK
from attnhook.errors import RecordError
from attnhook.record import periodicity, zones
from attnhook.record.token_record import TokenRecord

MOST_ROWS = 32  # of one probe
CONTROLS = 8  # rows of a prompt, beside the one that is judged
_APART = 16  # tokens between them and the end of the prompt
_ANSWERED = ("mid", "long")  # behaviours that only the row before the answer has to show
_NONE = -1  # label of a pack without a zone


@dataclass(frozen=True)
class Rows:
    """N judged rows of P probes, each seen U times: in every captured layer, and in the mean over them, last."""

    fingerprints: np.ndarray  # float32 [N, U, 20], freed of the attention sink
    whole: np.ndarray  # float32 [N, 20], the record's own fingerprint, sink included
    periodicity: np.ndarray  # float64 [N, U], NaN where it could not be measured
    keys: np.ndarray  # int [N], visible keys of the row
    probe: np.ndarray  # int [N], index into ``probes``
    control: np.ndarray  # bool [N]: rows of the same prompt that do not have to show what the probe is for
    probes: tuple[probes.Probe, ...]
    layers: tuple[int, ...]
    model: str
    left_out: Counter[str]  # probes of each pack whose answer was wrong

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the U views of a row."""
        return (*(f"layer {layer}" for layer in self.layers), "mean")

    @property
    def labels(self) -> np.ndarray:
        """Code of the zone that each probe should show, int [P]; -1 for natural text."""
        wanted = [probes.ZONES[probe.behaviour] for probe in self.probes]
        return np.array([_NONE if zone is None else zones.ZONE_NAMES.index(zone) for zone in wanted])

    def of_half(self, half: str) -> Rows:
        """The rows of one half of the packs; the probes keep their numbers."""
        return self.where(np.array([probe.half == half for probe in self.probes])[self.probe])

    def where(self, mask: np.ndarray) -> Rows:
        """The rows that ``mask``, bool [N], lets through."""
        return replace(
            self,
            fingerprints=self.fingerprints[mask],
            whole=self.whole[mask],
            periodicity=self.periodicity[mask],
            keys=self.keys[mask],
            probe=self.probe[mask],
            control=self.control[mask],
        )

    def weights(self) -> np.ndarray:
        """Weight of each row, float [N], so that every probe of these rows has weight 1."""
        counts = np.bincount(self.probe, minlength=len(self.probes))
        weights: np.ndarray = 1 / counts[self.probe]
        return weights


def collect(records: Iterable[TokenRecord], right: Mapping[str, bool | None], *, wrong_too: bool = False) -> Rows:
    """The judged rows of a probe run, whose records come probe by probe, as `attnhook probe` stores them.

    Of probes that ask for something far back (mid and long) it is the row that the answer's first token is sampled
    from; of the others at most `MOST_ROWS` of the second half of the prompt and of what was generated, evenly spread.
    Rows before the question in the second half of the same prompt are the controls of the first kind.
    ``right`` is the run's journal: request id to whether the answer was right, None where no answer is certain.
    Probes answered wrongly are left out unless ``wrong_too``: a model that cannot do the task shows something else.

    Raises RecordError where the records are of no probe run, of several models or layers, or lack positions or the
    span of the sink.
    """
    chosen: list[TokenRecord] = []
    regular: list[np.ndarray] = []
    found: list[probes.Probe] = []
    which: list[int] = []
    control: list[bool] = []
    left_out: Counter[str] = Counter()
    for request_id, group in groupby(records, key=lambda record: record.request_id):
        probe = probes.find(request_id)
        if probe is None or request_id not in right:
            continue
        if right[request_id] is False and not wrong_too:
            left_out[probe.pack] += 1
            continue
        rows = sorted(group, key=lambda record: record.query_position)
        _check(rows, chosen[0] if chosen else rows[0])
        picked = _decisive(probe, rows)
        if picked:
            measured = _periodicity(rows)
            others = _controls(rows, picked[0]) if probe.behaviour in _ANSWERED else []
            chosen += [rows[i] for i in (*picked, *others)]
            control += [False] * len(picked) + [True] * len(others)
            regular.append(measured[[*picked, *others]])
            which += [len(found)] * (len(picked) + len(others))
            found.append(probe)
    if not chosen and left_out:
        raise RecordError(
            f"no rows to judge: the answers of all {left_out.total()} finished probes are wrong; count them with "
            "--wrong-too, or run the probes on a model that can do them"
        )
    if not chosen:
        raise RecordError(
            "no rows to judge: the records are of no finished probe; give the store of attnhook probe and its journal"
        )
    first = chosen[0]
    layers = np.stack([_freed(record) for record in chosen])
    return Rows(
        fingerprints=np.concatenate([layers, layers.mean(axis=1, keepdims=True, dtype=np.float64)], axis=1),
        whole=np.stack([record.fingerprint for record in chosen]),
        periodicity=np.concatenate(regular),
        keys=np.array([record.query_position + 1 for record in chosen]),
        probe=np.array(which),
        control=np.array(control),
        probes=tuple(found),
        layers=first.layers,
        model=first.model,
        left_out=left_out,
    )


def _decisive(probe: probes.Probe, rows: list[TokenRecord]) -> list[int]:
    first = next((i for i, record in enumerate(rows) if record.decode_step == 0), None)
    if probe.behaviour in _ANSWERED:
        return [] if first is None else [first]
    prompt = rows[-1].query_position if first is None else rows[first].query_position
    later = [i for i, record in enumerate(rows) if record.query_position >= max(prompt // 2, 2)]
    step = max(1.0, len(later) / MOST_ROWS)
    return [later[int(i * step)] for i in range(min(len(later), MOST_ROWS))]


def _controls(rows: list[TokenRecord], judged: int) -> list[int]:
    """Rows of the second half of the prompt, evenly spread, where no answer is asked for yet."""
    end = rows[judged].query_position
    before = [i for i, record in enumerate(rows) if end // 2 <= record.query_position <= end - _APART]
    step = max(1.0, len(before) / CONTROLS)
    return [before[int(i * step)] for i in range(min(len(before), CONTROLS))]


def _periodicity(rows: list[TokenRecord]) -> np.ndarray:
    """Of each layer alone and of all together, float64 [n, L + 1]."""
    at = np.array([record.query_position for record in rows])
    k = max(record.token_positions.shape[1] for record in rows)
    positions = np.full((len(rows), len(rows[0].layers), k), -1)
    scores = np.zeros(positions.shape)
    for i, record in enumerate(rows):  # the first rows of a prompt see fewer than k keys
        size = record.token_positions.shape[1]
        positions[i, :, :size], scores[i, :, :size] = record.token_positions, record.attention_scores
    layers = [periodicity.comb(positions[:, i], scores[:, i], at) for i in range(positions.shape[1])]
    return np.stack([*layers, periodicity.measure(rows)], axis=1)


def _check(rows: list[TokenRecord], first: TokenRecord) -> None:
    for record in rows:
        if (record.layers, record.model) != (first.layers, first.model):
            raise RecordError(
                f"record {record.key!r} is of {record.model}, layers {list(record.layers)}, others of {first.model}, "
                f"layers {list(first.layers)}: calibrate on one run of one model"
            )
        if SINK not in record.span_names or not record.token_positions.shape[1]:
            missing = f"the span {SINK!r}" if SINK not in record.span_names else "attended positions"
            raise RecordError(
                f"record {record.key!r} lacks {missing}, which calibration needs: run attnhook probe anew, into a sink "
                "without fingerprints=1"
            )


def _freed(record: TokenRecord) -> np.ndarray:
    """A record's fingerprints without the key at position 0, float32 [L, 20]."""
    position, score = record.query_position, record.span_mass[:, record.span_names.index(SINK)]
    count = len(record.layers)
    free = zones.without_key(record.fingerprints, score, np.full(count, position), np.full(count, position + 1))
    return np.where((score > 0)[:, None], free, record.fingerprints)
