"""A Parquet data set of records: where its files lie, how they are written, listed and removed.

``model_dir=<model>/date=<day>/<time>-<id>.parquet`` under one folder, local or of any file system that pyarrow
knows. `_attnhook.json` beside them names the schema version. A file leaves out the later columns that hold nothing in
it, and is of the last version whose column it has: one without token ids has no column ``query_token``.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from attnhook.errors import PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import SCHEMA_VERSION, SINCE, VERSION_KEY, check_version
from attnhook.record.columns import Columns
from attnhook.system.untrusted import loads

MARKER = "_attnhook.json"
_LONGEST_NAME = 150  # bytes of a folder's name that hold a model's; file systems allow 255
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MARKER_BYTES = 4096
_CHUNK_BYTES = 64 * 2**20  # that a column of a row group may always unpack to
_VALUE_BYTES = 2**20  # of a row's value, on the average of a larger column
_PLAIN = 1  # the version without any later column
_KEY = ["request_id", "choice", "query_position"]


@dataclass(frozen=True)
class Dataset:
    """A folder of a file system."""

    url: str
    filesystem: fs.FileSystem
    base: str

    @classmethod
    def at(cls, path: str, filesystem_options: Mapping[str, str] | None = None) -> Dataset:
        """The data set at a local path or a URI such as ``s3://bucket/prefix``, whether or not it exists.

        ``filesystem_options`` are those of pyarrow's URIs (``region``, ``endpoint_override``, ...).
        Raises PluginError where there is no such file system.
        """
        if not path:
            raise PluginError("parquet: has no folder; write parquet:records or parquet:s3://bucket/records")
        try:
            if "://" not in path:
                return cls(path, fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path)))
            if "@" in path.split("://", 1)[1].split("/", 1)[0]:  # URLs are in logs, metrics and error messages
                raise PluginError(
                    f"parquet:{path.split('://', 1)[0]}://…@…: credentials do not belong into a URL, which is logged; "
                    "leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile"
                )
            query = urlencode(filesystem_options or {})
            filesystem, base = fs.FileSystem.from_uri(path + (f"?{query}" if query else ""))
        except (OSError, ValueError, ImportError) as error:  # pa.ArrowException is one of these
            raise PluginError(
                f"parquet:{path}: {error}; name a folder, or a URI that pyarrow.fs.FileSystem.from_uri takes, such as "
                "s3://bucket/records?region=eu-central-1"
            ) from error
        if not base.strip("/") and not isinstance(filesystem, fs.LocalFileSystem):
            raise PluginError(f"parquet:{path} names no bucket; write parquet:s3://bucket/records")
        return cls(path, filesystem, base.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether files can be renamed into their place."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def check(self, *, create: bool = False) -> None:
        """Raise PluginError unless this is a data set of a schema that this release knows; ``create`` makes one."""
        marker = posixpath.join(self.base, MARKER)
        try:
            if self.filesystem.get_file_info(marker).type != fs.FileType.NotFound:
                version = self._version()
            elif create:
                version = _PLAIN
                self.filesystem.create_dir(self.base, recursive=not self.is_local)
                self._mark(version)
            else:
                bucket = self.base.split("/", 1)[0]  # "" in file systems without buckets
                if bucket and self.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                    raise PluginError(f"parquet:{self.url}: there is no bucket {bucket!r}; correct its name")
                raise PluginError(f"parquet:{self.url} holds no records: it has no {MARKER}; name a folder of the sink")
        except (OSError, ValueError, AttributeError) as error:
            text = str(error).rstrip(".")
            raise PluginError(f"parquet:{self.url} cannot be used: {text}. {self.remedy(error)}") from error
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            raise PluginError(
                f"parquet:{self.url} has schema version {version!r}; this attnhook knows {SCHEMA_VERSION}: upgrade "
                "attnhook, or name another folder. Nothing in it was changed"
            )

    def _version(self) -> Any:
        with self.filesystem.open_input_stream(posixpath.join(self.base, MARKER)) as file:
            return loads(file.read(_MARKER_BYTES)).get("schema_version")

    def _mark(self, version: int) -> None:
        marker = posixpath.join(self.base, MARKER)
        target = f"{marker}.{os.getpid()}.tmp" if self.is_local else marker
        with self.filesystem.open_output_stream(target) as file:
            file.write(json.dumps({"schema_version": version}).encode())
        if self.is_local:
            os.replace(target, marker)

    def remedy(self, error: Exception) -> str:
        """What to do where the file system raised ``error``."""
        text = str(error).lower()
        if isinstance(self.filesystem, fs.S3FileSystem):
            for signs, remedy in _S3_REMEDIES:
                if any(sign in text for sign in signs):
                    return remedy
        return _remedy(text)

    def files(self) -> list[str]:
        """Paths of the Parquet files, those begun first first."""
        selector = fs.FileSelector(self.base, recursive=True, allow_not_found=True)
        found = [
            info.path
            for info in self.filesystem.get_file_info(selector)
            if info.type == fs.FileType.File and info.path.endswith(".parquet")
        ]
        return sorted(found, key=posixpath.basename)

    def newest(self) -> int | None:
        """When the newest file was begun, microseconds since 1970."""
        begun = [posixpath.basename(path).split("-")[0] for path in self.files()]
        return max((int(time) for time in begun if time.isdecimal() and len(time) < 20), default=None)

    def write(self, table: pa.Table, name: str) -> int:
        """Write the rows as one file per model and day, each whole or not there; returns how many rows.

        Rows that repeat a key inside ``table`` are written once. The same ``name`` again replaces the files.
        Raises OSError where the file system does not take them.
        """
        table = _distinct(table)
        empty = [name for name in SINCE if table[name].null_count == table.num_rows]
        version = max((since for name, since in SINCE.items() if name not in empty), default=_PLAIN)
        table = table.drop_columns(empty).replace_schema_metadata({VERSION_KEY: str(version).encode()})
        if self._version() < version:
            self._mark(version)  # before the file: an older attnhook is to refuse the data set
        day = table["time"].cast(pa.date32())
        parts = pa.table({"model": table["model"], "day": day}).group_by(["model", "day"]).aggregate([]).to_pylist()
        for part in parts:
            chosen = table
            if len(parts) > 1:
                chosen = table.filter(pc.and_(pc.equal(table["model"], part["model"]), pc.equal(day, part["day"])))
            folder = posixpath.join(self.base, f"model_dir={_slug(part['model'])}", f"date={part['day'].isoformat()}")
            self._write_file(chosen, folder, f"{name}.parquet")
        return int(table.num_rows)

    def _write_file(self, table: pa.Table, folder: str, name: str) -> None:
        self.filesystem.create_dir(folder, recursive=True)
        final = posixpath.join(folder, name)
        target = posixpath.join(folder, f".{name}.tmp") if self.is_local else final
        try:
            with self.filesystem.open_output_stream(target) as file:
                _write_table(table, file)
            if self.is_local:
                _sync(target)
                os.replace(target, final)
        except BaseException:
            if self.is_local and os.path.exists(target):
                os.unlink(target)
            raise

    def prune(self, before: int) -> int:
        """Remove files whose newest row was stored before that time; returns how many rows went."""
        last_day = datetime.fromtimestamp(before / 1e6, timezone.utc).date().isoformat()
        removed = 0
        for path in self.files():
            day = posixpath.basename(posixpath.dirname(path)).removeprefix("date=")
            if day > last_day:
                continue
            metadata = self.metadata(path)
            if _newest_row(metadata) < before:
                self.filesystem.delete_file(path)
                removed += metadata.num_rows
        return removed

    def delete(self, request_id: str) -> int:
        """Remove every record of a request by rewriting the files that hold some; returns how many."""
        removed = 0
        for path in self.files():
            with self.filesystem.open_input_file(path) as file:
                ids = pq.read_table(file, columns=["request_id"])["request_id"]
            gone = pc.sum(pc.equal(ids, request_id)).as_py() or 0
            if not gone:
                continue
            removed += gone
            if gone == len(ids):
                self.filesystem.delete_file(path)
                continue
            with self.filesystem.open_input_file(path) as file:
                table = pq.read_table(file)
            kept = table.filter(pc.not_equal(table["request_id"], request_id))
            self._write_file(kept, posixpath.dirname(path), posixpath.basename(path))
        return removed

    def metadata(self, path: str) -> pq.FileMetaData:
        """Metadata of one file.

        Raises RecordError where it is damaged or of another schema version, or its columns unpack to far more than
        records do.
        """
        with self.filesystem.open_input_file(path) as file:
            try:
                metadata = pq.read_metadata(file)
            except pa.ArrowException as error:
                raise RecordError(f"{path} is damaged: {error}; move it out of the data set") from error
        check_version(metadata.metadata, path)
        for name, rows, size in _chunks(metadata):
            if size > max(_CHUNK_BYTES, rows * _VALUE_BYTES):
                raise RecordError(
                    f"{path}: {name} of {rows} rows unpacks to {size:,} bytes, more than records have; move it out of "
                    "the data set"
                )
        return metadata


def warm_up() -> None:
    """Let pyarrow import what it imports late: while an interpreter ends, when the last rows are written, it cannot."""
    row: dict[str, list[Any]] = {name: [""] for name in ("request_id", "model", "zone", "mode", "think_phase")}
    row |= {
        "choice": [0],
        "query_position": [0],
        "decode_step": [None],
        "time": [0],
        "layer": [0],
        "record": [b""],
        "query_token": [0],
        "sink_mass": [0.0],
    }
    batch = Columns(**row, fingerprint=np.zeros((1, fp.SIZE), np.float32)).to_arrow()
    table = _distinct(pa.Table.from_batches([batch, batch]))
    table = table.filter(pc.equal(table["time"].cast(pa.date32()), table["time"].cast(pa.date32())))
    _write_table(table, pa.BufferOutputStream())


def _write_table(table: pa.Table, file: Any) -> None:
    dictionaries = ["request_id", "model", "zone", "mode", "think_phase"]
    pq.write_table(table, file, compression="zstd", row_group_size=65536, use_dictionary=dictionaries)


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each key, in order."""
    place = pa.array(np.arange(table.num_rows))
    firsts = table.select(_KEY).append_column("place", place).group_by(_KEY, use_threads=False)
    rows = firsts.aggregate([("place", "min")])["place_min"]
    if len(rows) == table.num_rows:
        return table
    return table.take(rows.take(pc.sort_indices(rows)))


def _slug(model: str) -> str:
    """A folder's name for a model: readable, and different for different models."""
    name = quote(model, safe=" ")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def safe_batch(metadata: pq.FileMetaData, wanted: int) -> int:
    """Rows to read at once, at most ``wanted``: fewer where records are large, or one may stand for many rows.

    The sink writes records without a dictionary, so that its own files are read in whole batches.
    """
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for column in (columns.column(i) for i in range(columns.num_columns)):
            if column.path_in_schema == "record" and columns.num_rows:
                rows = 1 if column.has_dictionary_page else columns.num_rows
                wanted = min(wanted, max(1, 2 * _CHUNK_BYTES * rows // max(column.total_uncompressed_size, 1)))
    return wanted


def _chunks(metadata: pq.FileMetaData) -> Iterator[tuple[str, int, int]]:
    """Column, rows and unpacked bytes of each chunk of a file, as its footer tells them."""
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for column in (columns.column(i) for i in range(columns.num_columns)):
            yield column.path_in_schema, columns.num_rows, column.total_uncompressed_size


def _newest_row(metadata: pq.FileMetaData) -> int:
    newest = 0
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for column in range(columns.num_columns):
            part = columns.column(column)
            if part.path_in_schema == "time":
                last = part.statistics.max if part.is_stats_set and part.statistics.has_min_max else None
                if not isinstance(last, datetime) or last.tzinfo is None:
                    return 2**63  # nobody knows: never too old
                newest = max(newest, (last - _EPOCH) // timedelta(microseconds=1))
    return newest


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# parts of what the AWS SDK's messages say, in lower case
_S3_REMEDIES = (
    (
        ("network_connection", "curlcode", "could not connect", "timeout"),
        "The server does not answer: check endpoint_override=host:port, scheme=http or https, and the network.",
    ),
    (
        ("access_denied", "access denied", "access_key", "accesskey", "signature", "token", "forbidden"),
        "The server refuses these credentials: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN or "
        "the AWS profile, and that they may list, read, write and delete in this bucket.",
    ),
    (
        ("bucket", "no_such_bucket"),
        "Create the bucket first, or let attnhook do it with allow_bucket_creation=1; check its name and region.",
    ),
)


def _remedy(text: str) -> str:
    if "permission" in text or "read-only" in text or "access denied" in text:
        return "This process may not write there: change its permissions or credentials, or name another folder."
    if "no space" in text:
        return "The disk is full: make room, or name a folder on another disk."
    if "no such file" in text or "does not exist" in text or "cannot create" in text:
        return "Its parent folder or bucket does not exist: create it first."
    return "Name a folder that this process can read and write."
