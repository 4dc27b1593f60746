"""One side of a comparison: a summary of bounded size for each request of a store.

Rows of one request are not independent of each other, so everything that is resampled later is a request; what is
kept here are sums over each request's rows, and a few of its fingerprints. All of them are without the attention sink,
position 0, where the store tells it.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

import numpy as np

from attnhook.analysis.sink import COLUMNS, SinkChoice
from attnhook.errors import OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import sink_mass, zones
from attnhook.record.arrow import fingerprints_of, show_layer_sets
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import sink_mass_of
from attnhook.store import open_store

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Literal["all", "prompt", "generated"]
ROWS: tuple[Rows, ...] = get_args(Rows)
SINK_SPAN: Final = "sink"  # the span (0, 1) of `attnhook probe`, which tells the sink's mass in stores before 0.2
MIN_REQUESTS: Final = 10
MAX_REQUESTS: Final = 20_000
SAMPLED_ROWS: Final = 8  # fingerprints kept of each request
_BATCH = 4096
_ZONES = len(zones.ZONE_NAMES)

_PER_REQUEST = (
    *("rows", "zones", "sums", "sink_rows", "sink"),
    *("layer_rows", "layer_sums", "layer_sink_rows", "layer_sink"),
)

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Which rows of which store are a side; None is no condition."""

    url: str
    label: str = ""  # name in reports; empty: the model's, or the store's
    model: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def filters(self, name: str) -> str:
        """The options of the command line that leave rows of side ``name`` out, as text; empty where there are none."""
        given = {"model": self.model, "since": self.since, "until": self.until}
        return " and ".join(f"--{name.lower()}-{option}" for option, value in given.items() if value is not None)


@dataclass(frozen=True, eq=False)
class Side:
    """Sums per request; R requests in the order of their ids, L layers."""

    label: str
    source: Source
    models: dict[str, int]  # rows of each
    layer_sets: dict[Layers, int]  # rows of each set of captured layers; () where a row does not tell
    requests: tuple[str, ...]
    left_out: int  # requests beyond MAX_REQUESTS, left out at random
    without_sink: bool  # zones, sums and samples are those of the attention without position 0
    rows: np.ndarray  # int64 [R]
    zones: np.ndarray  # int64 [R, zones] rows in each zone
    sums: np.ndarray  # float64 [R, 20] of the records' fingerprints
    sink_rows: np.ndarray  # int64 [R] rows that tell their attention on position 0
    sink: np.ndarray  # float64 [R] sum of that
    layers: Layers
    layer_rows: np.ndarray  # int64 [R, L]
    layer_sums: np.ndarray  # float64 [R, L, 20]
    layer_sink_rows: np.ndarray  # int64 [R, L]
    layer_sink: np.ndarray  # float64 [R, L]
    sample: np.ndarray  # float32 [n, 20] some fingerprints of each request
    sample_request: np.ndarray  # int64 [n] whose they are

    @property
    def total(self) -> int:
        """Rows of the requests that are kept."""
        return int(self.rows.sum())

    @property
    def knows_sink(self) -> bool:
        """Whether every row tells its attention on position 0."""
        return bool((self.sink_rows == self.rows).all())

    def take(self, index: np.ndarray) -> Side:
        """The side with only these requests, in that order; ``index`` int64 [r], none twice."""
        place = np.full(len(self.requests), -1)
        place[index] = np.arange(len(index))
        kept = place[self.sample_request] >= 0
        values = {**self.__dict__, **{name: getattr(self, name)[index] for name in _PER_REQUEST}}
        values["requests"] = tuple(self.requests[i] for i in index)
        values["sample"] = self.sample[kept]
        values["sample_request"] = place[self.sample_request[kept]]
        return Side(**values)


def read(
    source: Source,
    *,
    name: str,
    rows: Rows = "all",
    mixed: bool = False,
    seed: int = 0,
    max_requests: int = MAX_REQUESTS,
    with_sink: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Side:
    """Read a side; memory is that of ``max_requests`` summaries, whatever the store's size.

    Each row is taken without the attention sink where all rows tell their attention on position 0, unless
    ``with_sink``. ``name`` ("A", "B") is used in messages. Of more requests a random part is kept that depends on the
    ids and the seed only. ``progress`` is called with rows read and rows in all.

    Raises
    ------
    OptionError
        Nothing is left to read; several models, or rows of different layers, and not ``mixed``; some rows tell their
        attention on position 0 and others do not, and not ``with_sink``.
    RecordError, PluginError
        A fingerprint is NaN or out of range; the store is damaged, of another schema version, or not there.
    """
    if rows not in ROWS:
        raise OptionError("rows", f"rows={rows!r} must be one of {', '.join(ROWS)}")
    found = _Gatherer(seed, max_requests, SinkChoice(f"side {name} ({source.url})", with_sink=with_sink))
    filters = {"model": source.model, "since": source.since, "until": source.until}
    columns = ("request_id", "choice", "decode_step", "model", *COLUMNS)
    seen = 0
    with open_store(source.url) as store:
        total = store.count(**filters)  # type: ignore[arg-type]
        for batch in store.fingerprints(**filters, columns=columns, batch_size=_BATCH):  # type: ignore[arg-type]
            seen += batch.num_rows
            try:
                found.add(_chosen(batch, rows))
            except RecordError as error:
                raise RecordError(
                    f"side {name} ({source.url}), rows {seen - batch.num_rows} to {seen - 1}: {error}"
                ) from error
            progress(seen, max(total, seen))
    if not found.requests:
        kind = "" if rows == "all" else f" {rows}"
        model = "" if source.model is None else f" of model {source.model!r}"
        given = source.filters(name)
        among = f"the {seen} that {given} let through" if given else f"its {seen}"
        remedy = f"check the store and {given}" if given else "check the store" if rows == "all" else "check --rows"
        raise OptionError(name.lower(), f"side {name} ({source.url}) has no{kind} rows{model} among {among}: {remedy}")
    if not mixed:
        _refuse_mixture(found, name, source)
    return found.side(source, name)


def _refuse_mixture(found: _Gatherer, name: str, source: Source) -> None:
    option = f"{name.lower()}_model"
    if len(found.models) > 1:
        shown = ", ".join(f"{model!r} ({count} rows)" for model, count in found.models.most_common(5))
        raise OptionError(
            option,
            f"side {name} ({source.url}) has rows of {len(found.models)} models: {shown}; choose one with "
            f"--{name.lower()}-model, or ask for the mixture with --mixed",
        )
    if len(found.layer_sets) > 1:
        shown = show_layer_sets(found.layer_sets)
        raise OptionError(
            "mixed",
            f"side {name} ({source.url}) has rows of different layers, whose means cannot be compared: {shown}; "
            "choose rows by time, or ask for the mixture with --mixed",
        )


def _chosen(batch: pa.RecordBatch, rows: Rows) -> pa.RecordBatch:
    if rows == "all":
        return batch
    import pyarrow.compute as pc

    prompt = pc.is_null(batch.column("decode_step"))
    return batch.filter(prompt if rows == "prompt" else pc.invert(prompt))


@dataclass
class _Request:
    key: int  # its random number: those with the lowest are kept
    rows: int = 0
    sink_rows: int = 0
    zones: np.ndarray = field(default_factory=lambda: np.zeros(_ZONES, np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(fp.SIZE))
    sink: float = 0.0
    layers: dict[Layers, np.ndarray] = field(default_factory=dict)  # float64 [L, 20 + rows, sink rows, sink mass]
    sample_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    sample: np.ndarray = field(default_factory=lambda: np.zeros((0, fp.SIZE), np.float32))


class _Gatherer:
    """Sums per request over batches; the result does not depend on how rows are cut into batches."""

    def __init__(self, seed: int, max_requests: int, sink: SinkChoice) -> None:
        self._salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
        self._max = max_requests
        self._sink = sink
        self._heap: list[tuple[int, str]] = []  # the kept requests, highest random number first
        self.requests: dict[str, _Request] = {}
        self._left_out: set[int] = set()
        self.models: Counter[str] = Counter()
        self.layer_sets: Counter[Layers] = Counter()

    def add(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        ids = batch.column("request_id").to_pylist()
        self.models.update(batch.column("model").to_pylist())
        prints = fingerprints_of(batch)
        groups = _by_layers(batch, prints)
        told = np.zeros(len(ids), bool)
        for group in groups:
            told[group.where] = group.sink is not None
        if self._sink.is_out(told):
            zones.check(prints)  # what is in the column is damage too
            prints = prints.copy()
            for group in groups:
                prints[group.where] = group.free()
        codes, _ = zones.classify_many(prints)  # with today's thresholds, not those of when it was stored
        names = {name: place for place, name in enumerate(dict.fromkeys(ids))}
        which = np.fromiter((names[name] for name in ids), np.int64, len(ids))
        owners = [self._owner(name) for name in names]
        for owner, count in zip(owners, np.bincount(which, minlength=len(names)).tolist(), strict=True):
            if owner is not None:
                owner.rows += count
        self._add_sums(owners, which, codes, prints)
        self._add_samples(owners, which, batch, prints)
        self._add_layers(owners, which, groups)

    def _owner(self, name: str) -> _Request | None:
        """The request's summary; None where it is left out."""
        found = self.requests.get(name)
        if found is not None:
            return found
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=self._salt).digest(), "little")
        if key in self._left_out or (len(self._heap) == self._max and key > -self._heap[0][0]):
            self._left_out.add(key)
            return None
        found = self.requests[name] = _Request(key)
        heapq.heappush(self._heap, (-key, name))
        if len(self._heap) > self._max:
            worst, dropped = heapq.heappop(self._heap)
            self._left_out.add(-worst)
            del self.requests[dropped]
        return found

    def _add_sums(
        self, owners: Sequence[_Request | None], which: np.ndarray, codes: np.ndarray, prints: np.ndarray
    ) -> None:
        counted = np.bincount(which * _ZONES + codes, minlength=len(owners) * _ZONES).reshape(-1, _ZONES)
        sums = np.zeros((len(owners), fp.SIZE))
        np.add.at(sums, which, prints)
        for owner, zone, total in zip(owners, counted, sums, strict=True):
            if owner is not None:
                owner.zones += zone
                owner.sums += total

    def _add_samples(
        self, owners: Sequence[_Request | None], which: np.ndarray, batch: pa.RecordBatch, prints: np.ndarray
    ) -> None:
        positions = batch.column("query_position").to_numpy().astype(np.uint64)
        choices = batch.column("choice").to_numpy().astype(np.uint64)
        own = np.array([0 if owner is None else owner.key for owner in owners], np.uint64)[which]
        keys = _mixed(own ^ _mixed(positions + (choices << np.uint64(40))))
        order = np.lexsort((keys, which))
        starts = np.searchsorted(which[order], np.arange(len(owners) + 1))
        for owner, start, end in zip(owners, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            if owner is None:
                continue
            best = order[start : min(end, start + SAMPLED_ROWS)]
            together = np.concatenate([owner.sample_keys, keys[best]])
            lowest = np.argsort(together, kind="stable")[:SAMPLED_ROWS]
            owner.sample_keys = together[lowest]
            owner.sample = np.concatenate([owner.sample, prints[best]])[lowest]

    def _add_layers(self, owners: Sequence[_Request | None], which: np.ndarray, groups: Sequence[_Group]) -> None:
        for layers, where, own, sink, _ in groups:
            self.layer_sets[layers] += len(where)
            part = np.zeros((len(owners), len(layers), fp.SIZE + 3))
            values = np.zeros((len(where), len(layers), fp.SIZE + 3))
            values[..., : fp.SIZE] = own
            values[..., fp.SIZE] = 1
            mass: np.ndarray = np.zeros(len(owners))
            if sink is not None:
                values[..., fp.SIZE + 1] = 1
                values[..., fp.SIZE + 2] = sink
                mass = np.bincount(which[where], sink.mean(axis=1, dtype=np.float64), minlength=len(owners))
            np.add.at(part, which[where], values)
            counts: list[int] = np.bincount(which[where], minlength=len(owners)).tolist()
            for place in np.unique(which[where]).tolist():
                owner = owners[place]
                if owner is None:
                    continue
                if sink is not None:
                    owner.sink_rows += counts[place]
                    owner.sink += float(mass[place])
                if layers:
                    owner.layers[layers] = owner.layers.get(layers, 0) + part[place]

    def side(self, source: Source, name: str) -> Side:
        """Everything as arrays."""
        ids = sorted(self.requests)
        found = [self.requests[one] for one in ids]
        layers = tuple(sorted({layer for request in found for own in request.layers for layer in own}))
        place = {layer: i for i, layer in enumerate(layers)}
        table = np.zeros((len(ids), len(layers), fp.SIZE + 3))
        for row, request in zip(table, found, strict=True):
            for own, sums in request.layers.items():
                row[[place[layer] for layer in own]] += sums
        counts = np.rint(table[..., fp.SIZE :]).astype(np.int64)
        models = dict(self.models.most_common())
        return Side(
            label=source.label or (next(iter(models)) if len(models) == 1 else "") or f"{name} ({source.url})",
            source=source,
            models=models,
            layer_sets=dict(self.layer_sets.most_common()),
            requests=tuple(ids),
            left_out=len(self._left_out),
            without_sink=bool(self._sink.out),
            rows=np.array([request.rows for request in found], np.int64),
            zones=np.stack([request.zones for request in found]),
            sums=np.stack([request.sums for request in found]),
            sink_rows=np.array([request.sink_rows for request in found], np.int64),
            sink=np.array([request.sink for request in found]),
            layers=layers,
            layer_rows=counts[..., 0],
            layer_sums=table[..., : fp.SIZE],
            layer_sink_rows=counts[..., 1],
            layer_sink=table[..., fp.SIZE + 2],
            sample=np.concatenate([request.sample for request in found]),
            sample_request=np.repeat(np.arange(len(ids)), [len(request.sample) for request in found]),
        )


class _Group(NamedTuple):
    """The rows of a batch with the same layers that all tell, or do not tell, their attention on position 0."""

    layers: Layers
    where: np.ndarray  # int64 [n] in the batch
    own: np.ndarray  # float32 [n, L, 20] fingerprints; `free` takes the sink out
    sink: np.ndarray | None  # float32 [n, L]
    positions: np.ndarray  # int64 [n]

    def free(self) -> np.ndarray:
        """Take position 0 out of ``own``; the means over the layers, float32 [n, 20]. Raises RecordError."""
        if self.sink is None:
            raise ValueError("rows that do not tell their attention on position 0")
        self.own[:], sound = sink_mass.without_sink(self.own, self.sink, self.positions)
        if not sound.all():
            at = int(sound.argmin())
            raise RecordError(
                f"the row at position {self.positions[at]} is damaged: its attention on position 0, "
                f"{self.sink[at].max():.6g}, is more than its fingerprint has there; remove it"
            )
        mean: np.ndarray = self.own.mean(axis=1, dtype=np.float64).astype(np.float32)
        return mean


def _by_layers(batch: pa.RecordBatch, prints: np.ndarray) -> list[_Group]:
    """The rows of each set of layers; of a row that tells no layer L is 0."""
    rows = zip(*(batch.column(name).to_pylist() for name in ("record", "layer", "sink_mass")), strict=True)
    groups: dict[tuple[Layers, bool], list[tuple[int, np.ndarray, np.ndarray | None]]] = {}
    for i, (data, layer, mass) in enumerate(rows):
        layers: Layers = () if layer is None else (layer,)
        own, sink = np.zeros((0, fp.SIZE), np.float32), None
        if data is not None:
            record = TokenRecord.from_bytes(data)
            layers, own = record.layers, record.fingerprints
            if record.sink_mass is not None or SINK_SPAN in record.span_names:
                sink = sink_mass_of(record, SINK_SPAN)
        elif layer is not None:
            own = prints[i][None]
            sink = None if mass is None else np.array([mass], np.float32)
        groups.setdefault((layers, sink is not None), []).append((i, own, sink))
    positions = batch.column("query_position").to_numpy()
    found = []
    for (layers, knows), members in groups.items():
        where = np.array([i for i, _, _ in members])
        masses = np.stack([mass for _, _, mass in members if mass is not None]) if knows else None
        found.append(_Group(layers, where, np.stack([own for _, own, _ in members]), masses, positions[where]))
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """Random-looking uint64 numbers, always the same for the same values (Steele, Lea and Flood's SplitMix64)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
