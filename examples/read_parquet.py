"""Count zones and mean entropy in a Parquet data set of fingerprints, with DuckDB, Ray Data or Spark.

    python examples/read_parquet.py records --engine duckdb
    python examples/read_parquet.py records --engine ray --workers 4
    python examples/read_parquet.py records --engine spark --workers 4

DuckDB reads it on one machine, on all cores. Ray Data spreads the files over the workers of a cluster; the same
script runs on one machine, with as many workers as you name. Spark (pyspark, and Java 17 or newer) does too. All print
the same table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ENTROPY = 3  # its place in a fingerprint, see attnhook.record.fingerprint


def with_duckdb(folder: str) -> dict[str, dict[str, float]]:
    """Rows and mean entropy of each zone."""
    import duckdb

    # DuckDB counts list places from 1; a path s3://bucket/... works after: INSTALL httpfs; LOAD httpfs
    rows = duckdb.execute(
        f"""
        SELECT zone, count(*), avg(fingerprint[{ENTROPY + 1}])
        FROM read_parquet(?, hive_partitioning = true)
        GROUP BY zone
        """,
        [f"{folder}/**/*.parquet"],
    ).fetchall()
    return {zone: {"rows": count, "entropy": entropy} for zone, count, entropy in rows}


def with_ray(folder: str, workers: int) -> dict[str, dict[str, float]]:
    """The same by Ray Data: every file is reduced where it is read, only the sums travel."""
    import numpy as np
    import pyarrow as pa
    import ray

    def sums(table: pa.Table) -> pa.Table:
        flat = table["fingerprint"].combine_chunks().flatten().to_numpy()
        entropy = flat.reshape(table.num_rows, -1)[:, ENTROPY].astype(np.float64)
        part = pa.table({"zone": table["zone"], "entropy": entropy})
        return part.group_by("zone").aggregate([([], "count_all"), ("entropy", "sum")])

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    files = [str(path) for path in sorted(Path(folder).rglob("*.parquet"))]
    parts = (
        ray.data.read_parquet(files, columns=["zone", "fingerprint"], partitioning=None)
        .map_batches(sums, batch_format="pyarrow", batch_size=None, concurrency=workers)
        .take_all()
    )
    found: dict[str, dict[str, float]] = {}
    for part in parts:
        zone = found.setdefault(part["zone"], {"rows": 0, "entropy": 0.0})
        zone["rows"] += part["count_all"]
        zone["entropy"] += part["entropy_sum"]
    for zone in found.values():
        zone["entropy"] /= zone["rows"]
    return found


def with_spark(folder: str, workers: int) -> dict[str, dict[str, float]]:
    """The same by Spark, here on this machine; with ``spark-submit`` on a cluster."""
    from pyspark.sql import SparkSession, functions

    session = (
        SparkSession.builder.master(f"local[{workers}]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    try:
        table = session.read.parquet(folder)
        entropy = functions.avg(functions.col("fingerprint")[ENTROPY])
        rows = table.groupBy("zone").agg(functions.count("*"), entropy).collect()
    finally:
        session.stop()
    return {zone: {"rows": count, "entropy": mean} for zone, count, mean in rows}


def main() -> None:
    """Print one JSON object per zone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what stands behind parquet: in the sink's URL")
    parser.add_argument("--engine", choices=("duckdb", "ray", "spark"), default="duckdb")
    parser.add_argument("--workers", type=int, default=2, help="workers of Ray or Spark")
    arguments = parser.parse_args()
    found: dict[str, Any]
    if arguments.engine == "duckdb":
        found = with_duckdb(arguments.folder)
    elif arguments.engine == "ray":
        found = with_ray(arguments.folder, arguments.workers)
    else:
        found = with_spark(arguments.folder, arguments.workers)
    for zone, values in sorted(found.items()):
        print(json.dumps({"zone": zone, **values}))


if __name__ == "__main__":
    main()
