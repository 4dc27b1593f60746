"""``attnhook collect`` and ``attnhook monitor``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnhook.analysis.drift.baseline import load as load_baseline
from attnhook.cli import stores as cli_stores
from attnhook.errors import OptionError, needs
from attnhook.sinks import config

if TYPE_CHECKING:
    from attnhook.collector.classifiers import Classifier


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(collect)
    app.command()(monitor)


def collect(
    store: Annotated[
        list[str],
        typer.Option(
            metavar="STORE", help="Where records are kept: x.db, a Parquet folder, x.jsonl; may be given again."
        ),
    ],
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where zmq: sinks connect to.")
    ] = "tcp://127.0.0.1:9001",
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where HTTP is served: host:port.")] = "127.0.0.1:9002",
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Ask for this bearer token over HTTP; others see it in ps.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the token from this file.")] = None,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the journal. Default: beside the first store, x.db.journal."),
    ] = None,
    queue: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes that may wait for a store; more is dropped.")
    ] = "256MB",
    drain_seconds: Annotated[
        float, typer.Option(metavar="NUMBER", help="At the end: take what is on its way for at most so long.")
    ] = 5,
    stop_seconds: Annotated[
        float, typer.Option(metavar="NUMBER", help="At the end: try to write what waits for at most so long.")
    ] = 30,
    artifact: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="What attnhook discover wrote: /classify then knows the classifier clusters."
        ),
    ] = None,
    drift_baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Watch for drift from this baseline, a file of attnhook drift fit."),
    ] = None,
    drift_idle: Annotated[
        float, typer.Option(metavar="NUMBER", help="Seconds without a record after which a request is over.")
    ] = 30,
) -> None:
    """Take records from zmq: sinks, keep them, and serve health, stats, metrics and fingerprints over HTTP."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    stores = [cli_stores.kept(one, "store") for one in store]
    for name, seconds in (("drain-seconds", drain_seconds), ("stop-seconds", stop_seconds)):
        if not 0 <= seconds <= 86400:
            raise OptionError(name.replace("-", "_"), f"--{name} {seconds:g} must be from 0 to 86400 seconds")
    try:
        size = config.size(queue)
    except ValueError as error:
        raise OptionError("queue", f"--queue {queue}: must be {error}") from error
    if not 0 < drift_idle <= 86400:
        raise OptionError("drift_idle", f"--drift-idle {drift_idle:g} must be above 0 and at most 86400 seconds")
    with needs("attnhook collect", "sinks"):
        import zmq  # noqa: F401

        from attnhook.collector.drift import DriftWatch
        from attnhook.collector.http import application
        from attnhook.collector.server import Server
        from attnhook.collector.service import Collector

    drift = None if drift_baseline is None else DriftWatch(load_baseline(drift_baseline), idle_seconds=drift_idle)
    # many small pieces of work: a thread that computes is not to hold up the one that receives
    sys.setswitchinterval(0.0005)
    stopping = _told_to_stop()
    secret = _token(token, token_file)
    classifiers = _classifiers(artifact)
    server = Server(http, token=secret)
    collector = Collector(listen, stores, journal=journal, queue_bytes=size, drift=drift)
    collector.start()
    server.start(application(collector, token=secret, classifiers=classifiers))
    print(f"collecting on {collector.receiver.address} into {', '.join(stores)}; {server.url}/stats", flush=True)
    while not stopping.wait(1.0):
        continue
    server.stop()
    done = collector.stop(drain=drain_seconds, seconds=stop_seconds)
    records = collector.stats()["records"]
    print(f"stopped: {records['received']} records received, {records['lost']} lost", flush=True)
    if not done:
        print(
            f"error: not everything could be written; the rest waits in {collector.journal.folder} and is written at "
            "the next start",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _told_to_stop() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set from now on."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def _classifiers(artifact: Path | None) -> dict[str, Classifier]:
    """What /classify knows by name."""
    if artifact is None:
        return {}
    from attnhook.analysis.classify import FingerprintClassifier

    return {"clusters": FingerprintClassifier(artifact)}


def monitor(
    url: Annotated[str, typer.Option(metavar="URL", help="The collector's address.")] = "http://127.0.0.1:9002",
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="The collector's token.")] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the token from this file.")] = None,
    interval: Annotated[float, typer.Option(metavar="NUMBER", help="Seconds between looks.")] = 1.0,
    count: Annotated[int, typer.Option(metavar="N", help="Look so often and end; 0: until Ctrl-C.")] = 0,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print the stats as one JSON object a line.")] = False,
    prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Print the metrics as Prometheus text, once unless --count is given.")
    ] = False,
) -> None:
    """Watch a collector: zone shares, entropy, rates, drops and the busiest requests."""
    if jsonl and prometheus:
        raise OptionError("jsonl", "--jsonl and --prometheus were both given: choose one")
    if not 0.1 <= interval <= 3600:
        raise OptionError("interval", f"--interval {interval:g} must be from 0.1 to 3600 seconds")
    if count < 0:
        raise OptionError("count", f"--count {count} must be 0 or more")
    from attnhook.collector import monitor as screen

    source = screen.Source(url, _token(token, token_file))
    if prometheus:
        screen.print_metrics(source, interval, count or 1)
    elif jsonl:
        screen.print_stats(source, interval, count)
    else:
        screen.show(source, interval, count)


def _token(token: str | None, file: Path | None) -> str | None:
    if token is not None and file is not None:
        raise OptionError("token", "--token and --token-file were both given: choose one")
    if file is None:
        return token
    try:
        text = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("token_file", f"--token-file {file} cannot be read: {error}") from error
    if not text:
        raise OptionError("token_file", f"--token-file {file} is empty")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        logging.getLogger("attnhook").warning("%s can be read by other users: chmod 600 it", file)
    return text
