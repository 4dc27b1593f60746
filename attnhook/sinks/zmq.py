"""The sink that sends records to a collector over ZeroMQ."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from attnhook.errors import DroppedError, PluginError, RecordError, needs
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import config

HIGH_WATER_MARK = 64  # frames that may wait here; the system's sockets hold some more
LINGER_SECONDS = 5.0
_FRAME_BYTES = 8 * 2**20  # of records in a frame: half of what a collector takes
_ROW_BYTES = 15 * 2**20  # of one record, which may need a frame of its own


class ZmqSink(Sink):
    """``zmq:tcp://127.0.0.1:9001``: a PUSH socket that connects to ``attnhook collect``; ``?hwm=64``, ``?linger=5s``.

    Delivery guarantee: at most once. `write` never waits. What was handed over waits in memory while the collector
    is away, at most ``hwm`` frames of up to 1024 records each behind a `Delivery`; beyond that whole frames are
    dropped, counted in `dropped` (``collector_busy``) and raised as DroppedError. Frames that were on their way when
    a collector was killed are lost; they are numbered, so that the collector counts them. `close` waits ``linger``
    for what is left.
    """

    def __init__(self) -> None:
        self.sent = 0  #: records handed to ZeroMQ since `open`
        self.dropped: Counter[str] = Counter()  #: records, by reason
        self._address = ""
        self._hwm = HIGH_WATER_MARK
        self._linger = LINGER_SECONDS
        self._context: Any = None
        self._socket: Any = None
        self._pid = 0
        self._producer = b""

    def open(self, config_text: str) -> None:
        """Begin to connect; the collector may start later.

        Raises PluginError for an address that ZeroMQ does not know, or without pyzmq and msgspec.
        """
        known = {"hwm": config.between(1, 100_000), "linger": config.seconds}
        self._address, options = config.parse("zmq", config_text, known)
        self._hwm = options.get("hwm", HIGH_WATER_MARK)
        self._linger = options.get("linger", LINGER_SECONDS)
        with needs("the sink zmq:", "sinks"):
            import msgspec  # noqa: F401
            import zmq
        try:
            self._connect()
        except (zmq.ZMQError, ValueError) as error:
            self._let_go(0)
            raise PluginError(
                f"sink zmq:{config_text} cannot connect: {error}; write one such as zmq:tcp://127.0.0.1:9001"
            ) from error

    def _connect(self) -> None:
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, self._hwm)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        # a collector whose host went away is noticed by the system: libzmq's own heartbeats can end the process that
        # receives them, and take one that lags for one that is gone
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 6)
        self._socket.connect(self._address)
        self._pid = os.getpid()
        self._producer = uuid.uuid4().bytes
        self.sent = 0
        self.dropped = Counter()

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Hand the records over.

        Raises DroppedError where the high-water mark is reached (the records before that count are on their way),
        RecordError where a record does not fit the binary row or a frame (none of the batch is sent). Where there is
        no room at all, no record is looked at.
        """
        from attnhook.sinks import frames

        if self._socket is None:
            raise ValueError(f"sink zmq:{self._address} is closed")
        if self._pid != os.getpid():  # forked: ZeroMQ's threads are the parent's
            self._connect()
        if batch and not self._has_room():
            raise self._drop(len(batch))  # before they are encoded: a collector that lags is to cost nothing here
        rows = [record.to_bytes() for record in batch]
        for record, row in zip(batch, rows, strict=True):
            if len(row) > _ROW_BYTES:
                raise RecordError(
                    f"record {record.key!r} takes {len(row)} bytes and a collector at most {_ROW_BYTES}: capture fewer "
                    "layers or a smaller top k"
                )
        for start, stop in _pieces(rows):
            data = frames.encode(self._producer, self.sent, self.dropped, rows[start:stop])
            if not self._send(data):
                raise self._drop(len(rows) - start)
            self.sent += stop - start

    def close(self) -> None:
        """Tell the collector how many records were sent, and wait ``linger`` seconds for what is on its way."""
        if self._socket is None:
            return
        if self._pid != os.getpid():  # the parent's, and nothing was written here
            self._context = self._socket = None
            return
        from attnhook.sinks import frames

        if self.sent or self.dropped:
            import zmq

            if self._socket.poll(int(self._linger * 1000), zmq.POLLOUT):
                self._send(frames.encode_end(self._producer, self.sent, self.dropped))
        self._let_go(int(self._linger * 1000))

    def _has_room(self) -> bool:
        import zmq

        return bool(self._socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT)

    def _drop(self, count: int) -> DroppedError:
        self.dropped["collector_busy"] += count
        return DroppedError(
            "collector_busy",
            count,
            f"{count} records dropped: {self._hwm} frames wait already for the collector at {self._address}; see that "
            "it runs and keeps up, or allow more with ?hwm=",
        )

    def _send(self, data: bytes) -> bool:
        import zmq

        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _let_go(self, linger: int) -> None:
        connection, self._socket = self._socket, None
        context, self._context = self._context, None
        if connection is not None:
            connection.close(linger)
        if context is not None:
            context.term()  # waits for the linger


def _pieces(rows: Sequence[bytes]) -> list[tuple[int, int]]:
    """Slices of rows that make one frame each."""
    from attnhook.sinks.frames import MAX_ROWS

    pieces, start, size = [], 0, 0
    for i, row in enumerate(rows):
        if i - start == MAX_ROWS or (size and size + len(row) > _FRAME_BYTES):
            pieces.append((start, i))
            start, size = i, 0
        size += len(row)
    if rows:
        pieces.append((start, len(rows)))
    return pieces
