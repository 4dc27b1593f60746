"""Parts: archives of Python packages, cut into files that can be carried one at a time, and their checksums.

An archive is a ``.tar.xz`` with one folder of packages; ``manifest.json`` names its files and their SHA-256. Packing
and unpacking need only the standard library.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

MANIFEST = "manifest.json"
FOLDER = Path(__file__).parents[2] / ".gpu-parts"  # ignored by git
PART_BYTES = 60 << 20
_MARK = ".unpacked"


class PartError(Exception):
    """An archive that cannot be unpacked: a file is missing or is not what was packed."""


@dataclass
class Archive:
    """One archive: its files in order, each with its checksum."""

    name: str
    files: dict[str, str]  # file -> SHA-256
    packed_bytes: int
    bytes: int  # unpacked
    versions: dict[str, str] = field(default_factory=dict)  # distribution -> version


def pack(name: str, root: Path, out: Path, versions: dict[str, str], part_bytes: int = PART_BYTES) -> Archive:
    """Write everything under ``root`` to files of at most ``part_bytes`` in ``out``."""
    for old in out.glob(f"{name}.tar.xz.*"):
        old.unlink()
    packed = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                total += path.stat().st_size
                tar.add(path, path.relative_to(root).as_posix(), recursive=False)
    data = packed.getbuffer()
    files = {}
    for n, start in enumerate(range(0, len(data), part_bytes)):
        piece = data[start : start + part_bytes]
        file = f"{name}.tar.xz.{n}"
        (out / file).write_bytes(piece)
        files[file] = hashlib.sha256(piece).hexdigest()
    return Archive(name, files, len(data), total, versions)


def write_manifest(archives: Iterable[Archive], out: Path) -> None:
    """Write ``manifest.json``."""
    text = json.dumps({archive.name: asdict(archive) for archive in archives}, indent=1)
    (out / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Archive]:
    """Archives by name; empty where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    return {name: Archive(**told) for name, told in json.loads(path.read_text(encoding="utf-8")).items()}


def unpack(archive: Archive, folder: Path, target: Path) -> bool:
    """Unpack an archive into the folder ``target``, unless that is done; whether it was to be done.

    Raises PartError where a file is missing or is not what was packed; ``target`` is then as it was.
    """
    mark = target / _MARK
    state = json.dumps(archive.files, sort_keys=True)
    if mark.exists() and mark.read_text(encoding="utf-8") == state:
        return False
    missing = [file for file in archive.files if not (folder / file).exists()]
    if missing:
        raise PartError(f"{', '.join(missing)} not in {folder}: carry it here, or pack it with tools/gpu_pack.sh")
    for file, expected in archive.files.items():
        found = _sha256(folder / file)
        if found != expected:
            raise PartError(
                f"{folder / file} has the SHA-256 {found[:12]}…, {MANIFEST} says {expected[:12]}…: carry it again"
            )
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    joined = io.BufferedReader(_Joined(folder / file for file in archive.files))
    with tarfile.open(fileobj=joined, mode="r|xz") as tar:
        tar.extractall(target, filter="data")
    mark.write_text(state, encoding="utf-8")
    return True


def is_unpacked(target: Path) -> bool:
    """Whether an archive, of this call or an earlier one, has been unpacked whole into a folder."""
    return (target / _MARK).exists()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Joined(io.RawIOBase):
    """The bytes of several files, one after the other."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: Iterator[bytes] = (piece for path in paths for piece in _pieces(path))
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = next(self._pieces, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
