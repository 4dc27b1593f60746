"""The running counts are those that one would count by hand, and no clock can spoil them."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnhook.record import fingerprint as fp
from attnhook.record.tally import BOUNDS, Tally
from attnhook.record.zones import ZONE_NAMES
from attnhook.sinks import metrics


class Clock:
    """Monotonic seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fill(tally: Tally, entropies: list[float], zones: list[int], ids: list[str], *, prompt: int = 0) -> None:
    fingerprints = np.zeros((len(ids), fp.SIZE), np.float32)
    fingerprints[:, fp.ENTROPY] = entropies
    steps = np.array([-1] * prompt + [0] * (len(ids) - prompt), np.int32)
    tally.add(fingerprints, np.array(zones, np.int8), ids, steps)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4), st.sampled_from("abc")), min_size=1, max_size=40))
def test_histograms_zones_and_requests(rows):
    tally = Tally(Clock())
    entropies = [row[0] / 20 for row in rows]  # exactly on the bounds, where float32 rounds up and down
    fill(tally, entropies, [row[1] for row in rows], [row[2] for row in rows])
    found = tally.snapshot()
    counts = found["histograms"]["entropy"]["counts"]
    for bound, seen in zip(BOUNDS, np.cumsum(counts), strict=False):
        assert seen == sum(value <= bound for value in entropies)
    assert counts[-1] == 0
    assert found["zones"] == {
        name: round(sum(row[1] == code for row in rows) / len(rows), 4) for code, name in enumerate(ZONE_NAMES)
    }
    of_request = {request["request_id"]: request for request in found["top_requests"]}
    for name in {row[2] for row in rows}:
        own = [row for row in rows if row[2] == name]
        assert of_request[name]["records"] == len(own)
        assert abs(of_request[name]["entropy"] - sum(row[0] for row in own) / 20 / len(own)) < 1e-3
    order = [request["records"] for request in found["top_requests"]]
    assert order == sorted(order, reverse=True)


def test_the_last_minute_forgets_and_the_rate_is_that_of_ten_seconds():
    clock = Clock()
    tally = Tally(clock)
    for second in range(200):
        zone = 0 if second < 100 else 4
        fill(tally, [0.5] * 10, [zone] * 10, [f"r{second}"] * 10, prompt=1)
        clock.now += 1
    found = tally.snapshot(top=3)
    assert found["records"] == 2000 and found["prompt_records"] == 200
    assert found["zones"]["syntax_floor"] == 0.5
    assert found["recent"]["zones"] == {name: float(name == "diffuse") for name in ZONE_NAMES}
    assert 8 <= found["recent"]["rate"] <= 11
    assert 59 <= found["recent"]["seconds"] <= 61
    assert len(found["top_requests"]) == 3
    clock.now += 1000
    quiet = tally.snapshot()
    assert quiet["recent"]["rate"] == 0 and quiet["top_requests"] == []
    assert quiet["recent"]["means"]["entropy"] is None


def test_memory_is_bounded_whatever_the_number_of_requests():
    clock = Clock()
    tally = Tally(clock)
    for i in range(100):
        fill(tally, [0.1] * 100, [0] * 100, [f"{i}-{j}" for j in range(100)])
        clock.now += 0.5
    assert len(tally._requests) == 4096
    assert len(tally._past) <= 62
    assert tally.snapshot()["records"] == 10_000


def test_metrics_are_of_one_moment_while_another_thread_counts():
    """Each scrape adds up: as many records by zone and in each histogram as there are."""
    tally = Tally()
    stop = threading.Event()
    ids = [str(i) for i in range(8)]

    def count() -> None:
        while not stop.is_set():
            fill(tally, [1.0] * 8, [0, 1, 2, 3, 4, 0, 1, 2], ids)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        seen = set()
        deadline = time.monotonic() + 60
        while len(seen) < 300 and time.monotonic() < deadline:
            samples = [sample for family in metrics.of_tally(tally) for sample in family.samples]
            totals = {
                kind: sum(sample.value for sample in samples if sample.name == kind)
                for kind in ("attnhook_records_total", "attnhook_zone_records_total", "attnhook_entropy_ratio_count",
                             "attnhook_entropy_ratio_sum")
            }  # fmt: skip
            assert len(set(totals.values())) == 1, totals
            seen.add(totals["attnhook_records_total"])
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert len(seen) == 300
