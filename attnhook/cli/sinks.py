"""``attnhook sinks``: list the sinks, try one out, convert stores, remove what is too old."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import progress
from attnhook.errors import AttnhookError, OptionError, PluginError
from attnhook.sinks.opening import open_sink
from attnhook.store.base import BATCH
from attnhook.system.addresses import masked

app = typer.Typer(no_args_is_help=True, help="List the sinks, try one out, convert stores, remove what is too old.")

_Url = Annotated[
    str, typer.Argument(metavar="SINK", help="A sink: x.jsonl, x.db, a Parquet folder, or scheme:config such as zmq:….")
]


@app.command("list")
def list_sinks() -> None:
    """Print the sinks that are installed here, built-in and of plugins."""
    from attnhook import store
    from attnhook.plugins import manager as plugins

    table = Table(box=None, pad_edge=False)
    for heading in ("sink", "can be read back", "what it is"):
        table.add_column(heading, overflow="fold")
    for scheme, sink in plugins.sink_classes().items():
        about = (sink.__doc__ or "").strip().partition("\n\n")[0]
        table.add_row(
            f"{scheme}:", "yes" if scheme in store.SCHEMES else "no", " ".join(about.split()).replace("``", "")
        )
    Console().print(table)


@app.command("test")
def test_sink(url: _Url) -> None:
    """Write a probe record, read it back and delete it again."""
    from attnhook import store

    url = cli_stores.writable(url, "SINK")
    scheme = url.partition(":")[0]
    probe = _probe()
    sink: Any = open_sink(url)
    rules = getattr(sink, "rules", None)
    stored = rules.apply([probe])[0] if rules else probe
    started = time.perf_counter()
    try:
        with closing(sink):  # some hand over what they have only now
            sink.write([probe])
            sink.flush()
    except Exception as error:  # a sink may raise what it likes
        raise PluginError(
            f"sink {masked(url)} opens, but cannot be written to: {type(error).__name__}: {error}"
        ) from error
    print(f"{masked(url)}: a record was written in {(time.perf_counter() - started) * 1000:.0f} ms")
    if scheme not in store.SCHEMES or url == "jsonl:-":
        print("this sink cannot be read back: look for the request id", stored.request_id)
        return
    with store.open_store(url) as reader:
        found = list(_stored_fingerprints(reader, stored.request_id))
    sink = open_sink(url)
    try:
        with closing(sink):
            removed = sink.delete(stored.request_id)
    except OSError as error:
        raise PluginError(f"sink {masked(url)}: the probe {stored.request_id} could not be deleted: {error}") from error
    if len(found) != 1 or max(abs(a - b) for a, b in zip(found[0], stored.fingerprint.tolist(), strict=True)) > 1e-6:
        raise PluginError(
            f"sink {masked(url)}: {len(found)} records came back, or another fingerprint than was written"
        )
    with store.open_store(url) as reader:
        left = reader.count(request_id=stored.request_id)
    if removed != 1 or left:
        raise PluginError(
            f"sink {masked(url)}: the probe {stored.request_id} could not be deleted: {left} records of it are left"
        )
    print("it was read back and deleted: this sink works")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="STORE", help="The store to read: x.jsonl, x.db, a Parquet folder, or sqlite:x.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="SINK", help="The sink to write to, likewise; options go behind a ?.")
    ],
    append: Annotated[bool, typer.Option("--append", help="Write to a store that exists already.")] = False,
) -> None:
    """Copy every record of a store into another; times are kept where both stores have them.

    Token ids are copied only where the target has tokens=1.
    """
    from attnhook import store
    from attnhook.record.arrow import NAMES
    from attnhook.record.columns import Columns, to_records

    source, target = cli_stores.readable(source, "STORE"), cli_stores.writable(target, "SINK")
    if _place(source) == _place(target):
        raise OptionError("target", f"{masked(source)} and {masked(target)} are the same store: name two")
    with store.open_store(source) as reader:
        if not append and _exists(target):
            raise OptionError("target", f"{masked(target)} exists already: name a new one, or add to it with --append")
        total = reader.count()
        sink: Any = open_sink(target)
        # not a store of columns: it takes records
        whole = not hasattr(getattr(sink, "inner", sink), "write_columns")
        done = 0
        try:
            with closing(sink), progress("copying", total) as work:
                for batch in reader.fingerprints(columns=NAMES, batch_size=1024 if whole else BATCH):
                    if whole:
                        sink.write(list(to_records(batch)))
                    else:
                        sink.write_columns(Columns.from_arrow(batch))
                    done += batch.num_rows
                    work.tell(done)
                sink.flush()
                duplicates, left_out = getattr(sink, "duplicates", 0), sink.tokens_left_out
        except AttnhookError as error:
            raise PluginError(f"{error}; {masked(target)} has the {done} rows before that") from error
        except OSError as error:
            raise PluginError(
                f"{masked(target)} could not be finished: {error}; it may have a part of the rows: mend that, and "
                "convert into a new one"
            ) from error
    again = f", {duplicates} of them were there already" if duplicates else ""
    print(f"{done} rows of {masked(source)} are in {masked(target)}{again}")
    if left_out:
        print(f"the token ids of {left_out} rows were left out: keep them with {masked(_asking_for_tokens(target))}")


@app.command()
def prune(
    url: _Url,
    keep_days: Annotated[
        float, typer.Option("--keep-days", metavar="NUMBER", help="Days to keep; what is older goes for good.")
    ],
) -> None:
    """Remove records stored longer ago than --keep-days; parquet and jsonl remove whole files."""
    from attnhook import store
    from attnhook.sinks import config, retention

    try:
        days = config.days(str(keep_days))
    except ValueError as error:
        raise OptionError("keep_days", f"--keep-days {keep_days} must be {error}") from None
    url = cli_stores.readable(url, "SINK")
    store.open_store(url).close()  # a store that is not there must not be made
    sink: Any = open_sink(url)
    try:
        with closing(sink):
            removed = sink.prune(retention.cutoff(days))
    except OSError as error:
        raise PluginError(
            f"{masked(url)} could not be pruned to the end: {error}; mend that, and prune it again"
        ) from error
    print(f"{removed} records of {masked(url)} were older than {days:g} days and are gone")


def _probe() -> Any:
    import numpy as np

    from attnhook.record import fingerprint as fp
    from attnhook.record.token_record import TokenRecord

    histogram = np.full((1, fp.BINS), 1 / fp.BINS, np.float32)
    return TokenRecord(
        request_id=f"attnhook-probe-{uuid.uuid4().hex}",
        query_position=1,
        layers=(0,),
        token_positions=np.array([[1, 0]], np.int32),
        attention_scores=np.array([[0.75, 0.25]], np.float32),
        fingerprints=fp.assemble(histogram, np.ones(1, np.float32)),
        model="attnhook-probe",
    )


def _stored_fingerprints(reader: Any, request_id: str) -> Any:
    for batch in reader.fingerprints(request_id=request_id):
        yield from batch.column("fingerprint").to_pylist()


def _place(url: str) -> str:
    from attnhook.sinks import config

    scheme, _, rest = url.partition(":")
    path = config.split(rest)[0]
    return f"{scheme}:{path if '://' in path else os.path.realpath(os.path.expanduser(path))}"


def _asking_for_tokens(url: str) -> str:
    from attnhook.sinks import config

    scheme, _, rest = url.partition(":")
    path, options = config.split(rest)
    return f"{scheme}:{config.join(path, {**options, 'tokens': '1'})}"


def _exists(url: str) -> bool:
    from attnhook import store

    if url.partition(":")[0] not in store.SCHEMES:
        return False
    try:
        with store.open_store(url) as target:
            return target.count() > 0
    except AttnhookError:
        return False  # what is wrong with it, opening the sink tells
