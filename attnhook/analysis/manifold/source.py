"""From a store to a frozen copy of the rows that a discovery is about, and a stratified sample of them.

The copy is what makes a discovery repeatable: a store that a collector writes on has more rows a minute later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnhook.analysis import probes
from attnhook.analysis.manifold.settings import MINIMUM, Settings
from attnhook.analysis.sink import SinkChoice, free_fingerprints, told
from attnhook.errors import OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import NAMES, fingerprints_of, fixed_list, layer_sets, show_layer_sets
from attnhook.record.columns import to_records
from attnhook.record.sink_mass import without_sink
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import sink_mass_of
from attnhook.record.zones import ZONE_NAMES, classify_many
from attnhook.store import open_store

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 65536  # of a row group: what is in memory at a time
_KEYS = ("request_id", "choice", "query_position", "model")
_FLOOR = 30  # rows of each stratum in the sample, where it has so many

#: Told how many rows are done, and of how many where that is known.
Progress = Callable[[int, int], object]


@dataclass
class _Strata:
    """Numbers for (model, layer, what the row is of) as they turn up."""

    numbers: dict[tuple[str, int, str], int]

    def of(self, models: list[str], layers: list[int], kinds: list[str]) -> np.ndarray:
        numbers = self.numbers
        keys = zip(models, layers, kinds, strict=True)
        return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int32, len(models))


def copy(url: str, target: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Copy the rows that ``settings`` select from a store into a Parquet file; return what there is.

    Columns: the record's key, ``model``, ``layer`` (-1: the mean over the record's layers), ``pack`` of a probe's
    record (else null), ``stratum`` and ``fingerprint``.

    Raises
    ------
    OptionError
        Too few rows; several models, or means over different layers, without ``allow_mixed``.
    RecordError
        A fingerprint that is none, with its record named.
    """
    import pyarrow.parquet as pq

    strata, counts = _Strata({}), dict[str, int]()
    pending: list[pa.RecordBatch] = []
    rows = 0
    with open_store(url) as store:
        total = store.count(model=settings.model)
        done = 0
        sink = SinkChoice(url, with_sink=settings.with_sink)
        spans = settings.without_sink is not None  # which tell the sink's mass
        whole = settings.layers is not None or spans
        columns = NAMES if whole else (*_KEYS, "fingerprint", "layer", "record", "sink_mass")
        sets: Counter[tuple[int, ...]] = Counter()
        with pq.ParquetWriter(target, _schema()) as writer:
            for batch in store.fingerprints(model=settings.model, columns=columns):
                done += batch.num_rows
                taken = _rows(batch, settings, strata, free=spans or sink.is_out(told(batch)))
                for name, count in zip(*np.unique(taken.column("model").to_pylist(), return_counts=True), strict=True):
                    counts[str(name)] = counts.get(str(name), 0) + int(count)
                if len(counts) > 1 and not settings.allow_mixed:
                    raise OptionError(
                        "model",
                        f"{url} holds records of several models ({', '.join(sorted(counts))}): name one with --model, "
                        "or put them on one map with --allow-mixed",
                    )
                if settings.layers is None and not settings.allow_mixed:
                    _refuse_other_layers(url, batch, sets)
                pending.append(taken)
                rows += taken.num_rows
                if sum(one.num_rows for one in pending) >= ROWS:
                    _write(writer, pending)
                progress(done, max(total, done))
            _write(writer, pending)
    if rows < MINIMUM:
        chosen = "" if settings.model is None and settings.layers is None else " with these --model and --layers"
        raise OptionError(
            "store", f"{url} has {rows} fingerprints{chosen}; a map needs {MINIMUM} or more: store more records"
        )
    names = [list(key) for key in strata.numbers]
    models = dict(sorted(counts.items()))
    return {"rows": rows, "models": models, "strata": names, "without_sink": spans or bool(sink.out)}


def _refuse_other_layers(url: str, batch: pa.RecordBatch, sets: Counter[tuple[int, ...]]) -> None:
    """Count the batch's sets of layers; means over different layers are different numbers, and would be clusters."""
    sets.update(layer_sets(batch))
    if len(sets) > 1:
        raise OptionError(
            "layers",
            f"{url} holds records of different layers ({show_layer_sets(sets)}, as far as read), whose means are "
            "not of one kind: give each layer its own row with --layers all, or put them on one map with --allow-mixed",
        )


def chunks(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a copy, as batches of at most `ROWS`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(ROWS, columns=columns)


def sample(path: Path, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the sampled rows, int64 [n] ascending, and their fingerprints, float32 [n, 20].

    Strata are (model, layer, pack of a probe or else zone). Each gives its share of the rows, but `_FLOOR` rows or
    all it has where that is more, so that what is rare is on the map.
    """
    codes = np.concatenate([batch.column("stratum").to_numpy() for batch in chunks(path, ["stratum"])])
    sizes = np.bincount(codes)
    wanted = allocate(sizes, min(settings.sample, len(codes)))
    order = np.argsort(codes, kind="stable")
    rng = np.random.default_rng(settings.seed)
    ends = np.cumsum(sizes)
    picked = [
        order[end - size + rng.choice(size, want, replace=False)]
        for end, size, want in zip(ends.tolist(), sizes.tolist(), wanted.tolist(), strict=True)
    ]
    index = np.sort(np.concatenate(picked))
    found, start = [], 0
    for batch in chunks(path, ["fingerprint"]):
        low, high = np.searchsorted(index, [start, start + batch.num_rows])
        found.append(fingerprints_of(batch)[index[low:high] - start])
        start += batch.num_rows
    return index, np.concatenate(found)


def allocate(sizes: np.ndarray, total: int) -> np.ndarray:
    """How many of ``total`` each stratum gets, int64; by size, above a floor, and never more than there are."""
    sizes = sizes.astype(np.int64)
    wanted: np.ndarray = np.minimum(sizes, min(_FLOOR, total // max(len(sizes), 1)))
    room = sizes - wanted
    share = room * (total - wanted.sum()) / max(int(room.sum()), 1)
    wanted += np.floor(share).astype(np.int64)
    rest = total - int(wanted.sum())
    largest = np.argsort(np.floor(share) - share, kind="stable")  # the largest remainders first
    open_ = largest[wanted[largest] < sizes[largest]]
    wanted[open_[:rest]] += 1
    return wanted


def _rows(batch: pa.RecordBatch, settings: Settings, strata: _Strata, *, free: bool) -> pa.RecordBatch:
    """A store's batch in the columns of the copy, checked; ``free``: without the attention sink."""
    import pyarrow as pa

    if settings.layers is None and settings.without_sink is None:
        keys = [batch.column(name) for name in _KEYS]
        prints, layers = free_fingerprints(batch) if free else fingerprints_of(batch), [-1] * batch.num_rows
    else:
        own, layers, prints = _of_layers(list(to_records(batch)), settings, free=free)
        keys = [batch.column(name).take(pa.array(own, pa.int64())) for name in _KEYS]
    ids, models = keys[0].to_pylist(), keys[3].to_pylist()
    zones = _checked(prints, ids, keys)
    found = [probes.find(one) for one in ids]
    packs = [None if probe is None else probe.pack for probe in found]
    kinds = [ZONE_NAMES[code] if pack is None else pack for pack, code in zip(packs, zones.tolist(), strict=True)]
    arrays = [
        *keys,
        pa.array(layers, pa.int16()),
        pa.array(packs, pa.string()),
        pa.array(strata.of(models, layers, kinds)),
        fixed_list(prints),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_schema())


def _of_layers(
    records: list[TokenRecord], settings: Settings, *, free: bool
) -> tuple[list[int], list[int], np.ndarray]:
    """Number of the record, layer (-1: the mean) and fingerprint of each row that whole records give."""
    counts = np.array([len(record.layers) for record in records], np.int64)
    if not counts.sum():
        return [], [], np.zeros((0, fp.SIZE), np.float32)
    prints = np.concatenate([record.fingerprints for record in records])
    if free:
        prints = _without_sink(records, prints, settings)
    if settings.layers is None:
        starts = np.cumsum(counts) - counts
        means = np.add.reduceat(prints.astype(np.float64), starts) / counts[:, None]
        return list(range(len(records))), [-1] * len(records), means.astype(np.float32)
    layers = np.concatenate([record.layers for record in records])
    kept = np.ones(len(layers), bool) if settings.layers == "all" else np.isin(layers, settings.layers)
    own = np.repeat(np.arange(len(records)), counts)
    return own[kept].tolist(), layers[kept].tolist(), np.asarray(prints[kept], np.float32)


def _without_sink(records: list[TokenRecord], prints: np.ndarray, settings: Settings) -> np.ndarray:
    """The fingerprints of all layers of the records, float32 [n, 20], as if position 0 were not there."""
    masses = []
    for record in records:
        try:
            masses.append(sink_mass_of(record, settings.without_sink))
        except KeyError as error:
            raise OptionError(
                "without_sink",
                f"record {record.request_id!r} has no span {settings.without_sink!r}: capture with spans="
                f"{{{settings.without_sink!r}: (0, 1)}}, as attnhook probe does, or do not ask for --without-sink",
            ) from error
    own = np.repeat(np.arange(len(records)), list(map(len, masses)))
    positions = np.array([record.query_position for record in records], np.int64)[own]
    freed, sound = without_sink(prints[:, None], np.concatenate(masses)[:, None], positions)
    if not sound.all():
        record = records[own[sound.argmin()]]
        raise RecordError(f"record {record.key!r} is damaged: its attention on position 0 does not fit")
    return freed[:, 0]


def _checked(prints: np.ndarray, ids: list[str], keys: list[Any]) -> np.ndarray:
    """Zones, int8 [N]; RecordError names the first record whose fingerprint is none."""
    try:
        return classify_many(prints)[0]
    except RecordError:
        for i, row in enumerate(prints):
            try:
                classify_many(row[None])
            except RecordError as error:
                raise RecordError(
                    f"record {ids[i]!r}, choice {keys[1][i].as_py()}, position {keys[2][i].as_py()} is damaged "
                    f"({str(error).removeprefix('fingerprint 0: ')}): take it out of the store"
                ) from error
        raise


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("choice", pa.uint16(), nullable=False),
            pa.field("query_position", pa.int32(), nullable=False),
            pa.field("model", pa.string(), nullable=False),
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("pack", pa.string()),
            pa.field("stratum", pa.int32(), nullable=False),
            pa.field("fingerprint", pa.list_(pa.float32(), fp.SIZE), nullable=False),
        ]
    )


def _write(writer: Any, pending: list[pa.RecordBatch]) -> None:
    import pyarrow as pa

    if pending:
        writer.write_table(pa.Table.from_batches(pending))
        pending.clear()
