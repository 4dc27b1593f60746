"""Results of discovery in an SQLite store: which clusters were found among its fingerprints, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnhook.errors import PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.columns import now_us
from attnhook.sinks import database
from attnhook.system import untrusted


@dataclass(frozen=True, eq=False)
class Cluster:
    """One cluster of a run."""

    label: int
    size: int  # records
    zone: str
    centroid: np.ndarray  # float32[20]


@dataclass(frozen=True, eq=False)
class DiscoveryRun:
    """One run over a store: its parameters as they were given, and its clusters by label."""

    id: int
    created: int  # microseconds since 1970, UTC
    parameters: Mapping[str, Any]
    records: int  # fingerprints that it looked at
    clusters: tuple[Cluster, ...]


def save(path: str, parameters: Mapping[str, Any], records: int, clusters: Sequence[Cluster]) -> int:
    """Add a run to the store ``sqlite:path`` and return its number.

    Raises PluginError where the store cannot be written, RecordError where a centroid is no fingerprint, TypeError
    where ``parameters`` have no JSON; nothing is then added.
    """
    for cluster in clusters:
        if np.shape(cluster.centroid) != (fp.SIZE,):
            raise RecordError(
                f"cluster {cluster.label}: its centroid has shape {np.shape(cluster.centroid)}; it must be ({fp.SIZE},)"
            )
    text = json.dumps(dict(parameters))
    connection = database.connect(path)
    try:
        with database.refusals(path), database.transaction(connection):
            run = connection.execute(
                "INSERT INTO discovery_runs (created, parameters, records) VALUES (?, ?, ?)", (now_us(), text, records)
            ).lastrowid
            connection.executemany(
                "INSERT INTO clusters (run, label, size, zone, centroid) VALUES (?, ?, ?, ?, ?)",
                [(run, c.label, c.size, c.zone, np.asarray(c.centroid, "<f4").tobytes()) for c in clusters],
            )
    finally:
        connection.close()
    assert run is not None
    return run


def load(path: str) -> list[DiscoveryRun]:
    """The runs that the store ``sqlite:path`` holds, oldest first; none in a store of before there were any.

    Raises PluginError where the store cannot be read.
    """
    connection = database.connect(path, read_only=True)
    try:
        with database.refusals(path):
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'discovery_runs'").fetchone():
                return []
            runs = connection.execute("SELECT id, created, parameters, records FROM discovery_runs ORDER BY id")
            return [_run(path, connection, *row) for row in runs.fetchall()]
    finally:
        connection.close()


def _run(path: str, connection: Any, number: int, created: Any, parameters: Any, records: Any) -> DiscoveryRun:
    try:
        _must("created", created, int)
        _must("records", records, int)
        _must("parameters", parameters, str)
        if not isinstance(content := untrusted.loads(parameters), dict):
            raise ValueError(f"parameters are {parameters[:60]!r}, no JSON object")
        return DiscoveryRun(number, created, content, records, _clusters(connection, number))
    except ValueError as error:
        raise PluginError(
            f"sqlite:{path}: a discovery run is damaged: run {number}: {error}; remove it from discovery_runs"
        ) from error


def _clusters(connection: Any, run: int) -> tuple[Cluster, ...]:
    rows = connection.execute("SELECT label, size, zone, centroid FROM clusters WHERE run = ? ORDER BY label", (run,))
    found = []
    for label, size, zone, data in rows:
        for name, value, kind in (("label", label, int), ("size", size, int), ("zone", zone, str)):
            _must(name, value, kind)
        if not isinstance(data, bytes) or len(data) != 4 * fp.SIZE:
            raise ValueError(f"the centroid of cluster {label} is {str(data)[:60]!r}, not {4 * fp.SIZE} bytes")
        found.append(Cluster(label, size, zone, np.frombuffer(data, "<f4")))
    return tuple(found)


def _must(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {str(value)[:60]!r} of type {type(value).__name__}, not {kind.__name__}")
