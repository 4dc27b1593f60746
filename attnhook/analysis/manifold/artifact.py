"""The folder that a discovery leaves, and how it is checked before anything of it is used.

``manifest.json`` names the format, versions, settings, quality, and the SHA-256 of every other file; the map itself
is ``model.npz``, plain arrays that are read without pickle, so that loading an artifact runs nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from attnhook import __version__
from attnhook.analysis.manifold.model import Model
from attnhook.errors import PluginError, RecordError, install
from attnhook.record import fingerprint as fp
from attnhook.system import untrusted

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.npz"
RUN = "run.json"  # when and how long: not part of what two runs have in common, and not hashed
_LIBRARIES = ("numpy", "scipy", "scikit-learn", "umap-learn", "hdbscan", "numba", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of attnhook and of every library that the numbers depend on."""
    found = {"attnhook": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise PluginError(f"attnhook discover needs {name}: {install('analysis')}") from error
    return found


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block has ended well; else nothing is left of it."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON, indented, with sorted keys: the same value is the same bytes."""
    with written(path) as file:
        file.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as an npz file, the same arrays as the same bytes."""
    with written(path) as name, open(name, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes its flag for one of the arrays


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file; RecordError where it is none, unpacks to too much or holds anything but numbers."""
    try:
        return untrusted.arrays(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} holds no plain arrays: {error}; run attnhook discover again") from error


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while part := file.read(2**20):
        digest.update(part)
    return digest.hexdigest()


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own ``digest`` left out."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its version checked, its files not.

    Raises PluginError where there is none, RecordError where it is damaged or of a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = untrusted.load(path)
    except FileNotFoundError as error:
        raise PluginError(f"{folder} holds no discovery: {MANIFEST} is missing; make one with attnhook discover") from (
            error
        )
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}; run attnhook discover again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise RecordError(f"{path} is no manifest of a discovery: its format is missing; run attnhook discover again")
    if manifest["format"] != FORMAT:
        raise RecordError(f"{path} has format {manifest['format']}; this attnhook reads {FORMAT}: upgrade attnhook")
    if manifest.get("digest") != digest(manifest):
        raise RecordError(
            f"{path} was changed after it was written: its digest does not fit; run attnhook discover again"
        )
    schema = manifest.get("fingerprint_schema")
    if schema != fp.SCHEMA_VERSION:
        raise RecordError(
            f"{path} was fitted on fingerprints of schema {schema}; this attnhook makes {fp.SCHEMA_VERSION}: run "
            "attnhook discover again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or MODEL not in files or not isinstance(manifest.get("clusters"), list):
        raise RecordError(f"{path} lacks its files or clusters; run attnhook discover again")
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any], names: list[str] | None = None) -> None:
    """Compare files (default: all) with the manifest's hashes; RecordError names the first that differs."""
    for name in manifest["files"] if names is None else names:
        if Path(name).name != name:
            raise RecordError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise RecordError(f"{folder / name} cannot be read: {error}; run attnhook discover again") from error
        if found != manifest["files"][name]:
            raise RecordError(
                f"{folder / name} is not what {MANIFEST} says: its SHA-256 is {found[:16]}..., wanted "
                f"{str(manifest['files'][name])[:16]}...; it was changed or damaged: run attnhook discover again"
            )


def load(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The map of an artifact and its manifest, both checked.

    Raises PluginError where there is none, RecordError where it is damaged, tampered with or of a newer format.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, [MODEL])
    model = Model.from_arrays(read_arrays(folder / MODEL))
    if model.labels.max(initial=-1) >= len(manifest["clusters"]):
        raise RecordError(f"{folder}: the map has clusters that {MANIFEST} does not; run attnhook discover again")
    return model.ready(), manifest
