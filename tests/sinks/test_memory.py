"""memory: keeps all records, or the newest ones."""

from __future__ import annotations

import numpy as np
import pytest

from attnhook.errors import PluginError
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink


def records(count: int) -> list[TokenRecord]:
    empty = np.zeros((1, 0), np.float32)
    return [
        TokenRecord("r", i, (0,), empty.astype(np.int32), empty, np.zeros((1, 20), np.float32)) for i in range(count)
    ]


def test_keeps_every_record_in_order():
    sink, batch = open_sink("memory:"), records(5)
    sink.write(batch[:2])
    sink.write(batch[2:])
    sink.flush()
    assert sink.records == batch


def test_keeps_the_newest_records():
    sink, batch = open_sink("memory:3"), records(10)
    sink.write(batch[:2])
    assert sink.records == batch[:2]
    sink.write(batch[2:])
    assert sink.records == batch[-3:]


def test_records_stay_readable_after_close_and_are_a_copy():
    sink, batch = open_sink("memory:"), records(2)
    sink.write(batch)
    sink.close()
    sink.close()
    sink.records.clear()
    assert sink.records == batch


@pytest.mark.parametrize("config", ["0", "-1", "many", "1.5", "1e3", " ", "²"])
def test_a_bad_limit_says_what_to_write(config):
    with pytest.raises(PluginError, match=r"memory:1000") as caught:
        open_sink(f"memory:{config}")
    assert repr(config) in str(caught.value)
