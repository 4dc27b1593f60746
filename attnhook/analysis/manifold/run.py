"""A discovery from a store to a folder of artifacts, stage by stage, resumable after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from attnhook.analysis.manifold import artifact, stages
from attnhook.analysis.manifold.checkpoint import Checkpoint
from attnhook.analysis.manifold.settings import Settings
from attnhook.errors import AttnhookError, OptionError
from attnhook.record import fingerprint as fp

#: Name and function of each stage, in order.
STAGES: tuple[tuple[str, Callable[[stages.Job], list[Path]]], ...] = (
    ("read", stages.read),
    ("components", stages.components),
    ("sample", stages.sample),
    ("embed", stages.embed),
    ("cluster", stages.cluster),
    ("assign", stages.assign),
    ("measure", stages.measure),
    ("picture", stages.draw),
)

#: Told the stage, and how much of how much of it is done; (stage, 0, 0) at its begin.
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Discovery:
    """What a run left: the folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def discover(
    url: str,
    out: Path,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Discovery:
    """Find the kinds of attention in the store ``url`` and write what was found to the folder ``out``.

    The same store, settings and versions give the same files, to the byte, however often the run was interrupted
    and resumed; only ``run.json`` tells them apart. Until all is made, ``out`` is as it was and the work is in
    ``out`` with ``.partial`` added. Memory does not grow with the store, but for some tens of bytes a row.

    Parameters
    ----------
    url
        A store, as for `attnhook.store.open_store`.
    out
        A folder that does not exist or is empty, unless ``force`` replaces it.
    resume
        Go on with an unfinished run, if there is one.
    force
        Replace what is in ``out`` when the new artifacts are complete, and discard an unfinished run.

    Raises
    ------
    OptionError
        Too few fingerprints, all alike, or of several models; ``out`` not empty; ``resume`` with other settings.
    RecordError
        A damaged fingerprint or store.
    AttnhookError
        No room for the files; nothing but the unfinished run is left.
    """
    settings = settings or Settings()
    identity = {"store": url, "format": artifact.FORMAT, **stages.described(settings), "versions": artifact.versions()}
    checkpoint = Checkpoint(out, identity, resume=resume, force=force)
    try:
        if checkpoint.published:
            manifest = artifact.read_manifest(out)
        else:
            manifest = _stages(stages.Job(url, settings, checkpoint.folder, lambda *_: None), checkpoint, progress)
        checkpoint.publish()
    except AttnhookError as error:
        if isinstance(error, OptionError) or not checkpoint.done:
            checkpoint.discard()  # the store or the settings must change, so there is nothing to go on with
        raise
    except OSError as error:
        raise AttnhookError(
            f"{checkpoint.folder} cannot be written: {error}; {out} is as it was. Make room and go on with --resume"
        ) from error
    finally:
        checkpoint.close()
    return Discovery(out, manifest)


def _stages(job: stages.Job, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    begun = datetime.now(timezone.utc)
    seconds: dict[str, float] = {}
    for name, work in STAGES:
        if name in checkpoint.done:
            continue
        start = time.perf_counter()
        progress(name, 0, 0)
        told = replace(job, progress=partial(progress, name))
        checkpoint.finish(name, work(told))
        seconds[name] = round(time.perf_counter() - start, 3)
    progress("publish", 0, 0)
    folder = job.artifact
    files = (artifact.MODEL, stages.POINTS, stages.ASSIGNMENTS, stages.CLUSTERS, stages.PNG, stages.HTML)
    read, clusters = job.json("read.json"), job.json("clusters.json")
    manifest = {
        "format": artifact.FORMAT,
        "fingerprint_schema": fp.SCHEMA_VERSION,
        "versions": artifact.versions(),
        "store": job.url,
        "settings": stages.described(job.settings),
        "rows": read["rows"],
        "models": read["models"],
        "without_sink": read["without_sink"],
        "strata": len(read["strata"]),
        "sample": len(job.arrays("sample.npz")["index"]),
        "columns": {"constant": _constant(job), "components": len(job.arrays("components.npz")["share"])},
        "clusters": clusters["clusters"],
        "quality": job.json("quality.json"),
        "files": {name: artifact.sha256(folder / name) for name in files},
    }
    manifest["digest"] = artifact.digest(manifest)
    artifact.write_json(folder / artifact.RUN, {"begun": begun.isoformat(timespec="seconds"), "seconds": seconds})
    artifact.write_json(folder / artifact.MANIFEST, manifest)
    return manifest


def _constant(job: stages.Job) -> list[str]:
    """Names of the columns that do not vary and are left out."""
    scale = job.arrays("components.npz")["scale"]
    return [name for name, value in zip(fp.NAMES, scale.tolist(), strict=True) if value == 0]
