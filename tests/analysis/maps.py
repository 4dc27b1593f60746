"""Stores of made-up fingerprints with known kinds, and small maps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from attnhook.analysis.manifold.settings import Settings
from attnhook.record.arrow import fingerprints_of
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink

#: Small enough for a test: a fit takes less than a second, after the first has compiled UMAP.
SMALL = Settings(sample=400, epochs=40, repeats=1, min_cluster_share=0.03)


def records(fingerprints: np.ndarray, names: list[str], *, model: str = "org/model") -> list[TokenRecord]:
    """A record for each fingerprint [N, 20] or [N, layers, 20], its request id from its name."""
    prints = fingerprints[:, None] if fingerprints.ndim == 2 else fingerprints
    layers = prints.shape[1]
    return [
        TokenRecord(
            request_id=names[i],
            query_position=2048 + i,
            layers=tuple(range(layers)),
            token_positions=np.zeros((layers, 0), np.int32),
            attention_scores=np.zeros((layers, 0), np.float32),
            fingerprints=prints[i].astype(np.float32),
            decode_step=i,
            mode="fingerprint",
            model=model,
            span_mass=np.zeros((layers, 0), np.float32),
        )
        for i in range(len(prints))
    ]


def write(url: str, rows: list[TokenRecord]) -> str:
    """Add records to a store; its URL again."""
    sink = open_sink(url)
    sink.write(rows)
    sink.close()
    return url


def kinds_of(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Planted kind (what the request id begins with), found cluster, and whether it was sampled, of all rows."""
    points, found = (pq.read_table(folder / name) for name in ("points.parquet", "assignments.parquet"))
    kinds = np.array([int(one.partition("-")[0]) for one in points["request_id"].to_pylist()])
    return kinds, found["cluster"].to_numpy(), points["sampled"].to_numpy()


def stored(folder: Path) -> np.ndarray:
    """The fingerprints of an artifact, float32 [N, 20]."""
    return fingerprints_of(pq.read_table(folder / "points.parquet").combine_chunks().to_batches()[0])


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an artifact that two runs have in common."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


class Stop:
    """A progress callback that interrupts, as Ctrl-C would, at a stage's begin or at its first report."""

    def __init__(self, stage: str | None = None, *, inside: bool = False) -> None:
        self.seen: list[str] = []
        self._stage, self._inside = stage, inside

    def __call__(self, stage: str, done: int, total: int) -> None:
        if total == 0:
            self.seen.append(stage)
        if stage == self._stage and (done > 0) == self._inside:
            raise KeyboardInterrupt


def artifact(folder: Path) -> dict[str, Any]:
    """The manifest as JSON, unchecked."""
    import json

    return json.loads((folder / "manifest.json").read_text())
