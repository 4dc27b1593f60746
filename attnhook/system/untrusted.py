"""Reading files that anybody may have written: a small file cannot take much memory, and faults are ValueErrors."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

LINE_BYTES = 16 * 2**20  # of a line of JSON; the longest that attnhook writes has about one million
JSON_BYTES = 64 * 2**20  # of a whole file
_UNPACKED_BYTES = 64 * 2**20  # of a file of arrays that is smaller than that itself
_ENTRIES = 1000  # arrays of one file
_KINDS = "biufcU"  # of plain numbers and text


class TooDeepError(ValueError):
    """JSON that is nested more deeply than Python's parser follows."""


def loads(data: bytes | str) -> Any:
    """`json.loads` that raises nothing but ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise TooDeepError("it is nested too deeply") from None


def load(path: Path, limit: int = JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises OSError, or ValueError for what is no JSON or has more than ``limit`` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return loads(data)


def lines(file: BinaryIO, limit: int = LINE_BYTES) -> Iterator[bytes]:
    """The lines of a binary file, with their ends. Raises ValueError at one of more than ``limit`` bytes."""
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        yield line


def count_lines(file: BinaryIO) -> int:
    """Lines of a binary file, a last one without its end too, whatever their length."""
    found, last = 0, b"\n"
    while part := file.read(2**20):
        found += part.count(b"\n")
        last = part[-1:]
    return found + (last != b"\n")


def arrays(path: Path, limit: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name: plain numbers and text, nothing that would have to be unpickled.

    An array is allocated once its size is known to be that of its data, and all of them together take at most
    ``limit`` bytes (default: the file's own size, or 64 MiB where that is more: attnhook writes them uncompressed).
    Raises OSError, or ValueError for anything else than such a file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        most = max(size, _UNPACKED_BYTES) if limit is None else limit
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                unpacked = sum(entry.file_size for entry in entries)
                if len(entries) > _ENTRIES or len({entry.filename for entry in entries}) < len(entries):
                    raise ValueError(f"it has {len(entries)} arrays, or two of one name")
                if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                    raise ValueError("it is packed by a method that numpy does not use")
                if unpacked > most:
                    raise ValueError(f"it unpacks {size:,} bytes to {unpacked:,}; {most:,} are allowed")
                return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            # RuntimeError: encrypted; NotImplementedError: packed by a method that zipfile does not know
            raise ValueError(str(error) or type(error).__name__) from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    import numpy as np
    from numpy.lib import format as npy

    with archive.open(entry) as stream:
        try:
            version = npy.read_magic(stream)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            if read is None:
                raise ValueError(f"its format is {version}")
            shape, fortran, dtype = read(stream)
        except (RecursionError, MemoryError, SyntaxError, TypeError) as error:
            raise ValueError(f"{entry.filename}: its header is damaged: {type(error).__name__}") from None
        except ValueError as error:
            raise ValueError(f"{entry.filename}: {error}") from None
        if dtype.kind not in _KINDS or dtype.fields is not None or any(length < 0 for length in shape):
            raise ValueError(f"{entry.filename}: it holds {dtype} {shape}, not plain numbers or text")
        wanted, left = math.prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
        if wanted != left:
            raise ValueError(f"{entry.filename}: {dtype} {shape} takes {wanted:,} bytes and there are {left:,}")
        data = stream.read(wanted)
        if len(data) != wanted:
            raise ValueError(f"{entry.filename}: {len(data):,} of {wanted:,} bytes are there")
        flat = np.frombuffer(data, dtype) if wanted else np.empty(math.prod(shape), dtype)
        return flat.reshape(shape[::-1]).T.copy() if fortran else flat.reshape(shape).copy()
