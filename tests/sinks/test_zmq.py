"""The zmq sink against a real PULL socket."""

from __future__ import annotations

import time

import pytest
import zmq

from attnhook.errors import DroppedError, PluginError
from attnhook.record.block import read_rows
from attnhook.sinks import frames
from attnhook.sinks import zmq as zmq_sink
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.opening import open_sink
from attnhook.sinks.zmq import ZmqSink
from tests.record.samples import assert_same
from tests.sinks.samples import record, with_ids


@pytest.fixture
def pull():
    with zmq.Context() as context, context.socket(zmq.PULL) as found:
        found.linger = 0
        found.rcvtimeo = 60_000
        found.bind("tcp://127.0.0.1:*")
        yield found, found.getsockopt_string(zmq.LAST_ENDPOINT)


def test_frames_are_numbered_and_the_last_one_says_how_many(pull):
    pull, address = pull
    sink = ZmqSink()
    sink.open(address)
    batches = [[record(0), record(1)], [record(2)]]
    for batch in batches:
        sink.write(batch)
    sink.close()
    sink.close()
    first, second, end = (frames.decode(pull.recv()) for _ in range(3))
    assert [(f.first, f.rows, f.end) for f in (first, second)] == [
        (0, [one.to_bytes() for one in batches[0]], False),
        (2, [one.to_bytes() for one in batches[1]], False),
    ]
    assert (end.first, end.end, end.dropped) == (3, True, {})
    assert first.producer == second.producer == end.producer


def test_token_ids_travel_only_where_the_url_asks(pull):
    pull, address = pull
    for option, expected in (("", None), ("?tokens=1", 101)):
        sink = open_sink(f"zmq:{address}{option}")
        sink.write([with_ids(1), record(2)])
        sink.close()
        rows = frames.decode(pull.recv()).rows
        assert frames.decode(pull.recv()).end
        block, bad = read_rows(rows)
        assert not bad
        one, bare = block.records()
        assert_same(one, with_ids(1) if expected else record(1))
        assert_same(bare, record(2))
        assert block.columns(0).query_token == [expected, None]


@pytest.mark.slow
def test_without_a_collector_it_never_waits_and_counts_what_it_drops():
    sink = ZmqSink()
    sink.open("tcp://127.0.0.1:9?hwm=3&linger=1s")
    batch = [record(i) for i in range(10)]
    for _ in range(3):
        sink.write(batch)
    for dropped in (10, 20):
        with pytest.raises(DroppedError, match="3 frames wait already") as error:
            sink.write(batch)
        assert (error.value.reason, error.value.count) == ("collector_busy", 10)
        assert sink.dropped == {"collector_busy": dropped}
    assert sink.sent == 30
    with pytest.raises(DroppedError):  # nobody takes it, so it is not even looked at
        sink.write([record(request_id="\ud800")])
    sink.close()  # the linger of a second, then it lets go


@pytest.mark.slow
def test_a_delivery_counts_the_drops_by_their_reason():
    sink = ZmqSink()
    sink.open("tcp://127.0.0.1:9?hwm=1&linger=1s")
    with Delivery({"zmq": sink}) as delivery:
        delivery.put([record(0)])
        assert delivery.flush(60)
        delivery.put([record(1), record(2)])
        assert delivery.flush(60)
        stats = delivery.stats()["zmq"]
    assert stats == {"queued": 0, "written": 1, "dropped": {"collector_busy": 2}}


@pytest.mark.slow
def test_a_large_batch_is_divided_and_a_drop_counts_only_its_rest(pull, monkeypatch):
    pull, address = pull
    monkeypatch.setattr(zmq_sink, "_FRAME_BYTES", 3 * len(record().to_bytes()))
    sink = ZmqSink()
    sink.open(address)
    batch = [record(i) for i in range(8)]
    sink.write(batch)
    found = [frames.decode(pull.recv()) for _ in range(3)]
    assert [(f.first, len(f.rows)) for f in found] == [(0, 3), (3, 3), (6, 2)]
    assert [row for f in found for row in f.rows] == [one.to_bytes() for one in batch]
    sink.close()
    late = ZmqSink()
    late.open("tcp://127.0.0.1:9?hwm=2&linger=1s")
    with pytest.raises(DroppedError) as error:
        late.write(batch)
    assert error.value.count == 2 and late.sent == 6
    late.close()


@pytest.mark.slow
def test_a_collector_that_comes_later_gets_what_waited():
    with zmq.Context() as context:
        probe = context.socket(zmq.PULL)
        probe.bind("tcp://127.0.0.1:*")
        address = probe.getsockopt_string(zmq.LAST_ENDPOINT)
        probe.close(0)
        time.sleep(0.2)
        sink = ZmqSink()
        sink.open(address)
        sink.write([record(0)])
        pull = context.socket(zmq.PULL)
        pull.rcvtimeo = 60_000
        pull.bind(address)
        assert frames.decode(pull.recv()).rows == [record(0).to_bytes()]
        pull.close(0)
        sink.close()


@pytest.mark.parametrize(
    "config", ["", "127.0.0.1:9001", "tcp://", "tcp://127.0.0.1", "nonsense://x", "tcp://127.0.0.1:x"]
)
def test_bad_addresses_are_refused(config):
    with pytest.raises(PluginError, match=r"write one such as zmq:tcp://127\.0\.0\.1:9001"):
        ZmqSink().open(config)


def test_bad_options_are_refused():
    for config in ("tcp://127.0.0.1:9?hwm=0", "tcp://127.0.0.1:9?linger=5", "tcp://127.0.0.1:9?hwn=5"):
        with pytest.raises(PluginError):
            open_sink(f"zmq:{config}")
