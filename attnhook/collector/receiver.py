"""The collector's socket: a thread that takes messages from the PUSH sockets of producers."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable

from attnhook.collector import peers
from attnhook.collector.peers import Connection
from attnhook.collector.zmtp import ProtocolError
from attnhook.errors import PluginError
from attnhook.sinks.frames import MAX_BYTES
from attnhook.system.addresses import host_port, is_loopback, listener

logger = logging.getLogger("attnhook")

_CHUNK = 256 * 2**10  # bytes read from a connection at once
_POLL_SECONDS = 0.1
_QUIET_POLLS = 4  # at the end: so many in a row found nothing
_LOOK_BYTES = 16 * 2**20  # read between two looks at how much is held
_READS = 64  # a round
_OTHER_READS = 16  # of connections that have sent nothing good
_TIGHT_READS = 2  # of either kind, where memory is short
_SMALL = 16  # messages of one connection in a round
_ROUND_SECONDS = 0.02  # after which a connection's next message waits for the next round
_TURN_SECONDS = 30.0  # at most, that a connection which was not read counts as silent
_PAUSE = 4.0  # bad messages get a fifth of the time: after each, so many times what it took goes to others


class Receiver:
    """Listens on ``address`` (``tcp://host:port`` or ``ipc://path``) and calls ``handle`` with each message.

    ``handle`` says whether the message was good. In each round every connection whose messages are good gets its
    turn, then one new connection, then one whose latest messages were bad. What connections hold together is bounded
    (`peers`). Raises PluginError where it cannot listen.
    """

    def __init__(self, address: str, handle: Callable[[bytes], bool]) -> None:
        self._handle = handle
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # with a whole message, in the order of their coming
        self._into = bytearray(_CHUNK)
        self._most = peers.most_connections()
        self._bad_after = self._swept = 0.0
        self._unseen = 0  # bytes read since memory was looked at, at most
        self._tight = False
        self.closed: Counter[str] = peers.no_counts()  #: connections that were closed here, by reason
        self.failed = 0  #: faults of the collector itself, as a rule while it handled a message
        self._stop: float | None = None
        self._quiet = False
        self._thread = threading.Thread(target=self._run, name="attnhook receiver", daemon=True)
        self._listener, self.address = _listen(address)
        self._path = self.address.removeprefix("ipc://") if self.address.startswith("ipc://") else ""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def start(self) -> None:
        """Begin to take messages."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take what is on its way, for at most ``seconds``, and close; whether nothing more came at the end."""
        self._stop = time.monotonic() + seconds
        self._thread.join()
        return self._quiet

    def close(self) -> None:
        """Let go of every socket."""
        for one in list(self._connections):
            self._end(one)
        self._selector.close()
        self._listener.close()
        if self._path and not self._path.startswith("@") and os.path.exists(self._path):
            os.unlink(self._path)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def connected(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    @property
    def strangers(self) -> int:
        """Connections that do not speak ZeroMQ's protocol, or did not finish its handshake."""
        return self.closed["stranger"] + self.closed["handshake_timeout"]

    def _run(self) -> None:
        empty = 0
        try:
            while True:
                some = self._safe_round()
                if self._stop is not None:
                    empty = 0 if some else empty + 1
                    self._quiet = empty >= _QUIET_POLLS
                    if self._quiet or time.monotonic() > self._stop:
                        return
        finally:
            self.close()

    def _safe_round(self) -> bool:
        """`_round`; a fault in it is told of and counted, and ends no intake."""
        try:
            return self._round()
        except Exception:
            self.failed += 1
            if self.failed == 1:
                logger.exception("a fault in the receiver; it is counted, later ones are not logged")
            time.sleep(_POLL_SECONDS)
            return False

    def _round(self) -> bool:
        """Read and handle what there is; whether there was something."""
        events = self._selector.select(self._patience())
        found = [key.data for key, _ in events if key.data is not None]
        if len(found) < len(events):
            self._accept()
        self._read_some([one for one in found if one.trust > 0], _READS)
        self._read_some([one for one in found if one.trust <= 0], _OTHER_READS)
        self._bound()
        self._serve()
        now = time.monotonic()
        if now - self._swept > 1:
            self._swept = now
            for one, reason in peers.late(self._connections, now):
                self._end(one, reason)
        return bool(events) or bool(self._waiting)

    def _patience(self) -> float:
        """Seconds to wait for bytes: none while a message waits that may be handled."""
        if any(one.trust >= 0 for one in self._waiting):
            return 0.0
        if self._waiting:
            return min(max(self._bad_after - time.monotonic(), 0.0), _POLL_SECONDS)
        return _POLL_SECONDS

    def _read_some(self, found: list[Connection], most: int) -> None:
        """Read connections that have sent something: in turn, and where memory is short those that hold most."""
        if self._tight:
            found.sort(key=lambda one: -one.held)
            most = _TIGHT_READS
        else:
            found.sort(key=lambda one: one.heard)
        now = time.monotonic()
        for one in found[most:]:
            one.heard = max(one.heard, now - _TURN_SECONDS)  # it goes on; it is we who do not read
        for one in found[:most]:
            if one in self._connections:  # it may have made room for a newcomer just now
                self._read(one)

    def _bound(self) -> None:
        """Close connections until they hold no more than they may; looked at after some reading, not after each."""
        if self._unseen < _LOOK_BYTES and not self._tight:
            return
        self._unseen = 0
        while (held := sum(one.held for one in self._connections)) > peers.BUDGET_BYTES:
            victim = peers.heaviest(self._connections)
            if victim is None:
                break
            self._end(victim, "memory")
        self._tight = held > peers.BUDGET_BYTES // 4

    def _accept(self) -> None:
        for _ in range(_OTHER_READS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor is left, or the peer is gone already
                self._make_room()
                time.sleep(0.01)
                return
            if len(self._connections) >= self._most and not self._make_room():
                sock.close()
                self.closed["crowded"] += 1
                continue
            sock.setblocking(False)
            if not self._path:
                peers.keep_alive(sock)
            one = Connection(sock, MAX_BYTES)
            self._connections.add(one)
            self._selector.register(sock, selectors.EVENT_READ, one)
            if not one.answer():
                self._end(one)

    def _make_room(self) -> bool:
        victim = peers.least(self._connections, time.monotonic())
        if victim is not None:
            self._end(victim, "crowded")
        return victim is not None

    def _read(self, one: Connection) -> None:
        self._unseen += _CHUNK
        try:
            if not one.read(self._into):
                self._end(one)
                return
        except ProtocolError as error:
            self._refuse(one, error)
            return
        if one.message is not None:  # no more is read until it is handled: the rest waits at the producer
            self._selector.unregister(one.sock)
            self._waiting[one] = None

    def _serve(self) -> None:
        """Handle the messages whose turn it is."""
        waiting = list(self._waiting)
        for one in waiting:
            if one.trust > 0:
                began = time.monotonic()
                for _ in range(_SMALL):
                    if not self._handle_one(one) or one.trust <= 0 or time.monotonic() - began > _ROUND_SECONDS:
                        break
        fresh = next((one for one in waiting if one.trust == 0 and one in self._waiting), None)
        if fresh is not None:
            self._handle_one(fresh)
        bad = next((one for one in waiting if one.trust < 0 and one in self._waiting), None)
        if bad is not None and time.monotonic() >= self._bad_after:
            self._handle_one(bad)

    def _handle_one(self, one: Connection) -> bool:
        """Handle a connection's message and look for its next one; whether there is one."""
        message, one.message = one.message, None
        del self._waiting[one]
        if message is None:
            return False
        began = time.monotonic()
        try:
            good = self._handle(message)
        except Exception:
            good = False
            self.failed += 1
            if self.failed == 1:
                logger.exception("a message could not be handled; it is counted, later ones are not logged")
        del message
        one.judge(good)
        if not good:
            ended = time.monotonic()
            self._bad_after = ended + _PAUSE * (ended - began)
        try:
            one.message = one.peer.take()
        except ProtocolError as error:
            self._refuse(one, error, registered=False)
            return False
        if one.message is not None:
            self._waiting[one] = None
            return True
        self._selector.register(one.sock, selectors.EVENT_READ, one)
        return False

    def _refuse(self, one: Connection, error: ProtocolError, *, registered: bool = True) -> None:
        if not self.closed[error.reason]:
            logger.warning("a connection was closed (%s): %s (counted; later ones are not logged)", error.reason, error)
        self._end(one, error.reason, registered=registered)

    def _end(self, one: Connection, reason: str | None = None, *, registered: bool = True) -> None:
        if one not in self._connections:
            return
        if reason is not None:
            self.closed[reason] += 1
        self._connections.remove(one)
        if one in self._waiting:
            del self._waiting[one]
        elif registered:
            self._selector.unregister(one.sock)
        one.sock.close()


def _listen(address: str) -> tuple[socket.socket, str]:
    """A socket that listens, and its address with the port that the system chose."""
    scheme, _, rest = address.partition("://")
    if scheme not in ("tcp", "ipc") or not rest:
        raise PluginError(f"cannot listen on {address!r}: write an address such as tcp://127.0.0.1:9001")
    if scheme == "ipc":
        return _listen_ipc(rest), address
    text, _, port_text = rest.rpartition(":")
    host, port = host_port(f"{text}:0" if port_text == "*" else rest, user="--listen")
    if host == "*":
        host = "0.0.0.0"
    if not is_loopback(host):
        logger.warning(
            "%s can be reached from other machines, and whoever reaches it can send records: keep it in a private "
            "network",
            address,
        )
    sock = listener(host, port, user="--listen")
    return sock, f"tcp://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def _listen_ipc(path: str) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise PluginError(f"cannot listen on ipc://{path}: this system has no such sockets; use tcp://127.0.0.1:9001")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not path.startswith("@") and os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(path) == 0:
                    raise PluginError(
                        f"cannot listen on ipc://{path}: another process listens there: stop it or choose another path"
                    )
            os.unlink(path)  # a process that was killed left it
        sock.bind("\0" + path[1:] if path.startswith("@") else path)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise PluginError(
            f"cannot listen on ipc://{path}: {error}; name a short path in a folder that can be written to"
        ) from error
    except PluginError:
        sock.close()
        raise
    return sock
