"""The drift monitor beside a collector: it sees what is received, tells its state, and holds up nothing."""

from __future__ import annotations

import json
import threading
import tracemalloc

import numpy as np
import pytest

from attnhook.analysis import drift
from attnhook.analysis.drift import Baseline, DriftMonitor, DriftSettings
from attnhook.collector.drift import DriftWatch
from attnhook.record.block import RowBlock, read_rows
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.zmq import ZmqSink
from benchmarks.drift import traffic
from tests.collector.processes import collect, wait_for

SETTINGS = DriftSettings(window=10, false_alarm_rate=0.01, horizon=50, simulations=2000)


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    means = traffic(np.random.default_rng(1), 300)
    return drift.fit(means, settings=SETTINGS, model="m", rows="generated")


def records(means: np.ndarray, name: str, *, model: str = "m", prompt: bool = False) -> list[TokenRecord]:
    """A generated row (or a prompt row) of each request."""
    return [
        TokenRecord(
            request_id=f"{name}-{i}",
            query_position=9,
            layers=(0,),
            token_positions=np.zeros((1, 0), np.int32),
            attention_scores=np.zeros((1, 0), np.float32),
            fingerprints=mean[None].astype(np.float32),
            decode_step=None if prompt else 0,
            mode="fingerprint",
            model=model,
        )
        for i, mean in enumerate(means)
    ]


def block(rows: list[TokenRecord]) -> RowBlock:
    """The rows as the receiver has them."""
    return read_rows([row.to_bytes() for row in rows])[0]


@pytest.mark.slow
def test_a_collector_tells_of_drift_and_stores_everything(baseline, tmp_path):
    drift.save(baseline, tmp_path / "base.npz")
    rng = np.random.default_rng(3)
    options = ("--store", "sqlite:x.db", "--drift-baseline", "base.npz", "--drift-idle", "0.2")
    with collect(tmp_path, *options) as collector:
        assert collector.stats()["drift"]["state"] == "filling"
        sink = ZmqSink()
        sink.open(collector.address)
        sink.write(records(traffic(rng, 30), "same"))
        sink.write(records(traffic(rng, 5), "other", model="n"))
        sink.write(records(traffic(rng, 5), "prompt", prompt=True))

        def finished(count: int) -> dict | None:
            found = collector.stats()["drift"]
            return found if found["requests"] == count else None

        found = wait_for(lambda: finished(30), "30 requests finished")
        assert found["state"] in ("ok", "warning") and found["alarms"] == 0
        assert found["skipped"] == {"other_model": 5, "other_rows": 5}
        assert (found["false_alarm_rate"], found["horizon"], found["window"]) == (0.01, 50, 10)

        sink.write(records(traffic(rng, 20, shift=3), "moved"))
        sink.close()
        found = wait_for(lambda: finished(50), "50 requests finished")
        assert (found["state"], found["alarms"], found["error"]) == ("alarm", 1, "")
        assert found["statistic"] > found["alarm"] == pytest.approx(baseline.alarm)
        text = collector.get("/metrics")[1].decode()
        assert 'attnhook_drift_state{state="alarm"} 1.0' in text and 'attnhook_drift_state{state="ok"} 0.0' in text
        assert "attnhook_drift_alarms_total 1.0" in text
        assert 'attnhook_drift_skipped_records_total{reason="other_model"} 5.0' in text
        stats = wait_for(
            lambda: (s := collector.stats())["stores"]["sqlite:x.db"]["written"] == 60 and s, "60 records written"
        )
        assert stats["records"]["lost"] == 0 and stats["problems"] == []


def test_without_a_baseline_nothing_is_said_and_a_bad_one_stops_the_start(tmp_path):
    with collect(tmp_path, "--store", "sqlite:x.db") as collector:
        assert "drift" not in collector.stats()
        assert b"attnhook_drift" not in collector.get("/metrics")[1]
    (tmp_path / "bad.npz").write_bytes(b"no baseline")
    with (
        pytest.raises(RuntimeError, match=r"bad\.npz is no baseline"),
        collect(tmp_path, "--store", "sqlite:x.db", "--drift-baseline", "bad.npz"),
    ):
        pass


def test_a_full_queue_is_counted_and_nobody_waits(baseline):
    watch = DriftWatch(baseline, frames=2)  # not started: nothing takes from its queue
    for i in range(5):
        watch.offer(block(records(traffic(np.random.default_rng(i), 4), f"r{i}")))
    assert watch.stats()["skipped"] == {"queue_full": 12}
    watch.stop()


def test_a_monitor_that_fails_is_told_and_goes_on(baseline, monkeypatch):
    watch = DriftWatch(baseline, idle_seconds=0)
    whole = DriftMonitor.add
    calls: list[int] = []

    def broken(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            raise ArithmeticError("planted")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(DriftMonitor, "add", broken)
    watch.start()
    for i in range(2):
        watch.offer(block(records(traffic(np.random.default_rng(i), 4), f"r{i}")))
    found = wait_for(lambda: (s := watch.stats())["requests"] == 4 and s, "the second block is looked at")
    assert found["skipped"] == {"failed": 4} and found["error"] == "ArithmeticError: planted"
    json.dumps(found)
    watch.stop()
    assert "attnhook drift" not in {thread.name for thread in threading.enumerate()}


def test_what_waits_is_bounded_by_rows_and_holds_no_long_names(baseline):
    watch = DriftWatch(baseline)  # its thread does not run
    long = records(traffic(np.random.default_rng(2), 2000), "x" * 2000, model="m" * 2000)
    rows = block(long)
    tracemalloc.start()
    for _ in range(100):
        watch.offer(rows)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert watch.stats()["skipped"] == {"queue_full": 35 * 2000}, "65 frames of 2,000 rows are 130,000"
    assert taken < 65 * 2000 * 400, "the names alone would be 500 MB"
    watch.start()
    wait_for(lambda: watch.stats()["skipped"].get("other_model") == 130_000, "all rows looked at")
    watch.offer(rows)
    watch.stop()
    assert watch.stats()["skipped"] == {"queue_full": 70_000, "other_model": 132_000}
