"""Half a minute of the soak whose ten minutes are `python -m benchmarks.soak`."""

from __future__ import annotations

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
@pytest.mark.long
def test_memory_stays_flat_and_every_record_is_accounted_for():
    # past what SQLite's page cache holds; a leak of the frames themselves would show as hundreds of percent
    found = soak(15, 2000, fill=170_000)
    assert found.exact, found
    assert found.sent >= 170_000
    assert found.growth < 15, found
