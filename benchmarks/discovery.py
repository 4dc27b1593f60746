"""``attnhook discover`` against plain umap-learn + hdbscan on every fingerprint; memory; the classifier's rate.

Both get the same store and end with a place and a cluster for every row, each as a process of its own, start and
imports included. Plain is what a notebook does: read, StandardScaler, UMAP without a seed (so that it uses all
cores), HDBSCAN on the map, with the same neighbours, minimal distance and smallest cluster (as a share of the rows).
attnhook's command does more: it measures quality, refits for stability, and draws; it is timed whole. Both maps are
judged on the same rows, by scripts that neither of them runs.

    python -m benchmarks.discovery                        # 129,254 made-up fingerprints, then 1,000,000
    python -m benchmarks.discovery --store sqlite:x.db    # what a store holds, in place of the made-up ones
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from attnhook.analysis.classify import FingerprintClassifier
from attnhook.analysis.manifold.quality import agreement, trustworthiness
from attnhook.analysis.manifold.settings import Settings
from attnhook.record.arrow import fingerprints_of
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from benchmarks.planted import planted

PUBLISHED = 129_254  # fingerprints of the published exploration of an 80B model
LIBRARIES = ("numpy", "scipy", "scikit-learn", "umap-learn", "hdbscan", "numba", "pyarrow")


def make_store(url: str, count: int, seed: int) -> None:
    """A parquet: store of made-up fingerprints; a row's request id begins with its kind."""
    fingerprints, kinds = planted(count, seed=seed)
    none, scores, spans = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32), np.zeros((1, 0), np.float32)
    sink = open_sink(url)
    for start in range(0, count, 16384):
        batch = [
            TokenRecord(
                request_id=f"{kinds[i]}-chatcmpl-{i // 200:08x}",
                query_position=2048 + i % 200,
                layers=(29,),
                token_positions=none,
                attention_scores=scores,
                fingerprints=fingerprints[i : i + 1],
                decode_step=i % 200,
                mode="fingerprint",
                model="made-up",
                span_mass=spans,
            )
            for i in range(start, min(start + 16384, count))
        ]
        sink.write(batch)
        sink.flush()
    sink.close()


def plain(url: str, out: Path) -> None:
    """The notebook's way; leaves ``plain.npz`` in the folder."""
    import hdbscan  # type: ignore[import-untyped]
    import umap  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    settings = Settings()
    with open_store(url) as store:
        rows = np.concatenate([fingerprints_of(batch) for batch in store.fingerprints(columns=("fingerprint",))])
    standardised = StandardScaler().fit_transform(rows)
    mapper = umap.UMAP(n_neighbors=settings.neighbours, min_dist=settings.min_distance)
    xy = mapper.fit_transform(standardised)
    labels = hdbscan.HDBSCAN(min_cluster_size=settings.min_cluster(len(rows))).fit_predict(xy)
    np.savez(out / "plain.npz", xy=xy, labels=labels)


def process(*arguments: str, limit: float) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and peak MiB of a Python process, start to end."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if done:
            break
        if seconds > limit:
            child.kill()
            os.wait4(child.pid, 0)
            raise SystemExit(f"{' '.join(arguments)} took more than {limit:g} seconds: raise --limit")
        time.sleep(0.02)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def discover(url: str, out: Path, limit: float) -> tuple[float, float, float]:
    """The command, whole."""
    code = "from attnhook.cli.app import main; main()"
    return process("-c", code, "discover", url, "--out", str(out), limit=limit)


def known_kinds(ids: list[str], packs: list[str | None]) -> np.ndarray | None:
    """What each row is of: its planted kind or its probe's pack; None where that is not known."""
    if all(pack is not None for pack in packs):
        return np.array(packs)
    if all("-chatcmpl-" in one for one in ids):
        return np.array([one.partition("-")[0] for one in ids])
    return None


def compare(url: str, folder: Path, limit: float) -> None:
    """Both ways in turn, and their table."""
    ours_seconds, ours_work, ours_memory = discover(url, folder / "ours", limit)
    plain_seconds, plain_work, plain_memory = process(
        "-m", "benchmarks.discovery", "--plain", url, "--out", str(folder), limit=limit
    )
    points = pq.read_table(folder / "ours" / "points.parquet")
    batch = points.combine_chunks().to_batches()[0]
    rows = fingerprints_of(batch).astype(np.float64)
    ours = np.stack([batch.column(name).to_numpy() for name in ("x", "y")], axis=1)
    labels = pq.read_table(folder / "ours" / "assignments.parquet")["cluster"].to_numpy()
    with np.load(folder / "plain.npz", allow_pickle=False) as file:
        theirs, their_labels = file["xy"], file["labels"]
    assert len(rows) == len(theirs) == len(labels)
    deviation = rows.std(axis=0)
    standardised = (rows - rows.mean(axis=0)) / np.where(deviation > 1e-5, deviation, np.inf)
    kinds = known_kinds(points["request_id"].to_pylist(), points["pack"].to_pylist())
    scores: dict[str, list[float]] = {"ours": [], "plain": []}
    for seed in range(3):
        judged = np.random.default_rng(1000 + seed).choice(len(rows), min(5000, len(rows)), replace=False)
        for name, xy in (("ours", ours), ("plain", theirs)):
            scores[name].append(trustworthiness(standardised[judged], xy[judged]))
    manifest = json.loads((folder / "ours" / "manifest.json").read_text())
    stages = json.loads((folder / "ours" / "run.json").read_text())["seconds"]
    print(f"\n## {len(rows):,} fingerprints, end to end\n")
    print(
        "| | seconds | of processor | peak MiB | clusters | in none | trustworthiness | ARI, planted kinds or packs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, seconds, work, memory, found, key in (
        ("umap-learn + hdbscan on all", plain_seconds, plain_work, plain_memory, their_labels, "plain"),
        (f"attnhook discover ({manifest['sample']:,} fitted)", ours_seconds, ours_work, ours_memory, labels, "ours"),
    ):
        ari = "-" if kinds is None else f"{agreement(kinds, found):.4f}"
        trust = f"{statistics.mean(scores[key]):.4f} ({min(scores[key]):.4f} to {max(scores[key]):.4f})"
        noise = f"{(found < 0).mean():.2%}"
        print(f"| {name} | {seconds:.1f} | {work:.1f} | {memory:.0f} | {found.max() + 1} | {noise} | {trust} | {ari} |")
    sys.stdout.flush()
    times, work_times = plain_seconds / ours_seconds, plain_work / ours_work
    print(f"\nplain / attnhook: {times:.2f} times the time, {work_times:.2f} times the processor's.", end=" ")
    print(f"ARI between the two: {agreement(labels, their_labels):.4f}.")
    print(f"Seconds in attnhook's stages: {', '.join(f'{k} {v:.1f}' for k, v in stages.items())}.")
    fitted = sum(stages[k] for k in ("read", "components", "sample", "embed", "cluster", "assign"))
    print(f"Those up to the assignments, which is what plain does: {fitted:.1f} seconds, imports included.")


def million(count: int, folder: Path, limit: float) -> None:
    """Time and memory of a large store."""
    url = f"parquet:{folder / 'large'}"
    make_store(url, count, 1)
    seconds, _, memory = discover(url, folder / "large-out", limit)
    manifest = json.loads((folder / "large-out" / "manifest.json").read_text())
    assert manifest["rows"] == count
    ids = pq.read_table(folder / "large-out" / "points.parquet", columns=["request_id"])["request_id"].to_pylist()
    labels = pq.read_table(folder / "large-out" / "assignments.parquet")["cluster"].to_numpy()
    kinds = np.array([one.partition("-")[0] for one in ids])
    print(f"\n## {count:,} fingerprints\n\n| seconds | peak MiB | ARI with what was planted |\n| --- | --- | --- |")
    print(f"| {seconds:.1f} | {memory:.0f} | {agreement(kinds, labels):.4f} |")


def rate(folder: Path, count: int = 200_000) -> None:
    """Fingerprints a second of the classifier; what it says is what the batch run said."""
    rows: Any = planted(count, seed=2)[0]
    print(
        "\n## Classifier\n\n| threads | a call | fingerprints a second, median of 5 | range | a second of processor |"
    )
    print("| --- | --- | --- | --- | --- |")
    for workers in (1, os.cpu_count() or 1):
        classifier = FingerprintClassifier(folder / "ours", workers=workers)
        classifier.places(rows[:1000])
        for size in (256, 8192, count):
            rates, work = [], time.process_time()
            for _ in range(5):
                start = time.perf_counter()
                for at in range(0, count, size):
                    classifier.places(rows[at : at + size])
                rates.append(count / (time.perf_counter() - start))
            work = time.process_time() - work
            each, spread = statistics.median(rates), f"{min(rates):,.0f} to {max(rates):,.0f}"
            print(f"| {workers} | {size:,} | {each:,.0f} | {spread} | {5 * count / work:,.0f} |")
    stored = pq.read_table(folder / "ours" / "points.parquet").combine_chunks().to_batches()[0]
    batch = pq.read_table(folder / "ours" / "assignments.parquet")
    found = FingerprintClassifier(folder / "ours").places(fingerprints_of(stored))
    same = np.array_equal(found.cluster, batch["cluster"].to_numpy())
    same &= np.array_equal(found.probability, batch["probability"].to_numpy())
    print(f"\nSame cluster and probability as the batch run for all {stored.num_rows:,} stored rows: {same}.")
    assert same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=PUBLISHED, help="made-up fingerprints of the comparison")
    parser.add_argument("--large", type=int, default=1_000_000, help="made-up fingerprints of the second run; 0: none")
    parser.add_argument("--store", help="compare on this store in place of made-up fingerprints")
    parser.add_argument("--limit", type=float, default=3600, help="most seconds that one process may take")
    parser.add_argument("--plain", metavar="STORE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain(arguments.plain, arguments.out)
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; ", end="")
    print(f"Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = arguments.store
        if url is None:
            url = f"parquet:{folder / 'store'}"
            make_store(url, arguments.rows, 0)
        compare(url, folder, arguments.limit)
        rate(folder)
        sys.stdout.flush()
        if arguments.large:
            million(arguments.large, folder, arguments.limit)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
