"""examples/: they run as they are printed, and tell the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from attnhook.sinks.opening import open_sink
from tests.helpers import ROOT, environment
from tests.sinks.samples import lean

SCRIPT = ROOT / "examples" / "read_parquet.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, float]]]:
    """A data set of several files and models, and what is true of it."""
    path = tmp_path_factory.mktemp("data") / "records"
    records = [lean(i, model=f"org/m{i % 3}") for i in range(600)]
    sink = open_sink(f"parquet:{path}")
    for start in range(0, 600, 200):
        sink.write(records[start : start + 200])
        sink.publish()
    sink.close()
    counts = Counter(record.zone for record in records)
    entropy = {zone: float(np.mean([float(r.fingerprint[3]) for r in records if r.zone == zone])) for zone in counts}
    assert len(counts) >= 3
    return path, {zone: (counts[zone], entropy[zone]) for zone in counts}


def _run(path: Path, *arguments: str) -> dict[str, tuple[int, float]]:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(RAY_USAGE_STATS_ENABLED="0"),
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {row["zone"]: (row["rows"], row["entropy"]) for row in rows}


def test_duckdb_reads_a_data_set(dataset):
    path, expected = dataset
    found = _run(path, "--engine", "duckdb")
    assert {zone: (rows, pytest.approx(entropy)) for zone, (rows, entropy) in found.items()} == expected


@pytest.mark.slow
def test_ray_data_reads_it_with_two_workers(dataset):
    path, expected = dataset
    found = _run(path, "--engine", "ray", "--workers", "2")
    assert {zone: (rows, pytest.approx(entropy)) for zone, (rows, entropy) in found.items()} == expected


@pytest.mark.slow
def test_spark_reads_it(dataset):
    pytest.importorskip("pyspark", reason="pyspark (hundreds of MB) is not installed here")
    path, expected = dataset
    found = _run(path, "--engine", "spark")
    assert {zone: (rows, pytest.approx(entropy)) for zone, (rows, entropy) in found.items()} == expected
