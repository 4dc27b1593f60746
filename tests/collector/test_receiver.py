"""The collector's socket: real ZeroMQ peers, and peers that do not keep to the protocol."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from attnhook.collector import peers as limits
from attnhook.collector import receiver as receiver_module
from attnhook.collector.receiver import Receiver
from attnhook.collector.zmtp import Peer, ProtocolError
from attnhook.errors import PluginError
from attnhook.sinks.frames import MAX_BYTES
from tests.collector.peers import (
    GREETING,
    command,
    connect,
    die,
    ended,
    expect,
    message,
    ping,
    ready,
)
from tests.collector.processes import wait_for
from tests.helpers import environment


class Taken:
    """A receiver and what it took; what begins with ``bad`` is not good."""

    def __init__(self, address: str = "tcp://127.0.0.1:*", *, cost: float = 0.0) -> None:
        self.messages: list[bytes] = []
        self.cost = cost
        self.receiver = Receiver(address, self.handle)
        self.address = self.receiver.address
        self.receiver.start()

    def handle(self, data: bytes) -> bool:
        if data.startswith(b"bad"):
            time.sleep(self.cost)
            return False
        self.messages.append(data)
        return True


@pytest.fixture
def taken():
    found = Taken()
    yield found
    found.receiver.stop(0)
    assert found.receiver.failed == 0


def closed(taken: Taken) -> dict[str, int]:
    return {reason: count for reason, count in taken.receiver.closed.items() if count}


@pytest.mark.parametrize("heartbeat", [0, 200])
def test_a_zeromq_socket_is_understood_in_one_and_in_many_parts(taken, heartbeat):
    sent = [b"", b"x", b"y" * 255, b"z" * 256, bytes(3 * 2**20), b"last"]
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.linger = 60_000
        push.heartbeat_ivl = heartbeat  # older producers send these, and leave where none comes back
        push.connect(taken.address)
        monitor = push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for data in sent:
            push.send(data)
        push.send_multipart([b"a", b"", b"b" * 70_000])
        wait_for(lambda: len(taken.messages) == len(sent) + 1, "all messages")
        assert monitor.poll(4 * heartbeat) == 0, "it lives on while nothing is sent"
        push.send(b"after")
        wait_for(lambda: taken.messages[-1] == b"after", "the last message")
        push.disable_monitor()
        monitor.close()
    assert taken.messages == [*sent, b"ab".replace(b"b", b"b" * 70_000), b"after"]
    assert closed(taken) == {}


def test_a_heartbeat_is_answered_with_its_context(taken):
    with connect(taken.address) as sock:
        sock.sendall(ping(7, b"context") + message(b"m"))
        assert expect(sock, 14) == command(b"PONG", b"context")
        sock.sendall(ping(0, bytes(100)))
        assert expect(sock, 23) == command(b"PONG", bytes(16)), "no more comes back than the protocol's 16 bytes"
    wait_for(lambda: taken.messages == [b"m"], "the message")


LAGGING = """
import sys, time
from attnhook.collector.receiver import Receiver

def handle(data):
    if data == b"lag":
        time.sleep(4)
    elif data == b"alive":
        print("alive", flush=True)
    return True

receiver = Receiver("tcp://127.0.0.1:*", handle)
receiver.start()
print(receiver.address, flush=True)
sys.stdin.readline()
receiver.stop(1)
"""


@pytest.mark.slow
def test_a_peer_that_dies_after_heartbeats_while_the_receiver_lags_ends_no_process():
    """libzmq 4.3.5 aborts here: stream_engine_base.cpp:310."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAGGING], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        sock = connect(address)
        sock.sendall(message(b"lag"))
        time.sleep(0.5)
        sock.sendall((message(bytes(100)) + ping()) * 400)
        time.sleep(0.5)
        die(sock)
        time.sleep(4)
        with connect(address) as other:
            other.sendall(message(b"alive"))
            assert process.stdout.readline() == "alive\n", process.poll()
        process.stdin.write("end\n")
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "stranger"),
        (b"\xff" + bytes(9), "stranger"),
        (GREETING.replace(b"\x7f\x03", b"\x7f\x01"), "stranger"),
        (GREETING.replace(b"NULL\0", b"PLAIN"), "stranger"),
        (GREETING + message(b"m"), "stranger"),
        (GREETING + ready(b"PUB"), "stranger"),
        (GREETING + command(b"READY"), "stranger"),
        (GREETING + b"\x04\x00", "stranger"),
        (GREETING + ready() + b"\x08\x00", "protocol"),
        (GREETING + ready() + b"\x05\x00", "protocol"),
        (GREETING + ready() + ping() * 20_000, "protocol"),
        (GREETING + ready() + b"\x02" + struct.pack(">Q", MAX_BYTES + 1), "too_long"),
        (GREETING + ready() + b"\x02" + b"\xff" * 8, "too_long"),
        (GREETING + ready() + message(bytes(100), more=True) + b"\x02" + struct.pack(">Q", MAX_BYTES - 99), "too_long"),
        (GREETING + ready() + b"\x01\x00" * 300, "too_long"),
        (GREETING + ready() + b"\x06" + struct.pack(">Q", 5000), "too_long"),
    ],
)
def test_who_does_not_keep_to_the_protocol_is_sent_away_and_counted(taken, data, reason):
    with connect(taken.address, shake=False) as sock:
        sock.sendall(data)
        assert ended(sock)
    assert closed(taken) == {reason: 1} and taken.messages == []
    with connect(taken.address) as other:
        other.sendall(message(b"good"))
        wait_for(lambda: taken.messages == [b"good"], "a message of another peer")


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=20))
def test_no_bytes_break_the_parser_and_how_they_are_cut_changes_nothing(data, cuts):
    def parsed(pieces: list[bytes]) -> tuple[list[bytes], str | None]:
        peer, found = Peer(200), []
        try:
            for piece in [GREETING + ready(), *pieces]:
                peer.feed(piece)
                while (one := peer.take()) is not None:
                    found.append(one)
        except ProtocolError as error:
            return found, error.reason
        return found, None

    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert parsed([*pieces, rest]) == parsed([data])


@pytest.mark.slow
def test_half_a_greeting_and_half_a_message_are_waited_for_and_not_for_ever(monkeypatch):
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr(limits, "STALLED_SECONDS", 2.0)
    taken = Taken()
    with connect(taken.address, shake=False) as silent, connect(taken.address, shake=False) as half:
        half.sendall(GREETING)
        with connect(taken.address) as stalled, connect(taken.address) as slow, connect(taken.address) as idle:
            stalled.sendall(message(bytes(1000))[:500])
            for byte in message(b"slowly"):  # fifteen bytes, longer than either limit
                slow.sendall(bytes([byte]))
                time.sleep(0.25)
            assert ended(silent) and ended(half) and ended(stalled)
            wait_for(lambda: taken.messages == [b"slowly"], "the slow message")
            idle.sendall(message(b"idle"))  # with nothing begun, a connection may be silent
            wait_for(lambda: len(taken.messages) == 2, "the idle peer's message")
    taken.receiver.stop(0)
    assert closed(taken) == {"handshake_timeout": 2, "stalled": 1}


def test_more_connections_than_allowed_send_away_those_that_sent_nothing_good(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 4)
    taken = Taken()
    with connect(taken.address) as good:
        good.sendall(message(b"0"))
        wait_for(lambda: taken.messages, "a good message")
        flood = [connect(taken.address) for _ in range(40)]
        assert taken.receiver.connected <= 4
        good.sendall(message(b"1"))
        flood[-1].sendall(message(b"2"))
        wait_for(lambda: sorted(taken.messages) == [b"0", b"1", b"2"], "messages of the two that may stay")
        for one in flood:
            one.close()
    taken.receiver.stop(0)
    assert closed(taken) == {"crowded": 37}


@pytest.mark.slow
def test_who_makes_room_may_have_sent_something_at_the_same_moment(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 3)
    taken = Taken()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        flood = [connect(taken.address, shake=False) for _ in range(12)]
        for one in flood:
            with suppress(ConnectionError):
                one.sendall(GREETING + ready() + message(b"flood"))
        for one in flood:
            one.close()
    assert taken.receiver.alive and taken.receiver.closed["crowded"] > 10
    with connect(taken.address) as good:
        good.sendall(message(b"good"))
        wait_for(lambda: b"good" in taken.messages, "a message after the flood")
    taken.receiver.stop(0)
    assert taken.receiver.failed == 0


def test_no_more_than_a_third_of_the_descriptors_is_for_connections():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from attnhook.collector.peers import most_connections\nprint(most_connections())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "85\n"


def test_unfinished_messages_hold_no_more_memory_than_the_budget(monkeypatch):
    monkeypatch.setattr(limits, "BUDGET_BYTES", 20 * 2**20)
    taken = Taken()
    with connect(taken.address) as good:
        good.sendall(message(b"good") + message(bytes(2**20))[:-1])
        wait_for(lambda: taken.messages, "the good message")
        hogs = [connect(taken.address) for _ in range(6)]
        for hog in hogs:
            try:
                hog.sendall(message(bytes(12 * 2**20))[:-1])
            except ConnectionError:
                continue  # it was sent away while it sent
        held = wait_for(lambda: taken.receiver.closed["memory"] >= 4, "hogs to be sent away")
        assert held and sum(one.held for one in taken.receiver._connections) <= 20 * 2**20 + 16 * 2**20
        good.sendall(b"\0")
        wait_for(lambda: len(taken.messages) == 2, "the rest of the good peer's message")
        for hog in hogs:
            hog.close()
    taken.receiver.stop(0)


@pytest.mark.parametrize("known", [True, False], ids=["known", "newcomers"])
def test_many_honest_peers_with_large_messages_wait_for_each_other_and_none_is_closed(monkeypatch, known):
    """As after a restart of the collector: together they are more than the budget."""
    monkeypatch.setattr(limits, "BUDGET_BYTES", 48 * 2**20)
    monkeypatch.setattr(receiver_module, "_LOOK_BYTES", 2**20)
    taken = Taken()
    peers = [connect(taken.address) for _ in range(14)]
    if known:
        for sock in peers:
            sock.sendall(message(b"hello"))
        wait_for(lambda: len(taken.messages) == 14, "the first messages")
    large = message(bytes(6 * 2**20))
    senders = [threading.Thread(target=sock.sendall, args=(large,), daemon=True) for sock in peers]
    for sender in senders:
        sender.start()
    wait_for(lambda: sum(len(one) == 6 * 2**20 for one in taken.messages) == 14, "all large messages", 30)
    for sender, sock in zip(senders, peers, strict=True):
        sender.join()
        sock.close()
    taken.receiver.stop(0)
    assert closed(taken) == {}


def test_peers_that_send_nonsense_get_a_fifth_of_the_time_and_the_others_all_they_need():
    taken = Taken(cost=0.05)
    flood = message(b"bad") * 4000
    with connect(taken.address) as good:
        good.sendall(message(b"first"))
        wait_for(lambda: taken.messages, "the first message")
        bad = [connect(taken.address) for _ in range(5)]
        for one in bad:
            one.sendall(flood)
        began = time.monotonic()
        for i in range(200):
            good.sendall(message(b"%d" % i))
            time.sleep(0.005)
        wait_for(lambda: len(taken.messages) == 201, "all good messages")
        assert time.monotonic() - began < 10, "one by one with 0.05 s of nonsense each they would take 10 s and more"
        for one in bad:
            one.close()
    assert taken.messages == [b"first", *(b"%d" % i for i in range(200))]
    taken.receiver.stop(0)


def test_a_peer_that_sent_nonsense_is_heard_again(taken):
    with connect(taken.address) as sock:
        sock.sendall(message(b"bad") * 30 + b"".join(message(b"%d" % i) for i in range(50)))
        wait_for(lambda: len(taken.messages) == 50, "the good messages behind it")
    assert closed(taken) == {}


def test_ipc_and_its_left_over_file(tmp_path):
    path = f"/tmp/attnhook-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)  # as a process that was killed leaves it
    taken = Taken(f"ipc://{path}")
    try:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 60_000
            push.connect(taken.address)
            push.send(b"m")
            wait_for(lambda: taken.messages == [b"m"], "the message")
        with pytest.raises(PluginError, match="another process listens there"):
            Receiver(f"ipc://{path}", taken.handle)
        assert stat.S_ISSOCK(os.stat(path).st_mode)
    finally:
        taken.receiver.stop(0)
    assert not os.path.exists(path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PluginError, match="name a short path"):
        Receiver(f"ipc://{tmp_path / 'file'}", taken.handle)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("address", ["udp://127.0.0.1:1", "tcp://", "127.0.0.1:9001", "tcp://127.0.0.1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(PluginError, match=r"such as (tcp://)?127\.0\.0\.1"):
        Receiver(address, lambda data: True)
