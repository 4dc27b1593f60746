"""What docs/findings.md needs beside attnhook's own commands.

    python -m benchmarks.findings without-sink sqlite:smollm2.db sqlite:free.db   # the key at position 0 taken out
    python -m benchmarks.findings octaves map                                     # clusters of attnhook discover

``without-sink`` writes records whose one fingerprint is the mean over layers of what is left, exactly; rows at
position 0 have no other key and are left out. ``octaves`` compares clusters with floor(log2(position)) alone.
"""

from __future__ import annotations

import sys

import numpy as np

from attnhook.analysis.compare.sides import SINK_SPAN, without_sink
from attnhook.plugins import open_sink
from attnhook.records import TokenRecord
from attnhook.sinks.columns import NAMES, to_records
from attnhook.store import open_store


def write_without_sink(source: str, target: str) -> int:
    """Copy the records of a store whose rows all have the span ``sink``; returns how many were written."""
    sink, written = open_sink(target), 0
    nothing = np.zeros((1, 0), np.float32)
    with open_store(source) as store:
        for batch in store.fingerprints(columns=NAMES, batch_size=4096):
            records = list(to_records(batch))
            own = np.stack([record.fingerprints for record in records])
            mass = np.stack([record.span_mass[:, record.span_names.index(SINK_SPAN)] for record in records])
            free = without_sink(own, mass, np.array([record.query_position for record in records]))
            kept = [
                TokenRecord(
                    request_id=record.request_id,
                    query_position=record.query_position,
                    layers=(0,),
                    token_positions=nothing.astype(np.int32),
                    attention_scores=nothing,
                    fingerprints=free[i : i + 1],
                    decode_step=record.decode_step,
                    choice=record.choice,
                    mode="fingerprint",
                    model=record.model,
                    span_mass=nothing,
                )
                for i, record in enumerate(records)
                if record.query_position > 0
            ]
            sink.write(kept)
            written += len(kept)
    sink.close()
    return written


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


def main() -> None:
    match sys.argv[1:]:
        case ["without-sink", source, target]:
            print(f"{write_without_sink(source, target)} records written")
        case ["octaves", folder]:
            index, shares = octaves(folder)
            print(f"adjusted Rand index of clusters and floor(log2(position)): {index:.3f}")
            for cluster, found in shares.items():
                print(f"cluster {cluster}: {found}")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
