"""Delivery: nothing waits for a sink, nothing queued is lost, what is dropped is counted."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnhook.errors import OptionError, PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import delivery as module
from attnhook.sinks import record_writers
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.memory import MemorySink

ROOT = Path(__file__).parents[2]

PATIENCE = 60.0  # seconds for what takes milliseconds, unless the machine is busy

_EMPTY = np.zeros((1, 0), np.float32)
_POSITIONS = _EMPTY.astype(np.int32)
_FINGERPRINTS = fp.assemble(np.full((1, 16), 1 / 16), np.ones(1))


def record(position: int, request: str = "r") -> TokenRecord:
    return TokenRecord(request, position, (0,), _POSITIONS, _EMPTY, _FINGERPRINTS)


def records(*span: int) -> list[TokenRecord]:
    return [record(i) for i in range(*span)]


class Probe(Sink):
    """Keeps positions; can be held up, slowed down and made to fail."""

    def __init__(self, *, held: bool = False, fail: Sequence[type[BaseException]] = ()) -> None:
        self.positions: list[int] = []
        self.batches: list[int] = []
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.fail = list(fail)
        if not held:
            self.let_go.set()

    def open(self, config: str) -> None:
        raise NotImplementedError

    def write(self, batch: Sequence[TokenRecord]) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.let_go.wait(2 * PATIENCE)
        if self.fail:
            raise self.fail.pop(0)("it broke")
        self.positions += [r.query_position for r in batch]
        self.batches.append(len(batch))
        self.calls.append("write")

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    for delivery in list(module._open):
        delivery.close(timeout=0)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("attnhook") and not _ends(t)]


def _ends(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


# -- writing


def test_everything_is_written_in_order_on_one_other_thread():
    sink = Probe()
    with Delivery({"probe": sink}) as delivery:
        for start in range(0, 5000, 7):
            delivery.put(records(start, min(start + 7, 5000)))
    assert sink.positions == list(range(5000))
    assert max(sink.batches) <= record_writers.BATCH
    assert len(sink.threads) == 1
    assert threading.get_ident() not in sink.threads
    assert sink.calls[-2:] == ["flush", "close"]
    assert delivery.stats() == {"probe": {"queued": 0, "written": 5000, "dropped": {}}}


def test_waiting_records_are_written_in_batches():
    sink = Probe(held=True)
    with Delivery({"probe": sink}) as delivery:
        delivery.put(records(1))
        assert sink.entered.wait(PATIENCE)
        for i in range(1, 3001):
            delivery.put([record(i)])
        sink.let_go.set()
    assert sink.batches == [1, 1024, 1024, 952]


def test_each_producers_order_is_kept():
    sink = MemorySink()
    sink.open("")
    delivery = Delivery({"memory": sink}, queue_size=10**6)

    def produce(name: str) -> None:
        for i in range(3000):
            delivery.put([record(i, name)])

    threads = [threading.Thread(target=produce, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    delivery.close()
    for name in "0123":
        assert [r.query_position for r in sink.records if r.request_id == name] == list(range(3000))


class Interrupted(list[TokenRecord]):
    """Records; while they are being queued something else happens."""

    def __init__(self, records: Sequence[TokenRecord], happens: Callable[[], object]) -> None:
        super().__init__(records)
        self.happens = happens

    def __iter__(self) -> Iterator[TokenRecord]:
        self.happens()
        return super().__iter__()


def awake(delivery: Delivery, records: Sequence[TokenRecord]) -> record_writers.RecordWriter:
    """The writer of a delivery that was given records and waits for more."""
    (writer,) = delivery._writers
    delivery.put(records)
    until(lambda: writer.awake)
    return writer


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_put_is_not_overlooked_by_a_writer_that_falls_asleep_just_then(monkeypatch):
    sink = Probe()
    with Delivery({"probe": sink}) as delivery:
        monkeypatch.setattr(record_writers, "LINGER_SECONDS", 3600.0)
        writer = awake(delivery, records(1))

        def goes_to_sleep() -> None:
            monkeypatch.setattr(record_writers, "LINGER_SECONDS", 0.0)
            writer._hurry.set()
            until(lambda: sink.positions == [0] and not writer.awake and writer._bell.empty())

        delivery.put(Interrupted(records(1, 3), goes_to_sleep))
        until(lambda: sink.positions == [0, 1, 2])  # no flush, and no later put


def test_a_put_that_a_close_overtakes_is_counted(monkeypatch):
    sink = Probe()
    delivery = Delivery({"probe": sink})
    monkeypatch.setattr(record_writers, "LINGER_SECONDS", 3600.0)
    awake(delivery, records(1))
    delivery.put(Interrupted(records(1, 3), delivery.close))
    assert delivery.stats() == {"probe": {"queued": 0, "written": 1, "dropped": {"closed": 2}}}


@pytest.mark.parametrize("queue_size", [3, 10**6])
def test_puts_while_it_closes_are_written_or_counted(monkeypatch, queue_size):
    monkeypatch.setattr(record_writers, "LINGER_SECONDS", 0.001)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(30):
            delivery, began, count = (
                Delivery({"probe": (sink := Probe())}, queue_size=queue_size),
                threading.Event(),
                [],
            )

            def produce(delivery=delivery, began=began, count=count) -> None:
                for i in range(400):
                    delivery.put(records(i % 3))
                    if i == 100:
                        began.set()
                count.append(sum(i % 3 for i in range(400)))

            threads = [threading.Thread(target=produce) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert began.wait(PATIENCE)
            delivery.close()
            for thread in threads:
                thread.join(PATIENCE)
            stats = delivery.stats()["probe"]
            assert stats["queued"] == 0
            assert stats["written"] == len(sink.positions)
            assert stats["written"] + sum(stats["dropped"].values()) == sum(count) == 3 * 399
            assert set(stats["dropped"]) <= {"queue_full", "closed"}
    finally:
        sys.setswitchinterval(interval)


def test_what_comes_beyond_the_bound_while_a_writer_lingers_is_dropped(monkeypatch):
    monkeypatch.setattr(record_writers, "LINGER_SECONDS", 3600.0)
    sink = Probe()
    with Delivery({"probe": sink}, queue_size=10) as delivery:
        awake(delivery, records(1))
        delivery.put(records(1, 8))
        delivery.put(records(8, 15))
        assert delivery.flush(PATIENCE)  # cuts the linger short
        assert delivery.stats() == {"probe": {"queued": 0, "written": 10, "dropped": {"queue_full": 5}}}
        assert sink.positions == list(range(10))


def test_a_written_batch_belongs_to_the_sink():
    class Keeper(Probe):
        def write(self, batch: Sequence[TokenRecord]) -> None:
            super().write(batch)
            batch.clear()  # type: ignore[attr-defined]

    put = records(3)
    with Delivery({"one": Keeper(), "two": (other := Probe())}) as delivery:
        delivery.put(put)
    assert len(put) == 3
    assert other.positions == [0, 1, 2]
    assert delivery.stats()["one"]["written"] == 3


def test_no_sinks_and_no_records():
    with Delivery({}) as delivery:
        delivery.put(records(3))
        assert delivery.flush(1)
    sink = Probe()
    with Delivery({"probe": sink}) as delivery:
        delivery.put([])
        assert delivery.flush(1)
    assert sink.calls == ["close"]


def test_a_queue_needs_room():
    with pytest.raises(OptionError, match="queue_size=0 must be at least 1") as caught:
        Delivery({}, queue_size=0)
    assert caught.value.field == "queue_size"


# -- dropping


def test_a_full_queue_drops_and_counts_exactly(caplog):
    sink = Probe(held=True)
    delivery = Delivery({"probe": sink}, queue_size=10)
    delivery.put(records(1))
    assert sink.entered.wait(PATIENCE)
    delivery.put(records(1, 8))
    delivery.put(records(8, 15))  # three fit
    delivery.put(records(15, 20))
    assert delivery.stats() == {"probe": {"queued": 11, "written": 0, "dropped": {"queue_full": 9}}}
    sink.let_go.set()
    assert delivery.flush(PATIENCE)
    assert sink.positions == list(range(11))
    assert delivery.stats() == {"probe": {"queued": 0, "written": 11, "dropped": {"queue_full": 9}}}
    delivery.put(records(20, 22))  # and it goes on
    delivery.close()
    assert sink.positions == [*range(11), 20, 21]
    assert [r.message for r in caplog.records] == [
        "probe is too slow and its full queue drops records; a larger queue_size may help",
        "attention records were dropped, by sink and reason: {'probe': {'queue_full': 9}}",
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 20))
def test_written_and_dropped_add_up(sizes, queue_size):
    sink = Probe(held=True)
    delivery = Delivery({"probe": sink}, queue_size=queue_size)
    delivery.put(records(1))
    assert sink.entered.wait(PATIENCE)
    for size in sizes:
        delivery.put(records(size))
    fits = min(sum(sizes), queue_size)
    full = {"queue_full": sum(sizes) - fits} if sum(sizes) > fits else {}
    assert delivery.stats()["probe"] == {"queued": 1 + fits, "written": 0, "dropped": full}
    sink.let_go.set()
    delivery.close()
    assert delivery.stats()["probe"] == {"queued": 0, "written": 1 + fits, "dropped": full}


def test_a_hung_sink_holds_up_neither_the_others_nor_the_producer():
    hung, dead, fast = Probe(held=True), Probe(fail=[OSError] * 100), Probe()
    delivery = Delivery({"hung": hung, "dead": dead, "fast": fast}, queue_size=1000)
    delivery.put(records(1))
    assert hung.entered.wait(PATIENCE)
    slowest = 0.0
    for i in range(1, 1000):
        batch = [record(i)]
        began = time.perf_counter()
        delivery.put(batch)
        slowest = max(slowest, time.perf_counter() - began)
    deadline = time.monotonic() + PATIENCE
    while len(fast.positions) < 1000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fast.positions == list(range(1000))
    assert not hung.positions
    assert slowest < PATIENCE  # a put that waited for the hung sink would take twice as long
    hung.let_go.set()
    delivery.close()
    assert hung.positions == list(range(1000))


class Odd(BaseException):
    """No Exception, as libraries have some."""


ERRORS = [OSError, ValueError, SystemExit, CancelledError, GeneratorExit, KeyboardInterrupt, Odd]


@pytest.mark.parametrize("error", ERRORS)
def test_a_failed_write_is_counted_logged_once_and_not_the_end(caplog, error):
    sink = Probe(fail=[error, error, KeyError])
    delivery = Delivery({"probe": sink})
    for start in range(0, 40, 10):
        delivery.put(records(start, start + 10))
        assert delivery.flush(PATIENCE)
    assert sink.positions == list(range(30, 40))
    assert delivery.stats() == {"probe": {"queued": 0, "written": 10, "dropped": {"write_failed": 30}}}
    messages = [r.message for r in caplog.records]
    assert messages == [
        f"probe failed to write: {error.__name__}: it broke",
        "probe failed to write: KeyError: 'it broke'",
    ]
    assert {r.name for r in caplog.records} == {"attnhook"}
    delivery.close()


def test_a_sink_that_fails_to_flush_and_close_is_logged(caplog):
    class Broken(Probe):
        def flush(self) -> None:
            raise OSError("no flush")

        def close(self) -> None:
            raise OSError("no close")

    with Delivery({"probe": Broken()}) as delivery:
        delivery.put(records(1))
        delivery.flush(PATIENCE)
        delivery.put(records(1))
    assert [r.message for r in caplog.records] == [
        "probe failed to flush: OSError: no flush",
        "probe failed to close: OSError: no close",
    ]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_sink_or_an_observer_raises_its_thread_lives_on(caplog, error):
    class Broken(Probe):
        def flush(self) -> None:
            super().flush()
            raise error("no flush")

        def close(self) -> None:
            super().close()
            raise error("no close")

    def observe(one: TokenRecord) -> None:
        if one.query_position % 2:
            raise error("no odd ones")

    sink = Broken()
    with Delivery({"probe": sink}, queue_size=4, observers=observe) as delivery:
        for start in range(0, 40, 4):
            delivery.put(records(start, start + 4))
            assert delivery.flush(PATIENCE)
        stats = delivery.stats()
    assert stats["probe"] == {"queued": 0, "written": 40, "dropped": {}}
    assert stats["observers"] == {"queued": 0, "written": 20, "dropped": {"observer_failed": 20}}
    assert sink.positions == list(range(40)) and sink.calls[-1] == "close"
    assert sorted(r.message for r in caplog.records) == [
        "attention records were dropped, by sink and reason: {'observers': {'observer_failed': 20}}",
        f"observers failed: {error.__name__}: no odd ones",
        f"probe failed to close: {error.__name__}: no close",
        f"probe failed to flush: {error.__name__}: no flush",
    ]


def test_a_logging_filter_that_raises_loses_no_record(capsys):
    class Raising(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise LookupError("a filter of the script's own")

    raising = Raising()
    module.logger.addFilter(raising)
    sink = Probe(fail=[OSError])
    try:
        delivery = Delivery({"probe": sink})
        for start in range(0, 30, 10):
            delivery.put(records(start, start + 10))
            assert delivery.flush(PATIENCE)
        assert sink.positions == list(range(10, 30))
        assert delivery.stats()["probe"] == {"queued": 0, "written": 20, "dropped": {"write_failed": 10}}
    finally:
        module.logger.removeFilter(raising)
    delivery.close()
    assert "a filter of the script's own" in capsys.readouterr().err


# -- flush


def test_flush_waits_until_what_was_put_is_flushed():
    sink = Probe(held=True)
    delivery = Delivery({"probe": sink, "fast": Probe()})
    assert delivery.flush(0)  # nothing was put
    delivery.put(records(3))
    assert sink.entered.wait(PATIENCE)
    assert not delivery.flush(0.05)
    threading.Timer(0.1, sink.let_go.set).start()
    assert delivery.flush()
    assert sink.positions == [0, 1, 2]
    assert "flush" in sink.calls
    delivery.close()
    assert delivery.flush()


def test_flush_waits_for_nothing_put_later():
    delivery = Delivery({"probe": Probe()}, queue_size=10**6)
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            delivery.put([record(0)] * 10)
            time.sleep(0)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        for _ in range(3):
            assert delivery.flush(PATIENCE)
    finally:
        stop.set()
        thread.join()
    delivery.close()


def test_the_sink_is_flushed_whenever_the_queue_runs_dry():
    sink = Probe()
    delivery = Delivery({"probe": sink})
    for i in range(3):
        delivery.put([record(i)])
        deadline = time.monotonic() + PATIENCE
        while sink.calls.count("flush") < i + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert sink.calls == ["write", "flush"] * 3
    delivery.close()


def test_an_observer_may_flush_and_close_without_a_deadlock():
    results = []

    def observer(_: TokenRecord) -> None:
        results.append(delivery.flush())
        delivery.close()
        results.append("closed")

    delivery = Delivery({}, observers=observer)
    delivery.put([record(0)])
    deadline = time.monotonic() + PATIENCE
    while len(results) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert results == [False, "closed"]


# -- close


def test_close_is_idempotent_and_later_records_are_counted(caplog):
    sink = Probe()
    delivery = Delivery({"probe": sink})
    delivery.put(records(100))
    delivery.close()
    delivery.close()
    assert sink.calls.count("close") == 1
    delivery.put(records(3))
    delivery.put(records(2))
    assert delivery.stats() == {"probe": {"queued": 0, "written": 100, "dropped": {"closed": 5}}}
    assert sink.positions == list(range(100))
    assert not caplog.records


def test_close_from_several_threads_waits_in_each():
    sink = Probe(held=True)
    delivery = Delivery({"probe": sink})
    delivery.put(records(5))
    done = []
    threads = [threading.Thread(target=lambda: (delivery.close(), done.append(len(sink.positions)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not done
    sink.let_go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert done == [5, 5, 5]


def test_close_gives_up_after_its_timeout(caplog):
    hung, fine = Probe(held=True), Probe()
    delivery = Delivery({"hung": hung, "fine": fine})
    delivery.put(records(2))
    assert hung.entered.wait(PATIENCE)
    delivery.put(records(2, 7))
    began = time.monotonic()
    delivery.close(timeout=0.1)
    assert time.monotonic() - began < 2
    assert fine.positions == list(range(7))
    assert fine.calls[-1] == "close"
    assert delivery.stats()["hung"]["dropped"] == {"close_timeout": 5}
    assert not hung.calls  # a sink is not closed under a write that still runs
    assert "gave up on hung: a write of 2 records does not end, 5 more wait behind it" in caplog.text
    delivery.close()  # does not wait again
    hung.let_go.set()  # and if it comes back after all, what it had is written and it is closed
    deadline = time.monotonic() + PATIENCE
    while "close" not in hung.calls and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hung.positions == [0, 1]
    assert delivery.stats()["hung"] == {"queued": 0, "written": 2, "dropped": {"close_timeout": 5}}


@pytest.mark.slow
def test_close_waits_for_a_slow_sink_but_not_for_a_stalled_one(monkeypatch):
    monkeypatch.setattr(module, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(record_writers, "BATCH", 1)

    class Slow(Probe):
        def write(self, batch: Sequence[TokenRecord]) -> None:
            time.sleep(0.15)
            super().write(batch)

    slow, hung = Slow(), Probe(held=True)
    delivery = Delivery({"slow": slow, "hung": hung})
    delivery.put(records(8))  # 1.2 s
    delivery.close()
    assert slow.positions == list(range(8))
    assert delivery.stats()["hung"]["dropped"] == {"close_timeout": 7}
    hung.let_go.set()


def test_without_a_thread_close_writes(monkeypatch, caplog):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sink = Probe()
    delivery = Delivery({"probe": sink})
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        delivery.put(records(3000))
        delivery.put(records(3000, 3001))
        assert not delivery.flush(0.01)
    delivery.close()
    assert sink.positions == list(range(3001))
    assert sink.calls[-1] == "close"
    assert [r.message for r in caplog.records] == [
        "no thread for probe, its records wait for close(): RuntimeError: can't start new thread"
    ]


# -- observers


def test_observers_see_every_record_and_their_failures_are_theirs(caplog):
    seen = []

    def observer(r: TokenRecord) -> None:
        if r.query_position % 3 == 0:
            raise ValueError("no threes")
        seen.append(r.query_position)

    sink = Probe()
    with Delivery({"probe": sink}, observers=observer) as delivery:
        delivery.put(records(10))
    assert sink.positions == list(range(10))
    assert seen == [1, 2, 4, 5, 7, 8]
    assert delivery.stats() == {
        "probe": {"queued": 0, "written": 10, "dropped": {}},
        "observers": {"queued": 0, "written": 6, "dropped": {"observer_failed": 4}},
    }
    assert [r.message for r in caplog.records] == [
        "observers failed: ValueError: no threes",
        "attention records were dropped, by sink and reason: {'observers': {'observer_failed': 4}}",
    ]


def test_one_observer_does_not_hold_up_another():
    hold, seen = threading.Event(), []
    delivery = Delivery({}, observers={"hung": lambda _: hold.wait(20), "fine": seen.append})
    delivery.put(records(3))
    deadline = time.monotonic() + PATIENCE
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(seen) == 3
    hold.set()
    delivery.close()


class _Plugin:
    def __init__(self, fail: bool) -> None:
        self.seen: list[int] = []
        self.fail = fail

    @plugins.hookspecs.hookimpl
    def attnhook_token(self, record: TokenRecord) -> None:
        if self.fail:
            raise ValueError("a broken plugin")
        self.seen.append(record.query_position)


def test_plugins_observe_each_on_its_own(monkeypatch):
    monkeypatch.setattr(plugins, "_manager", None)
    manager = plugins.manager()
    broken, fine = _Plugin(True), _Plugin(False)
    manager.register(fine, "fine")
    manager.register(broken, "broken")
    with Delivery.from_urls(["memory:"]) as delivery:
        delivery.put(records(3))
    assert fine.seen == [0, 1, 2]
    stats = delivery.stats()
    assert stats["observer fine"]["written"] == stats["memory:"]["written"] == 3
    assert stats["observer broken"]["dropped"] == {"observer_failed": 3}


# -- from_urls


def test_from_urls(tmp_path):
    path = tmp_path / "records.jsonl"
    with Delivery.from_urls([f"jsonl:{path}", "memory:2"], queue_size=5, observe=False) as delivery:
        delivery.put(records(3))
    assert len(path.read_text().splitlines()) == 3
    assert [r.query_position for r in delivery.sinks["memory:2"].records] == [1, 2]


def test_from_urls_closes_what_it_opened_when_one_fails(monkeypatch):
    opened: list[Probe] = []

    def open_sink(url: str) -> Probe:
        if url == "bad:":
            raise PluginError("no such thing")
        opened.append(Probe())
        return opened[-1]

    monkeypatch.setattr("attnhook.sinks.delivery.open_sink", open_sink)
    with pytest.raises(PluginError, match="no such thing"):
        Delivery.from_urls(["a:", "b:", "bad:"])
    with pytest.raises(OptionError):
        Delivery.from_urls(["c:"], queue_size=-1)
    with pytest.raises(PluginError, match="'d:' is named twice"):
        Delivery.from_urls(["d:", "d:"])
    assert [sink.calls for sink in opened] == [["close"]] * 4


# -- signals, exits and forks: real processes

PRELUDE = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_delivery import Delivery, Sink, record, records
from attnhook.sinks.jsonl import JsonlSink

class Lines(Sink):
    # one line per record, written slowly
    def __init__(self, path, delay=0.0):
        self.delay = delay
        self.open(path)
    def open(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def write(self, batch):
        if self.delay:
            for r in batch:
                time.sleep(self.delay)
                os.write(self.fd, b"%d\\n" % r.query_position)
        else:
            os.write(self.fd, b"".join(b"%d\\n" % r.query_position for r in batch))

PATH = sys.argv[1]
"""


def start(path: Path, code: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        # under nohup this process ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()  # one that hangs is not left behind
    return process.returncode, out, err


def written(path: Path) -> list[int]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [int(line) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out"


def interrupt_when_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_loses_nothing_that_is_queued(path):
    process = start(
        path,
        """
        delivery = Delivery({"slow": Lines(PATH, 0.004)})
        for start in range(0, 200, 20):
            delivery.put(records(start, start + 20))
        print("ready", flush=True)
        time.sleep(30)
        """,
    )
    interrupt_when_ready(process)
    code, _, err = finish(process)
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert written(path) == list(range(200))


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_put_neither_loses_nor_locks(path, tmp_path):
    code = """
        delivery = Delivery({"lines": Lines(PATH)}, queue_size=10**9)
        done = 0
        try:
            batch = [record(0)]
            print("ready", flush=True)
            while True:
                delivery.put(batch)
                done += 1
        except KeyboardInterrupt:
            print(done)
    """
    for attempt in range(4):
        out = tmp_path / f"out{attempt}"
        process = start(out, code)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.02 * attempt)
        process.send_signal(signal.SIGINT)
        returncode, stdout, err = finish(process)
        assert returncode == 0, err
        # the interrupted put may have queued its record, and may not have been counted
        assert len(written(out)) - int(stdout) in (0, 1), err


@pytest.mark.slow
def test_ctrl_c_during_close_goes_on_at_exit(path):
    process = start(
        path,
        """
        delivery = Delivery({"slow": Lines(PATH, 0.005)})
        delivery.put(records(150))
        print("ready", flush=True)
        delivery.close()
        """,
    )
    interrupt_when_ready(process)
    code, _, err = finish(process)
    assert code == -signal.SIGINT, err
    assert written(path) == list(range(150))


@pytest.mark.slow
def test_an_uncaught_exception_loses_nothing_that_is_queued(path):
    code, _, err = finish(
        start(
            path,
            """
            def work():
                delivery = Delivery({"slow": Lines(PATH, 0.004), "failing": None}, observers=lambda r: None)
                delivery.put(records(200))
                raise LookupError("the script is broken")
            work()  # the delivery itself is forgotten
            """,
        )
    )
    assert code == 1
    assert "LookupError: the script is broken" in err
    assert "attention records were dropped, by sink and reason: {'failing': {'write_failed': 200}}" in err
    assert written(path) == list(range(200))


def test_a_hung_sink_is_given_up_at_exit_and_said_so(path):
    code, _, err = finish(
        start(
            path,
            """
            from attnhook.sinks import delivery
            delivery.STALL_SECONDS = 0.3
            Delivery({"hung": Lines(PATH, 3600), "fine": Lines(PATH)}).put(records(5))
            """,
        )
    )
    assert code == 0
    assert "gave up on hung: a write of 5 records does not end" in err
    assert written(path) == list(range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_writes_its_own_records_only(path):
    process = start(
        path,
        """
        class Slow(JsonlSink):
            def write(self, batch):
                for r in batch:
                    time.sleep(0.004)
                    super().write([r])
            def close(self):
                super().close()
                os.write(1, f"closed by {child}\\n".encode())  # print writes in parts, between which others write
        child = 0
        sink = Slow()
        sink.open(PATH)
        delivery = Delivery({"jsonl": sink})
        delivery.put(records(60))
        pids = []
        for child in (1, 2, 3):
            pid = os.fork()
            if pid == 0:
                sys.stdout.reconfigure(line_buffering=True)
                assert delivery.stats()["jsonl"] == {"queued": 0, "written": 0, "dropped": {}}
                if child == 3:
                    child = "a child that put nothing"
                    sys.exit()  # it puts nothing: the sink is not its to close
                delivery.put(records(1000 * child, 1000 * child + 60))
                sys.exit()
            pids.append(pid)
        delivery.put(records(60, 100))
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
        """,
    )
    code, out, err = finish(process)
    assert code == 0, err
    assert sorted(out.splitlines()) == ["closed by 1", "closed by 2", "closed by 3"]  # 3 is the parent
    lines = [json.loads(line)["query_position"] for line in path.read_text().splitlines()]
    assert [p for p in lines if p < 1000] == list(range(100))
    assert [p for p in lines if 1000 <= p < 2000] == list(range(1000, 1060))
    assert [p for p in lines if p >= 2000] == list(range(2000, 2060))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_multiprocessing_child_loses_nothing(path, tmp_path, method):
    # engines run their workers like this; a forked one leaves by os._exit, past atexit
    (tmp_path / "work.py").write_text(
        PRELUDE.replace("PATH = sys.argv[1]", f"PATH = {str(path)!r}")
        + textwrap.dedent("""
            def child():
                Delivery({"slow": Lines(PATH, 0.004)}).put(records(100))
            """)
    )
    code, _, err = finish(
        start(
            path,
            f"""
            import multiprocessing
            sys.path.insert(0, {str(tmp_path)!r})
            import work
            process = multiprocessing.get_context({method!r}).Process(target=work.child)
            process.start()
            process.join()
            sys.exit(process.exitcode)
            """,
        )
    )
    assert code == 0, err
    assert written(path) == list(range(100))


def test_a_signal_handler_may_put():
    sink = Probe()
    delivery = Delivery({"probe": sink}, queue_size=10**7)
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1
        delivery.put([record(-1)])

    previous = signal.signal(signal.SIGVTALRM, handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
    try:
        for i in range(30000):
            delivery.put([record(i)])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
    delivery.close()
    assert handled > 0
    assert [p for p in sink.positions if p >= 0] == list(range(30000))
    assert sink.positions.count(-1) == handled


def test_logging_goes_to_the_attnhook_logger():
    assert module.logger is logging.getLogger("attnhook")
