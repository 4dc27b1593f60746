"""The stages of a discovery: each makes files from those of the stages before it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnhook.analysis.explain import sentence
from attnhook.analysis.manifold import artifact, fit, picture, quality, source
from attnhook.analysis.manifold.model import Model
from attnhook.analysis.manifold.settings import Settings
from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import fingerprints_of
from attnhook.record.zones import ZONE_NAMES, classify_many
from attnhook.system import untrusted

POINTS, ASSIGNMENTS, CLUSTERS = "points.parquet", "assignments.parquet", "clusters.parquet"
PNG, HTML = "map.png", "map.html"


@dataclass(frozen=True)
class Job:
    """What a stage works on: the store's URL, what was asked for, and the folder of the checkpoint."""

    url: str
    settings: Settings
    folder: Path
    progress: Callable[[int, int], object]

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.parquet"

    def json(self, name: str) -> Any:
        """What an earlier stage noted."""
        try:
            return untrusted.load(self.folder / name)
        except (OSError, ValueError) as error:
            raise RecordError(f"{self.folder / name} cannot be read: {error}; begin anew with --force") from error

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What an earlier stage computed."""
        return artifact.read_arrays(self.folder / name)


def read(job: Job) -> list[Path]:
    """Freeze the rows."""
    with artifact.written(job.rows) as name:
        found = source.copy(job.url, name, job.settings, job.progress)
    artifact.write_json(job.folder / "read.json", found)
    return [job.rows, job.folder / "read.json"]


def components(job: Job) -> list[Path]:
    """Standardisation and principal components, from all rows."""
    total, done = job.json("read.json")["rows"], 0

    def batches() -> Any:
        nonlocal done
        for batch in source.chunks(job.rows, ["fingerprint"]):
            yield fingerprints_of(batch)
            done += batch.num_rows
            job.progress(done, total)

    found = fit.components(batches(), job.settings.variance)
    target = job.folder / "components.npz"
    artifact.write_arrays(target, asdict_arrays(found))
    return [target]


def sample(job: Job) -> list[Path]:
    """The rows that the map is fitted on."""
    index, fingerprints = source.sample(job.rows, job.settings)
    points = _components(job).project(fingerprints)
    fit.check_distinct(points)
    target = job.folder / "sample.npz"
    artifact.write_arrays(target, {"index": index, "points": points})
    return [target]


def embed(job: Job) -> list[Path]:
    """The map of the sample."""
    target = job.folder / "embed.npz"
    embedding = fit.embed(job.arrays("sample.npz")["points"], job.settings, job.settings.seed)
    artifact.write_arrays(target, {"embedding": embedding})
    return [target]


def cluster(job: Job) -> list[Path]:
    """The clusters of the map, and with them the whole model."""
    embedding = job.arrays("embed.npz")["embedding"]
    labels, memberships, validity = fit.cluster(embedding, job.settings)
    model = Model(_components(job), job.arrays("sample.npz")["points"], embedding, labels, memberships)
    target = job.artifact / artifact.MODEL
    artifact.write_arrays(target, model.arrays())
    noted = {"dbcv": validity, "found": int(labels.max(initial=-1)) + 1, "sample_noise": float((labels < 0).mean())}
    artifact.write_json(job.folder / "cluster.json", noted)
    return [target, job.folder / "cluster.json"]


def assign(job: Job) -> list[Path]:
    """Place, cluster and zone of every row; what each cluster is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = _model(job)
    count = job.json("cluster.json")["found"]
    total = job.json("read.json")["rows"]
    sampled = np.zeros(total, bool)
    sampled[job.arrays("sample.npz")["index"]] = True
    tally = _Tally(count)
    points, assignments = job.artifact / POINTS, job.artifact / ASSIGNMENTS
    start = 0
    with artifact.written(points) as first, artifact.written(assignments) as second:
        writers: list[Any] = []
        try:
            for batch in source.chunks(job.rows):
                prints = fingerprints_of(batch)
                # the data were checked when they were read
                places, (zones, confidence) = model.place(prints, workers=-1), classify_many(prints)
                numbers = np.arange(start, start + len(prints))
                own = batch.drop_columns(["stratum", "fingerprint"])
                left = own.append_column("x", pa.array(places.xy[:, 0])).append_column("y", pa.array(places.xy[:, 1]))
                left = left.append_column("sampled", pa.array(sampled[numbers]))
                left = left.append_column("fingerprint", batch.column("fingerprint"))
                right = pa.record_batch(
                    {
                        "row": pa.array(numbers),
                        "cluster": pa.array(places.cluster),
                        "probability": pa.array(places.probability),
                        "far": pa.array(places.far),
                        "zone": pa.DictionaryArray.from_arrays(pa.array(zones), pa.array(ZONE_NAMES)),
                        "zone_confidence": pa.array(confidence),
                    }
                )
                if not writers:
                    writers += [pq.ParquetWriter(first, left.schema), pq.ParquetWriter(second, right.schema)]
                writers[0].write_batch(left)
                writers[1].write_batch(right)
                tally.add(prints, places.cluster, places.probability, zones, batch.column("pack").to_pylist())
                start += len(prints)
                job.progress(start, total)
        finally:
            for writer in writers:
                writer.close()
    rows = tally.rows(model, total)
    target = job.artifact / CLUSTERS
    with artifact.written(target) as name:
        pq.write_table(pa.Table.from_pylist(rows, schema=_cluster_schema()), name)
    artifact.write_json(job.folder / "clusters.json", {"clusters": rows, "noise": tally.noise, "rows": total})
    return [points, assignments, target, job.folder / "clusters.json"]


def measure(job: Job) -> list[Path]:
    """The figures of the manifest."""
    model = _model(job)
    total = job.json("read.json")["rows"]
    rows = quality.evaluation_rows(total, job.settings.seed)
    points = _picked(job.artifact / POINTS, rows, ["x", "y", "fingerprint"])
    own = _picked(job.artifact / ASSIGNMENTS, rows, ["cluster"])
    prints = fingerprints_of(points)
    xy = np.stack([points.column(name).to_numpy() for name in ("x", "y")], axis=1)
    clusters, zones, packs, layers, octaves = _labels(job)
    known = np.array([pack is not None for pack in packs], bool)
    found = job.json("cluster.json")
    noted = {
        "evaluated": len(rows),
        "trustworthiness": quality.trustworthiness(model.components.standardise(prints), xy),
        "dbcv": found["dbcv"],
        "silhouette": quality.silhouette(model.components.project(prints), own.column("cluster").to_numpy()),
        "noise": job.json("clusters.json")["noise"] / total,
        "noise_of_sample": found["sample_noise"],
        "explained_variance": float(model.components.share.sum()),
        "ari_zones": quality.agreement(clusters, zones),
        "ari_packs": quality.agreement(clusters[known], np.array(packs)[known].tolist()) if known.any() else None,
        "rows_with_pack": int(known.sum()),
        "ari_layers": quality.agreement(clusters, layers) if len(np.unique(layers)) > 1 else None,
        "ari_octaves": quality.agreement(clusters, octaves) if len(np.unique(octaves)) > 1 else None,
        "stability": quality.stability(model.points, model.labels, job.settings, job.progress),
    }
    target = job.folder / "quality.json"
    artifact.write_json(target, {k: round(v, 6) if isinstance(v, float) else v for k, v in noted.items()})
    return [target]


def draw(job: Job) -> list[Path]:
    """The map as PNG and HTML."""
    settings, clusters = job.settings, job.json("clusters.json")
    rows = picture.points_drawn(clusters["rows"], settings.seed)
    points = _picked(job.artifact / POINTS, rows, ["request_id", "choice", "query_position", "layer", "pack", "x", "y"])
    own = _picked(job.artifact / ASSIGNMENTS, rows, ["cluster", "zone"])
    xy = np.stack([points.column(name).to_numpy() for name in ("x", "y")], axis=1)
    labels, zones = own.column("cluster").to_numpy(), own.column("zone").indices.to_numpy()
    number = len(clusters["clusters"])
    read = job.json("read.json")
    sink = "without" if read["without_sink"] else "with"
    title = f"{', '.join(read['models'])}: {clusters['rows']:,} fingerprints {sink} the attention sink"
    figures = job.json("quality.json")
    noise = figures["noise"]
    text = (
        f"{number} clusters, {noise:.1%} in none; trustworthiness {figures['trustworthiness']:.3f}; "
        f"{len(rows):,} points shown; seed {settings.seed}"
    )
    png, page = job.artifact / PNG, job.artifact / HTML
    with artifact.written(png) as name:
        picture.png(name, xy, labels, zones, number, f"{title}\n{text}")
    keys = zip(*(points.column(name).to_pylist() for name in ("request_id", "choice", "query_position")), strict=True)
    shown = {
        "xy": xy,
        "cluster": labels,
        "zone": zones,
        "pack": points.column("pack").to_pylist(),
        "layer": points.column("layer").to_pylist(),
        "key": [f"{one} [{choice}] @ {position}" for one, choice, position in keys],
    }
    with artifact.written(page) as name:
        brief = [{k: c[k] for k in ("label", "share", "zone", "note")} for c in clusters["clusters"]]
        picture.page(name, shown, brief, {"title": title, "text": text})
    return [png, page]


def asdict_arrays(found: fit.Components) -> dict[str, np.ndarray]:
    """The arrays of the components by name."""
    return {name: getattr(found, name) for name in ("center", "scale", "directions", "variance", "share")}


def described(settings: Settings) -> dict[str, Any]:
    """Settings as JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


class _Tally:
    """What is added up over all rows, cluster by cluster."""

    def __init__(self, clusters: int) -> None:
        self.noise = 0
        self._size = np.zeros(clusters, np.int64)
        self._sum = np.zeros((clusters, fp.SIZE))
        self._belief = np.zeros(clusters)
        self._zones = np.zeros((clusters, len(ZONE_NAMES)), np.int64)
        self._packs: list[dict[str, int]] = [{} for _ in range(clusters)]

    def add(
        self, prints: np.ndarray, labels: np.ndarray, belief: np.ndarray, zones: np.ndarray, packs: list[str | None]
    ) -> None:
        self.noise += int((labels < 0).sum())
        for label in np.unique(labels[labels >= 0]).tolist():
            own = labels == label
            self._size[label] += own.sum()
            self._sum[label] += prints[own].sum(axis=0, dtype=np.float64)
            self._belief[label] += belief[own].sum(dtype=np.float64)
            self._zones[label] += np.bincount(zones[own], minlength=len(ZONE_NAMES))
            counts = self._packs[label]
            for i in np.flatnonzero(own).tolist():
                pack = packs[i]
                if pack is not None:
                    counts[pack] = counts.get(pack, 0) + 1

    def rows(self, model: Model, total: int) -> list[dict[str, Any]]:
        """A row for each cluster."""
        found = []
        for label in range(len(self._size)):
            size = int(self._size[label])
            centroid = (self._sum[label] / max(size, 1)).astype(np.float32)
            packs = sorted(self._packs[label].items(), key=lambda pair: (-pair[1], pair[0]))
            zone = int(self._zones[label].argmax())
            own = model.labels == label
            found.append(
                {
                    "label": label,
                    "size": size,
                    "share": size / total,
                    "sampled": int(own.sum()),
                    "probability": float(self._belief[label] / max(size, 1)),
                    "zone": ZONE_NAMES[zone],
                    "zone_share": float(self._zones[label, zone] / max(size, 1)),
                    "pack": packs[0][0] if packs else None,
                    "pack_share": packs[0][1] / size if packs else None,
                    "x": float(np.median(model.embedding[own, 0])),
                    "y": float(np.median(model.embedding[own, 1])),
                    "note": sentence(model.components, centroid, what="its mean"),
                    "centroid": [float(value) for value in centroid],
                }
            )
        return found


def _cluster_schema() -> Any:
    import pyarrow as pa

    numbers = {"label": pa.int32(), "size": pa.int64(), "sampled": pa.int64()}
    texts = {name: pa.string() for name in ("zone", "pack", "note")}
    order = (
        "label", "size", "share", "sampled", "probability", "zone", "zone_share", "pack", "pack_share", "x", "y", "note"
    )  # fmt: skip
    fields = [pa.field(name, {**numbers, **texts}.get(name, pa.float64())) for name in order]
    return pa.schema([*fields, pa.field("centroid", pa.list_(pa.float32(), fp.SIZE))])


def _components(job: Job) -> fit.Components:
    return fit.Components(**job.arrays("components.npz"))


def _model(job: Job) -> Model:
    return Model.from_arrays(artifact.read_arrays(job.artifact / artifact.MODEL))


def _picked(path: Path, rows: np.ndarray, columns: list[str]) -> Any:
    """The rows with these numbers, ascending, as one batch."""
    import pyarrow as pa

    found, start = [], 0
    for batch in source.chunks(path, columns):
        low, high = np.searchsorted(rows, [start, start + batch.num_rows])
        if high > low:
            found.append(batch.take(pa.array(rows[low:high] - start)))
        start += batch.num_rows
    return pa.Table.from_batches(found).combine_chunks().to_batches()[0]


def _labels(job: Job) -> tuple[np.ndarray, np.ndarray, list[str | None], np.ndarray, np.ndarray]:
    """Cluster, zone, pack, layer and the bin of position 0 of every row."""
    clusters, zones, packs, layers, octaves = [], [], list[str | None](), [], []
    for batch in source.chunks(job.artifact / ASSIGNMENTS, ["cluster", "zone"]):
        clusters.append(batch.column("cluster").to_numpy())
        zones.append(batch.column("zone").indices.to_numpy())
    for batch in source.chunks(job.artifact / POINTS, ["pack", "layer", "query_position"]):
        packs += batch.column("pack").to_pylist()
        layers.append(batch.column("layer").to_numpy())
        octaves.append(np.searchsorted(fp.BIN_STARTS, batch.column("query_position").to_numpy(), side="right"))
    return np.concatenate(clusters), np.concatenate(zones), packs, np.concatenate(layers), np.concatenate(octaves)
