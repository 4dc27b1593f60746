"""The sink that writes a Parquet data set, partitioned by model and day."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnhook.errors import PluginError, needs
from attnhook.plugins.contracts import Sink
from attnhook.record.columns import Columns, from_records
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import config
from attnhook.sinks.retention import Retention

if TYPE_CHECKING:
    from attnhook.sinks.dataset import Dataset
    from attnhook.sinks.journal import Journal

logger = logging.getLogger("attnhook")

ROTATE_BYTES = 64 * 10**6
EVERY_SECONDS = 60.0
#: Options of pyarrow's S3 URIs, passed on.
S3_OPTIONS = ("region", "endpoint_override", "scheme", "allow_bucket_creation")


class ParquetSink(Sink):
    """``parquet:dir`` or ``parquet:s3://bucket/prefix``: a data set for DuckDB, Polars, Spark and Ray Data.

    Options: ``rotate=64MB`` and ``every=1m`` (size and age at which waiting rows become a Parquet file),
    ``keep_days=30``, ``spool=dir`` (local folder of the journal, for data sets that are not local).

    Delivery guarantee: when `write` returned, the batch is in a local journal, with the operating system: a killed
    process loses none of it, a power cut what was not yet on disk. Readers see rows when their file is complete:
    after ``every``, or at `close`. Files appear whole, by an atomic rename (S3: a completed upload). The journal of
    a process that died is taken over by the next one that opens the data set. Rows that repeat a key are written
    once per file; across files a record delivered twice is there twice. Several processes may write to one data
    set.
    """

    def __init__(self) -> None:
        self.written = 0  #: rows journalled since `open`
        self.failed = 0  #: tries to make files that failed and are repeated
        self._url = ""
        self._dataset: Dataset | None = None
        self._journal: Journal | None = None
        self._pid = 0
        self._lock = threading.RLock()  # a timer makes files while nobody writes
        self._timer: threading.Timer | None = None
        self._failing = False  # the last try to make files failed: the timer tries again, not every write

    def open(self, config_text: str) -> None:
        """Make the folder (not its parent), finish journals of processes that died, remove what is past its days.

        Raises PluginError where the folder cannot be written to or is of a newer schema.
        """
        known: dict[str, Any] = {"rotate": config.size, "every": config.seconds, "keep_days": config.days, "spool": str}
        known |= dict.fromkeys(S3_OPTIONS, str) if "://" in config_text else {}
        path, options = config.parse("parquet", config_text, known)
        with needs("the sink parquet:", "sinks"):
            from attnhook.sinks.dataset import Dataset, warm_up
            from attnhook.sinks.journal import Journal
        self._url = path
        self._rotate = options.get("rotate", ROTATE_BYTES)
        self._every = options.get("every", EVERY_SECONDS)
        self._retention = Retention(options.get("keep_days"))
        dataset = Dataset.at(path, {name: options[name] for name in S3_OPTIONS if name in options})
        dataset.check(create=True)
        self._folder = _spool(dataset, options.get("spool"))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            Journal.begin(self._folder).remove()  # now, and not at the first record, is the time to find out
        except OSError as error:
            raise PluginError(
                f"parquet:{path}: the journal in {self._folder} cannot be written: {error}; make the folder writable, "
                "or name another with ?spool=dir"
            ) from error
        warm_up()
        self._dataset = dataset
        self._pid = os.getpid()
        self._heir()
        self._retention.keep(dataset.newest, dataset.prune)

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Add the records to the journal, all or none; every now and then make files of it.

        Raises OSError where the disk does not take them, RecordError where one is invalid.
        """
        if batch:
            self.write_columns(from_records(batch))

    def write_columns(self, columns: Columns) -> None:
        """`write` for rows that are columns already; their times are kept."""
        self._after_fork()
        with self._lock:
            dataset = self._open_dataset()
            if self._journal is None:
                self._begin()
            assert self._journal is not None
            self._journal.append(columns.to_arrow())
            self.written += len(columns)
            if self._journal.size >= self._rotate and not self._failing:
                self._try_publish()
        self._retention.keep(dataset.newest, dataset.prune)

    def publish(self) -> None:
        """Make files of everything written so far, now.

        Raises OSError where they cannot be written; the rows stay in the journal.
        """
        self._after_fork()
        with self._lock:
            journal = self._journal
            if journal is not None:
                self._finish(journal)
                self._journal = None
                self._failing = False
                self._stop_timer()

    def close(self) -> None:
        """`publish`, and let go of the data set.

        Raises OSError where the files cannot be written: the next process that opens the data set will try again.
        """
        self._after_fork()
        with self._lock:
            self._stop_timer()
            try:
                self.publish()
            finally:
                if self._journal is not None:
                    self._journal.let_go()
                self._journal = self._dataset = None

    def prune(self, before: int) -> int:
        """Remove files whose newest row was stored before that time (microseconds since 1970, UTC)."""
        return self._open_dataset().prune(before)

    def delete(self, request_id: str) -> int:
        """Remove every record of a request; returns how many."""
        self.publish()
        return self._open_dataset().delete(request_id)

    def _open_dataset(self) -> Dataset:
        if self._dataset is None:
            raise ValueError(f"sink parquet:{self._url} is closed")
        return self._dataset

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # the journal is the parent's to finish, and its timer does not run here
            self._pid = os.getpid()
            self._lock = threading.RLock()
            self._journal = self._timer = None

    def _begin(self) -> None:
        from attnhook.sinks.journal import Journal

        self._journal = Journal.begin(self._folder)
        self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = threading.Timer(self._every, self._tick)
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError:  # the interpreter is ending: `close` comes next
            self._timer = None

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _tick(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._try_publish()

    def _finish(self, journal: Journal) -> None:
        """Files in the place of a journal."""
        import pyarrow as pa

        from attnhook.record.arrow import arrow_schema

        table = pa.Table.from_batches(journal.read(), arrow_schema())
        if table.num_rows:
            self._open_dataset().write(table, journal.name)
        journal.remove()

    def _try_publish(self) -> None:
        try:
            self.publish()
        except (OSError, ValueError) as error:  # pyarrow's errors are one of these
            # not raised: the rows are safe in the journal, and whoever wrote them has nothing to repeat
            self.failed += 1
            self._failing = True
            self._start_timer()
            logger.warning("parquet:%s: no file could be written, the rows wait in the journal: %s", self._url, error)

    def _heir(self) -> None:
        from attnhook.sinks.journal import Journal

        for journal in Journal.abandoned(self._folder):
            try:
                self._finish(journal)
            except Exception as error:  # whatever it holds, a damaged one must not keep new records out
                journal.let_go()
                logger.warning("parquet:%s: the journal %s was left as it is: %s", self._url, journal.path, error)


def _spool(dataset: Dataset, chosen: str | None) -> Path:
    """The folder of the journals: in the data set, or in the cache where that is not local."""
    if dataset.is_local and not chosen:
        return Path(dataset.base, "_journal")
    cache = os.environ.get("ATTNHOOK_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "attnhook"
    )
    # one folder per data set: whoever finds a journal has to know where it belongs
    base = Path(chosen) if chosen else Path(cache, "spool")
    return base.expanduser() / hashlib.sha256(dataset.base.encode()).hexdigest()[:16]
