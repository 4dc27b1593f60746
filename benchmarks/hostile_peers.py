"""What hostile peers of a collector do, each as a loop that runs until it is told to stop; see `hostile_collector`.

python -m benchmarks.hostile_peers ADDRESS URL SECONDS
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle

import msgspec
import numpy as np

from attnhook.collector.zmtp import GREETING
from attnhook.record import fingerprint as fp
from attnhook.sinks import frames
from benchmarks.collector import make_records

_HALF_OPEN = 600  # connections that are held open, of each kind of port
_pack = msgspec.msgpack.encode


class Peers:
    """All kinds of hostile peers of the collector at ``address`` (ZeroMQ) and ``url`` (HTTP), a thread each."""

    def __init__(self, address: str, url: str) -> None:
        self._address = address
        self._zmq = int(address.rpartition(":")[2])
        self._http = int(url.rpartition(":")[2])
        self._stopping = threading.Event()
        self.did: Counter[str] = Counter()  #: what was done, by kind
        kinds = (self.counters, self.heavy, self.cut, self.noise, self.die, self.half_open, self.killed, self.http)
        self._threads = [threading.Thread(target=self._until, args=(kind,), daemon=True) for kind in kinds]

    def run(self, seconds: float) -> None:
        """Let all of them loose for so long."""
        for thread in self._threads:
            thread.start()
        time.sleep(seconds)
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def _until(self, kind: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                kind()
            except OSError:  # the collector closed the connection, as it should
                self.did["connections closed by the collector"] += 1
            time.sleep(0.02)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._zmq), timeout=10)
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 4) + b"PUSH"
        sock.sendall(GREETING + bytes([4, len(ready)]) + ready)
        return sock

    def _send(self, sock: socket.socket, data: bytes, kind: str) -> None:
        sock.sendall(b"\x02" + struct.pack(">Q", len(data)) + data)
        self.did[kind] += 1

    def counters(self) -> None:
        """Tiny frames of ever new producers: absurd numbers, and reasons that nobody has heard of."""
        with self._connect() as sock:
            for _ in range(500):
                if self._stopping.is_set():
                    return
                reasons = {random.randbytes(15).hex(): random.choice((1, frames.MAX_NUMBER)) for _ in range(20)}
                first = random.choice((frames.MAX_NUMBER, 2**53 - 1, 2**64 - 1, random.randrange(2**40)))
                self._send(sock, frames.encode_end(os.urandom(16), first, reasons), "frames of absurd counters")
                time.sleep(0.002)

    def heavy(self) -> None:
        """Frames of up to 16 MiB that are dear to read, on one connection for as long as it lives."""
        with self._connect() as sock:
            for name, data in cycle(_heavy()):
                if self._stopping.is_set():
                    return
                self._send(sock, data, f"heavy frames: {name}")
                time.sleep(0.01)

    def cut(self) -> None:
        """Frames that end early, or in which a byte is another."""
        whole = frames.encode(os.urandom(16), 0, {}, [record.to_bytes() for record in make_records(200, "cut")])
        with self._connect() as sock:
            for _ in range(200):
                if self._stopping.is_set():
                    return
                cut = bytearray(whole[: random.randrange(len(whole))])
                if cut:
                    cut[random.randrange(len(cut))] ^= 0xFF
                self._send(sock, bytes(cut), "frames cut short")
                time.sleep(0.005)

    def noise(self) -> None:
        """Random bytes, in place of the protocol and inside of it."""
        with socket.create_connection(("127.0.0.1", self._zmq), timeout=10) as sock:
            sock.sendall(random.randbytes(random.randrange(1, 4096)))
        with self._connect() as sock:
            for _ in range(50):
                self._send(sock, random.randbytes(random.randrange(2000)), "messages of random bytes")
            sock.sendall(random.randbytes(64))
            sock.sendall(b"\x01\x00" * 1000)  # empty parts of a message without end
        self.did["connections of random bytes"] += 2

    def die(self) -> None:
        """Heartbeats among messages, and a reset: what ended libzmq's process."""
        row = make_records(1, "die")[0].to_bytes()
        with self._connect() as sock:
            data = frames.encode(os.urandom(16), 0, {}, [row])
            frame = b"\x02" + struct.pack(">Q", len(data)) + data
            sock.sendall((frame + b"\x04\x07\x04PING\x00\x01") * 200)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.did["peers that sent heartbeats and were reset"] += 1
        time.sleep(0.2)

    def half_open(self) -> None:
        """Connections that say nothing, half a greeting or half a message, and wait."""
        held: list[socket.socket] = []
        while not self._stopping.is_set():
            for _ in range(20):
                if random.random() < 0.3:
                    sock = self._connect()
                    with suppress(OSError):
                        sock.sendall(b"\x02" + struct.pack(">Q", 10 * 2**20) + bytes(2**18))
                else:
                    sock = socket.create_connection(("127.0.0.1", self._zmq), timeout=10)
                    with suppress(OSError):
                        sock.sendall(GREETING[: random.choice((0, 5, 64))])
                sock.settimeout(0.2)
                held.append(sock)
                self.did["connections left half open"] += 1
            while len(held) > _HALF_OPEN:
                held.pop(0).close()
            time.sleep(0.2)

    def killed(self) -> None:
        """Real producers that are killed while they send."""
        command = [sys.executable, "-m", "benchmarks.collector", "--produce"]
        worker = subprocess.Popen(
            [*command, self._address, f"killed{self.did['producers killed']}", "100000", "32"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert worker.stdin is not None
        try:
            worker.stdin.write("go\n")
            worker.stdin.flush()
            self._stopping.wait(3.0)
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            worker.stdin.close()
        self.did["producers killed"] += 1
        self._stopping.wait(3.0)

    def http(self) -> None:
        """Half-sent requests, answers that nobody reads, and bodies and numbers that are none."""
        host = b"Host: 127.0.0.1\r\n"
        post = b"POST /classify HTTP/1.1\r\n" + host
        requests = cycle(
            (
                b"GET /stats HT",
                b"GET /stats HTTP/1.1\r\n" + host,
                post + b"Content-Length: 16000000\r\n\r\n" + bytes(100_000),
                post + b"Content-Length: 426\r\n\r\n" + b'{"fingerprints": [[' + b"9" * 400 + b"]]}",
                post + b"Content-Length: 5000000\r\n\r\n" + b"[" * 5_000_000,
                b"GET /fingerprints?limit=" + b"9" * 5000 + b" HTTP/1.1\r\n" + host + b"\r\n",
                b"GET /fingerprints?limit=1000 HTTP/1.1\r\n" + host + b"\r\n",  # asked for, and never read
                random.randbytes(300),
            )
        )
        held: list[socket.socket] = []
        while not self._stopping.is_set():
            for _ in range(10):
                sock = socket.create_connection(("127.0.0.1", self._http), timeout=5)
                with suppress(OSError):
                    sock.sendall(next(requests))
                held.append(sock)
                self.did["HTTP requests half sent or wrong"] += 1
            while len(held) > _HALF_OPEN:
                held.pop(0).close()
            time.sleep(0.1)


def _heavy() -> Iterator[tuple[str, bytes]]:
    head = b"\x97\xa8attnhook\x01\xa7records\xc4\x10" + b"heavyheavyheavyh" + b"\x00"
    count = (5_000_000).to_bytes(4, "big")
    yield "a map of maps", head + b"\xdf" + count + b"\x80\xc0" * 5_000_000
    yield "16 MiB of empty maps", b"\xdd" + (2**24 - 5).to_bytes(4, "big") + b"\x80" * (2**24 - 5)
    yield "empty rows", head + b"\x80\xdd" + count + b"\xc4\x00" * 5_000_000
    yield "4,096 empty rows", frames.encode(b"h" * 16, 0, {}, [b""] * frames.MAX_ROWS)
    rows = [record.to_bytes() for record in make_records(1024, "heavy")]
    numbers = np.full(fp.SIZE, 5, "<f4").tobytes()
    bad = [row[: -len(numbers)] + numbers if i % 2 else row[:-1] for i, row in enumerate(rows * 4)]
    yield "bad fingerprints and cut rows", frames.encode(b"h" * 16, 0, {}, bad)
    yield "one row of 16 MiB", frames.encode(b"h" * 16, 0, {}, [bytes(2**24 - 100)])
    yield "nested", b"\x91" * 2**24
    yield "no frame", _pack({"a": "x" * 10_000_000})


def main() -> None:
    """Entry point."""
    address, url, seconds = sys.argv[1:4]
    peers = Peers(address, url)
    peers.run(float(seconds))
    print(json.dumps(peers.did), flush=True)
    os._exit(0)  # threads that hang in a socket are not waited for


if __name__ == "__main__":
    main()
