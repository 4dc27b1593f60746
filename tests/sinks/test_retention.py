"""Retention: what is too old goes, and no clock that jumps can empty a store."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

import pytest

from attnhook.record import columns
from attnhook.sinks import journal, retention
from attnhook.sinks.opening import open_sink
from attnhook.sinks.retention import DAY_US
from attnhook.store import open_store
from tests.sinks.samples import record

STORES = ("sqlite:{}/records.db", "parquet:{}/records")


class Clocks:
    """The wall clock and the machine's own, both set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.machine = 20_000 * DAY_US, 1000.0
        for module in (columns, journal, retention):
            monkeypatch.setattr(module, "now_us", lambda: self.wall)
        monkeypatch.setattr(retention, "_elapsed", lambda: self.machine)

    def pass_days(self, days: float) -> None:
        self.wall += int(days * DAY_US)
        self.machine += days * 86400


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def positions(url: str) -> list[int]:
    with open_store(url) as store:
        return sorted(row.query_position for row in store.records())


@pytest.mark.parametrize("make", STORES)
def test_days_pass(make, tmp_path: Path, clocks: Clocks):
    url = make.format(tmp_path) + "?keep_days=3"
    for day in range(6):
        sink = open_sink(url)
        sink.write([record(day)])
        sink.close()
        clocks.pass_days(1)
    open_sink(url).close()
    assert positions(url) == [3, 4, 5]


@pytest.mark.parametrize("make", STORES)
def test_a_writer_that_runs_for_days_prunes_as_it_goes(make, tmp_path: Path, clocks: Clocks):
    url = make.format(tmp_path) + "?keep_days=3"
    sink = open_sink(url)
    for day in range(6):
        sink.write([record(day)])
        if hasattr(sink, "publish"):
            sink.publish()
        clocks.pass_days(1)
    sink.write([record(9)])
    sink.close()
    assert positions(url) == [3, 4, 5, 9]


@pytest.mark.parametrize("make", STORES)
@pytest.mark.parametrize("jump", [400, -400])
def test_a_clock_that_jumps_removes_nothing(make, jump, tmp_path: Path, clocks: Clocks, caplog):
    url = make.format(tmp_path) + "?keep_days=3"
    sink = open_sink(url)
    sink.write([record(0)])
    if hasattr(sink, "publish"):
        sink.publish()
    clocks.wall += jump * DAY_US
    clocks.machine += 3600
    with caplog.at_level(logging.WARNING, "attnhook"):
        sink.write([record(1)])
        sink.write([record(2)])
    assert "the clock jumped" in caplog.text
    sink.close()
    assert positions(url) == [0, 1, 2]


@pytest.mark.parametrize("make", STORES)
def test_a_store_that_rested_is_not_emptied_when_it_is_opened(make, tmp_path: Path, clocks: Clocks):
    url = make.format(tmp_path) + "?keep_days=3"
    sink = open_sink(url)
    sink.write([record(0)])
    sink.close()
    clocks.pass_days(400)  # or a clock that is wrong from the start
    sink = open_sink(url)
    assert positions(url) == [0]
    sink.write([record(1)])
    sink.close()
    clocks.pass_days(0.1)
    open_sink(url).close()
    assert positions(url) == [1]  # new records show that the time has passed


def test_pruning_that_fails_does_not_fail_the_write(tmp_path: Path, clocks: Clocks, caplog):
    url = f"sqlite:{tmp_path}/records.db"
    sink = open_sink(url + "?keep_days=1")
    sink.write([record(0)])
    clocks.pass_days(0.5)
    sink.write([record(1)])
    blocker = sqlite3.connect(tmp_path / "records.db")
    blocker.execute("CREATE TRIGGER stop BEFORE DELETE ON records BEGIN SELECT RAISE(ABORT, 'stop'); END")
    clocks.pass_days(1)
    sink.write([record(2)])
    assert "older than 1 days could not be removed: stop" in caplog.text
    assert (sink.written, positions(url)) == (3, [0, 1, 2])
    blocker.execute("DROP TRIGGER stop")
    clocks.pass_days(0.01)
    sink.write([record(3)])
    sink.close()
    assert positions(url) == [2, 3]


def test_without_days_nothing_is_asked():
    keep = retention.Retention(None)
    assert keep.due(lambda: pytest.fail("asked")) is None


def test_the_store_is_asked_every_ten_minutes(clocks: Clocks):
    asked = []
    keep = retention.Retention(2)
    for _ in range(100):
        keep.due(lambda: asked.append(1))
        clocks.pass_days(60 / 86400)
    assert len(asked) == 10


def test_the_real_clocks_agree():
    keep = retention.Retention(1)
    now = time.time_ns() // 1000
    assert keep.due(lambda: now) == pytest.approx(now - DAY_US, abs=60e6)
    assert keep.due(lambda: now) is None
