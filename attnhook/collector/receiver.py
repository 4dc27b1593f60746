"""The collector's socket: a thread that takes messages from a ZeroMQ PULL socket."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from attnhook.addresses import host_port, is_loopback, listen_remedy
from attnhook.errors import PluginError
from attnhook.frames import MAX_BYTES

logger = logging.getLogger("attnhook")

_WAITING = 64  # messages per producer that ZeroMQ holds for us
_POLL_MS = 100
_QUIET_POLLS = 4  # at the end: so many in a row found nothing; one alone may have come before ZeroMQ's own thread


class Receiver:
    """Listens on ``address`` (``tcp://host:port`` or ``ipc://path``) and calls ``handle`` with each message.

    ``strangers`` counts connections that do not speak ZeroMQ's protocol. Raises PluginError where it cannot listen.
    """

    def __init__(self, address: str, handle: Callable[[bytes], None]) -> None:
        import zmq

        self._zmq = zmq
        self._handle = handle
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _WAITING)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)  # longer ones end the connection, unread
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        self.strangers = 0
        self.failed = 0  #: messages whose handling raised: a fault in the collector
        self._stop: float | None = None
        self._thread = threading.Thread(target=self._run, name="attnhook receiver", daemon=True)
        try:
            _check(address)
            self._socket.bind(address)
        except (zmq.ZMQError, PluginError) as error:
            self._close()
            if isinstance(error, PluginError):
                raise
            raise PluginError(f"cannot listen on {address}: {error}; {listen_remedy(error.errno)}") from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )

    def start(self) -> None:
        """Begin to take messages."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take what is on its way, for at most ``seconds``, and close; whether nothing more came at the end."""
        self._stop = time.monotonic() + seconds
        self._thread.join()
        return self._quiet

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        zmq = self._zmq
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        self._quiet, empty = False, 0
        try:
            while True:
                ready = dict(poller.poll(_POLL_MS))
                if self._monitor in ready:
                    self._monitor.recv_multipart()
                    self.strangers += 1
                if self._socket in ready:
                    self._take()
                    empty = 0
                if self._stop is not None:
                    empty += not ready
                    self._quiet = empty >= _QUIET_POLLS
                    if self._quiet or time.monotonic() > self._stop:
                        return
        finally:
            self._close()

    def _take(self) -> None:
        for _ in range(32):  # then look at the rest again
            try:
                message = self._socket.recv_multipart(self._zmq.DONTWAIT)
            except self._zmq.Again:
                return
            try:
                self._handle(b"".join(message) if len(message) > 1 else message[0])
            except Exception:
                self.failed += 1
                if self.failed == 1:
                    logger.exception("a message could not be handled; it is counted, later ones are not logged")

    def _close(self) -> None:
        self._socket.close(0)
        self._context.destroy(0)


def _check(address: str) -> None:
    scheme, _, rest = address.partition("://")
    if scheme not in ("tcp", "ipc") or not rest:
        raise PluginError(f"cannot listen on {address!r}: write an address such as tcp://127.0.0.1:9001")
    if scheme == "tcp" and not rest.endswith(":*"):
        host, _ = host_port(rest, user="--listen")
        if not is_loopback(host):
            logger.warning(
                "%s can be reached from other machines, and whoever reaches it can send records: keep it in a private "
                "network",
                address,
            )
