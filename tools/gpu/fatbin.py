"""Make a CUDA library small for travelling: the machine code of other GPU architectures is taken out.

A shared library keeps its kernels in the ELF section ``.nv_fatbin``, one container after the other; a container
holds the same kernels for several architectures, each with a header of its own (the fields below are those that
``cuobjdump`` prints). A container is found by its address, so it stays where it is: its wanted entries move to its
front, its length becomes theirs, and what is left behind becomes zeros, which compress to nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SECTION = b".nv_fatbin"
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct(
    "<HHIQIIHHI"
)  # kind, -, bytes of this header, bytes of the code, -, -, minor, major, architecture
_ELF = 2  # machine code; 1 is PTX


@dataclass
class Kept:
    """What became of one library."""

    containers: int = 0
    kept: int = 0  # entries
    dropped: int = 0
    dropped_bytes: int = 0


class _Entry(NamedTuple):
    kind: int
    architecture: int
    start: int  # of its header
    stop: int


def keep_architecture(data: bytearray, architecture: int) -> Kept:
    """Take what other architectures run out of a library's bytes, in place; their number stays the same.

    A container without machine code for ``architecture`` (90 for sm_90) keeps everything: CUDA chooses there among
    older code and PTX. Raises ValueError where the section is not as described above.
    """
    told = Kept()
    start, size = _section(data)
    at, end = start, start + size
    while at + _CONTAINER.size <= end:
        magic, version, header, length = _CONTAINER.unpack_from(data, at)
        if magic == 0:  # alignment between containers
            at += 8
            continue
        if magic != _MAGIC or at + header + length > end:
            raise ValueError(f"{_SECTION.decode()}: no container at byte {at - start}, but {magic:#x}")
        told.containers += 1
        first, stop = at + header, at + header + length
        entries = _entries(data, first, stop)
        wanted = [entry for entry in entries if entry.kind == _ELF and entry.architecture == architecture]
        if wanted:
            code = b"".join(bytes(data[entry.start : entry.stop]) for entry in wanted)
            data[first:stop] = code + bytes(length - len(code))
            _CONTAINER.pack_into(data, at, magic, version, header, len(code))
            told.dropped += len(entries) - len(wanted)
            told.dropped_bytes += length - len(code)
        told.kept += len(wanted or entries)
        at += header + length
    return told


def _entries(data: bytearray, at: int, end: int) -> list[_Entry]:
    found = []
    while at < end:
        kind, _, header, size, _, _, _, _, architecture = _ENTRY.unpack_from(data, at)
        stop = at + header + size
        if header < _ENTRY.size or stop > end:
            raise ValueError(
                f"{_SECTION.decode()}: an entry of kind {kind} for sm_{architecture} ends behind its container"
            )
        found.append(_Entry(kind, architecture, at, stop))
        at = stop
    return found


def _section(data: bytearray) -> tuple[int, int]:
    """Offset and bytes of ``.nv_fatbin`` in a 64-bit little-endian ELF file."""
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + n * size) for n in range(count)]
    names_at = sections[names][4]
    for name, _, _, _, offset, length in sections:
        begin = names_at + name
        if data[begin : begin + len(_SECTION) + 1] == _SECTION + b"\0":
            return offset, length
    raise ValueError(f"no section {_SECTION.decode()}: the library has no GPU code")


def slim(path: Path, architecture: int) -> Kept:
    """`keep_architecture` of a file, in place."""
    data = bytearray(path.read_bytes())
    told = keep_architecture(data, architecture)
    path.write_bytes(data)
    return told
