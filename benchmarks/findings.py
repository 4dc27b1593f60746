"""What docs/findings.md and docs/measurements/zones.md need beside attnhook's own commands.

    python -m benchmarks.findings octaves map                       # clusters of attnhook discover, and octaves
    python -m benchmarks.findings periodicity sqlite:probes.db      # does it tell periodic text from other text?
    python -m benchmarks.findings masses sqlite:a.db sqlite:b.db    # local, mid, long mass without position 0
    python -m benchmarks.findings beyond sqlite:probes.db 512       # each layer's mass on position 0 from there on

``octaves`` compares clusters with floor(log2(position)) alone. ``periodicity`` needs the journal of `attnhook probe`
beside the store; for equal ranges of the row's position it prints the area under the curve (AUC: the probability that
a row of periodic text has more of it than one of other text), with 95% intervals over bootstraps of probes.
``masses`` takes the requests that both stores have; intervals are over bootstraps of pairs of requests.
"""

from __future__ import annotations

import sys

import numpy as np

from attnhook.analysis.calibration.rows import collect
from attnhook.analysis.compare.sides import SINK_SPAN
from attnhook.errors import RecordError
from attnhook.probing import journal
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.arrow import NAMES
from attnhook.record.columns import to_records
from attnhook.record.sink_mass import free_means
from attnhook.record.without_sink import sink_mass_of
from attnhook.store import open_store

RANGES = ((40, 69), (70, 99), (100, 129), (130, 159), (160, 259), (260, 511))  # visible keys of the row
_ROUNDS = 500


def octaves(folder: str) -> tuple[float, dict[int, dict[int, float]]]:
    """Adjusted Rand index of clusters and octaves of the position, and the shares of octaves in each cluster."""
    import pyarrow.parquet as pq
    from sklearn.metrics import adjusted_rand_score  # type: ignore[import-untyped]

    clusters = pq.read_table(f"{folder}/assignments.parquet", columns=["cluster"]).column(0).to_numpy()
    positions = pq.read_table(f"{folder}/points.parquet", columns=["query_position"]).column(0).to_numpy()
    octave = 2 ** np.floor(np.log2(np.maximum(positions, 1))).astype(int)
    shares = {}
    for cluster in np.unique(clusters).tolist():
        found, counts = np.unique(octave[clusters == cluster], return_counts=True)
        shares[cluster] = dict(zip(found.tolist(), (counts / counts.sum()).round(3).tolist(), strict=True))
    return float(adjusted_rand_score(octave, clusters)), shares


def periodicity(store: str, seed: int = 0) -> None:
    """Print how well the periodicity tells rows of periodic packs from all others; wrong answers count too."""
    _, done = journal.read(journal.place(store, None))
    with open_store(store) as opened:
        rows = collect(opened.records(), {name: entry["right"] for name, entry in done.items()}, wrong_too=True)
    measured = rows.periodicity[:, -1]  # over all layers together
    known = ~np.isnan(measured) & ~rows.control
    ripple = (rows.labels == zones.ZONE_NAMES.index("structure_ripple"))[rows.probe]
    rng = np.random.default_rng(seed)
    print(f"{rows.model}: {int(known.sum())} rows of {len(np.unique(rows.probe[known]))} probes")
    for low, high in RANGES:
        here = known & (rows.keys >= low) & (rows.keys <= high)
        groups = [
            [measured[here & (rows.probe == one)] for one in np.unique(rows.probe[here & kind])]
            for kind in (ripple, ~ripple)
        ]
        if min(map(len, groups)) < 2:
            continue
        found = _auc(*map(np.concatenate, groups))
        boots = [
            _auc(*(np.concatenate([own[i] for i in rng.integers(0, len(own), len(own))]) for own in groups))
            for _ in range(_ROUNDS)
        ]
        interval = _interval(np.array(boots))
        counts = ", ".join(f"{len(own)} probes ({sum(map(len, own))} rows)" for own in groups)
        print(
            f"{low} to {high} keys: AUC {found:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]; periodic, other: {counts}"
        )


def masses(first: str, second: str, seed: int = 0) -> None:
    """Print the means over rows of both sides and their difference; rows at position 0 have no other key."""
    sums = [_sums_without_sink(url) for url in (first, second)]
    shared = sorted(sums[0].keys() & sums[1].keys())
    tables = [np.stack([side[name] for name in shared]) for side in sums]  # [R, 20 + rows]
    draws = np.random.default_rng(seed).integers(0, len(shared), (_ROUNDS, len(shared)))
    means = [table[:, :-1].sum(axis=0) / table[:, -1].sum() for table in tables]
    boots = [table[draws].sum(axis=1) for table in tables]
    boots = [100 * one[:, :-1] / one[:, -1:] for one in boots]
    print(
        f"{len(shared)} requests in both; rows after position 0: {', '.join(f'{t[:, -1].sum():,.0f}' for t in tables)}"
    )
    for index in (fp.LOCAL, fp.MID, fp.LONG, fp.ENTROPY):
        views = [(100 * mean[index], boot[:, index]) for mean, boot in zip(means, boots, strict=True)]
        views.append((views[0][0] - views[1][0], views[0][1] - views[1][1]))
        texts = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, boot in views for low, high in [_interval(boot)]]
        print(f"{fp.NAMES[index]}: {texts[0]} against {texts[1]}, difference {texts[2]}")


def beyond(store: str, position: int) -> None:
    """Print each layer's mass on position 0, mean and largest, of the rows from a position on."""
    found: dict[int, list[float]] = {}
    with open_store(store) as opened:
        for record in opened.records():
            if record.query_position >= position:
                mass = sink_mass_of(record, SINK_SPAN).tolist()
                for layer, value in zip(record.layers, mass, strict=True):
                    found.setdefault(layer, []).append(value)
    for layer, values in sorted(found.items()):
        print(f"layer {layer}: mean {np.mean(values):.3f}, largest {max(values):.3f}, {len(values)} rows")


def _sums_without_sink(url: str) -> dict[str, np.ndarray]:
    """Of each request: the sums of its rows' fingerprints without position 0, and their number."""
    sums: dict[str, np.ndarray] = {}
    with open_store(url) as store:
        for batch in store.fingerprints(columns=NAMES, batch_size=4096):
            records = [record for record in to_records(batch) if record.query_position > 0]
            if not records:
                continue
            own = np.stack([record.fingerprints for record in records])
            mass = np.stack([sink_mass_of(record, SINK_SPAN) for record in records])
            free, sound = free_means(own, mass, np.array([record.query_position for record in records]))
            if not sound.all():
                raise RecordError(f"{url}: {int((~sound).sum())} rows whose attention on position 0 does not fit")
            for record, row in zip(records, free, strict=True):
                sums.setdefault(record.request_id, np.zeros(fp.SIZE + 1))[:] += [*row, 1]
    return sums


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Mann and Whitney's: ties count half."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / (2 * len(order)))


def main() -> None:
    match sys.argv[1:]:
        case ["octaves", folder]:
            index, shares = octaves(folder)
            print(f"adjusted Rand index of clusters and floor(log2(position)): {index:.3f}")
            for cluster, found in shares.items():
                print(f"cluster {cluster}: {found}")
        case ["periodicity", store]:
            periodicity(store)
        case ["masses", first, second]:
            masses(first, second)
        case ["beyond", store, position]:
            beyond(store, int(position))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
