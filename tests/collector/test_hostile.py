"""Ten seconds of the hostile peers whose five minutes are `python -m benchmarks.hostile_collector`."""

from __future__ import annotations

import pytest

from benchmarks.hostile_collector import hostile


@pytest.mark.slow
def test_beside_hostile_peers_an_honest_producer_loses_nothing_and_memory_is_bounded():
    found = hostile(10, rate=500)
    assert found.clean, found
    assert found.sent >= 4500
    assert found.peak < 1024, found
    assert found.stats["messages"]["failed"] == 0
    # all kinds came through to where they are refused
    assert all(found.stats["messages"]["rejected"][kind] for kind in ("damaged_frame", "not_msgpack", "not_a_frame"))
    assert found.stats["connections"]["closed"]["stranger"] and found.stats["records"]["bad"]["damaged_record"]
    assert set(found.stats["producers"]["dropped"]) <= {"other", "collector_busy"}
