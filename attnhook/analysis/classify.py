"""Clusters of new fingerprints, by the map that ``attnhook discover`` has left in a folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnhook.analysis.explain import sentence
from attnhook.analysis.manifold.artifact import MANIFEST, load
from attnhook.analysis.manifold.model import Model
from attnhook.errors import AttnhookError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.zones import ZONE_NAMES, classify_many

logger = logging.getLogger("attnhook")


@dataclass(frozen=True, eq=False)
class Classified:
    """N fingerprints: ``cluster`` int32 [N] (-1: none), ``probability`` float32 [N], ``zone`` int8 [N] (an index into
    `ZONE_NAMES`), ``confidence`` float32 [N] of the zone, ``xy`` float32 [N, 2] on the map, ``far`` bool [N]: further
    from the map's sample than any of the sample from its neighbours."""

    cluster: np.ndarray
    probability: np.ndarray
    zone: np.ndarray
    confidence: np.ndarray
    xy: np.ndarray
    far: np.ndarray


@dataclass(frozen=True, eq=False)
class _Loaded:
    model: Model
    manifest: dict[str, Any]
    stamp: tuple[int, ...]  # of the manifest's file


class FingerprintClassifier:
    """Places fingerprints on a map; any number of threads may use one.

    The folder is looked at again every ``reload_seconds`` (None: never): when another discovery has replaced it, the
    new map is used from the next call on. A new map that cannot be loaded is logged once and left in
    ``problem``; the map that is loaded stays in use.

    Raises PluginError where the folder holds no discovery, RecordError where it is damaged, tampered with or newer.
    """

    def __init__(self, folder: Path | str, *, reload_seconds: float | None = 1.0, workers: int = 1) -> None:
        self.folder = Path(folder)
        self._reload_seconds = reload_seconds
        self._workers = workers
        self._lock = threading.Lock()
        self._loaded = self._load()
        self._looked = time.monotonic()
        self.problem: str | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the map that is in use."""
        return self._current().manifest

    def places(self, fingerprints: Sequence[Sequence[float]] | np.ndarray) -> Classified:
        """Cluster, zone and place of fingerprints float [N, 20], all from one map.

        The same as what the discovery wrote to its Parquet files for the same numbers, to the bit. Raises
        RecordError, naming the first fingerprint that is none.
        """
        return self._places(self._current(), fingerprints)

    def _places(self, loaded: _Loaded, fingerprints: Sequence[Sequence[float]] | np.ndarray) -> Classified:
        try:
            rows = np.asarray(fingerprints, np.float32)  # as stored: a float64 would round elsewhere
        except (TypeError, ValueError) as error:
            raise RecordError(f"fingerprints are arrays of {fp.SIZE} numbers a row: {error}") from error
        rows = rows.reshape(0, fp.SIZE) if rows.shape == (0,) else rows
        zone, confidence = classify_many(rows)
        found = loaded.model.place(rows, workers=self._workers)
        return Classified(found.cluster, found.probability, zone, confidence, found.xy, found.far)

    def classify(self, fingerprints: np.ndarray) -> list[dict[str, Any]]:
        """One JSON object for each fingerprint, as ``POST /classify`` of the collector answers."""
        found = self.places(fingerprints)
        columns = zip(
            found.cluster.tolist(),
            found.probability.tolist(),
            found.zone.tolist(),
            found.confidence.tolist(),
            found.xy.tolist(),
            found.far.tolist(),
            strict=True,
        )
        return [
            {
                "label": "none" if cluster < 0 else f"cluster-{cluster}",
                "confidence": round(probability, 6),
                "cluster": cluster,
                "zone": ZONE_NAMES[zone],
                "zone_confidence": round(sure, 6),
                "x": round(x, 4),
                "y": round(y, 4),
                "far": far,
            }
            for cluster, probability, zone, sure, (x, y), far in columns
        ]

    def explain(self, fingerprint: Sequence[float] | np.ndarray) -> str:
        """One sentence on what sets a fingerprint float [20] apart; see `attnhook.analysis.explain`."""
        return sentence(self._current().model.components, fingerprint)

    def _load(self) -> _Loaded:
        stamp = self._stamp()
        model, manifest = load(self.folder)
        return _Loaded(model, manifest, stamp)

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = (self.folder / MANIFEST).stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _current(self) -> _Loaded:
        """The map in use, after a look at the folder where that is due; one thread looks, the others go on."""
        if self._reload_seconds is None or time.monotonic() - self._looked < self._reload_seconds:
            return self._loaded
        if self._lock.acquire(blocking=False):
            try:
                if self._stamp() != self._loaded.stamp:
                    self._loaded = self._load()
                    logger.info("%s: a new map is in use", self.folder)
                self.problem = None
            except AttnhookError as error:
                if self.problem is None:
                    logger.warning("the map before stays in use: %s", error)
                self.problem = str(error)
            finally:
                self._looked = time.monotonic()
                self._lock.release()
        return self._loaded
