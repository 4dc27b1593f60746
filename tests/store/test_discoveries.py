"""Discovery runs and their clusters, kept beside the records that they were found in."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from attnhook.errors import PluginError, RecordError
from attnhook.sinks.opening import open_sink
from attnhook.store import discoveries
from attnhook.store.discoveries import Cluster
from tests.sinks.samples import lean


@pytest.fixture
def path(tmp_path):
    sink = open_sink(f"sqlite:{tmp_path}/records.db")
    sink.write([lean(i) for i in range(10)])
    sink.close()
    return str(tmp_path / "records.db")


def test_runs_come_back_as_they_were_saved(path):
    assert discoveries.load(path) == []
    found = [Cluster(1, 4, lean(1).zone, lean(1).fingerprint), Cluster(-1, 6, "diffuse", lean(2).fingerprint)]
    first = discoveries.save(path, {"seed": 7, "model": "m"}, 10, found)
    second = discoveries.save(path, {}, 0, [])
    one, other = discoveries.load(path)
    assert (one.id, one.parameters, one.records) == (first, {"seed": 7, "model": "m"}, 10)
    assert [(c.label, c.size, c.zone) for c in one.clusters] == [(-1, 6, "diffuse"), (1, 4, lean(1).zone)]
    np.testing.assert_array_equal(one.clusters[1].centroid, lean(1).fingerprint)
    assert (other.id, other.clusters) == (second, ())
    assert other.created >= one.created > 0


def test_a_run_is_saved_whole_or_not_at_all(path):
    good = Cluster(1, 4, "diffuse", lean(1).fingerprint)
    with pytest.raises(RecordError, match=r"cluster 2: its centroid has shape \(3,\); it must be \(20,\)"):
        discoveries.save(path, {}, 1, [good, Cluster(2, 1, "diffuse", np.zeros(3))])
    with pytest.raises(PluginError, match="UNIQUE"):
        discoveries.save(path, {}, 1, [good, good])
    with pytest.raises(TypeError):
        discoveries.save(path, {"a": object()}, 1, [good])
    assert discoveries.load(path) == []


def test_a_damaged_run_is_named(path):
    discoveries.save(path, {}, 1, [])
    connection = sqlite3.connect(path)
    connection.execute("UPDATE discovery_runs SET parameters = '{'")
    connection.commit()
    connection.close()
    with pytest.raises(PluginError, match="a discovery run is damaged"):
        discoveries.load(path)
