"""The sink that shows records to whoever watches, as they come: the explorer's live feed."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from attnhook.errors import DroppedError, PluginError, needs
from attnhook.record.row import SCHEMA_VERSION
from attnhook.record.token_record import TokenRecord, fill_zones
from attnhook.sinks import config
from attnhook.sinks.listening import ListeningSink
from attnhook.system.addresses import host_port, listener, require_token, same_token

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

_WAITING = 64  # messages that may wait for one client, and for the server itself
# pages of this machine only: a browser lets any page connect to any address, and tells us which page it was
_ORIGINS = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")


_inherited: list[Any] = []  # a parent's event loop: thrown away, it would be closed, for the parent too


class WebsocketSink(ListeningSink):
    """``websocket:127.0.0.1:9003``: a text message per batch to every client; ``?token=...``, ``?origin=https://...``.

    The first message is ``{"type": "hello", "schema_version": 1}``, then ``{"type": "records", "records": [...]}``
    follow, with the objects of the jsonl sink; each tells its own version, 2 where it has token ids. A client gives
    the token as ``?token=`` or as bearer token.

    Of ``ATTNHOOK_SINKS`` and `install` it listens from the first captured record on, in the process that has it.

    Delivery guarantee: none. A client sees what comes while it is connected; one that does not keep up (64 messages
    wait for it) is disconnected and counted in `dropped` as ``slow_client``, with no effect on the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()  #: clients (``slow_client``) and records (``busy``), by reason
        self._clients: dict[Any, asyncio.Queue[str]] = {}
        self._waiting = 0
        self._token: str | None = None
        self._origin: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Event | None = None
        self._socket: socket.socket | None = None
        self._user = ""
        self._address = ("", 0)

    def prepare(self, config_text: str) -> None:
        """Raises PluginError.

        That is for a bad address, one that can be reached from other machines without a token, or without the library
        websockets.
        """
        address, options = config.parse("websocket", config_text, {"token": str, "origin": str})
        self._user = f"sink websocket:{address}"
        self._address = host_port(address, user=self._user)
        self._token, self._origin = options.get("token"), options.get("origin")
        require_token(self._address[0], self._token, user=f"{self._user} (?token=...)")
        with needs("the sink websocket:", "sinks"):
            import websockets.asyncio.server  # noqa: F401

    def listen(self) -> None:
        """Raises PluginError where the port is taken."""
        from websockets.asyncio.server import serve

        self._clients, self._waiting, self.dropped = {}, 0, Counter()
        sock = self._socket = listener(*self._address, user=self._user)
        self.port = sock.getsockname()[1]
        ready = threading.Event()

        async def run() -> None:
            self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
            async with serve(self._serve, sock=sock, process_request=self._check, max_size=4096, close_timeout=1):
                ready.set()
                await self._ended.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), name="attnhook websocket", daemon=True)
        self._thread.start()
        while not ready.wait(0.2):
            if not self._thread.is_alive():
                sock.close()
                raise PluginError(f"{self._user}: the server did not start; the log tells why")

    @property
    def clients(self) -> int:
        """Clients that are connected now."""
        return len(self._clients)

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Send the records to the clients that are there; without any, nothing is computed.

        Raises RecordError where a record has no valid fingerprint, DroppedError where the server is behind or cannot
        listen.
        """
        self.ready(len(batch))
        assert self._loop is not None
        if not self._clients or not batch:
            return
        if self._waiting >= _WAITING:
            self.dropped["busy"] += len(batch)
            raise DroppedError("busy", len(batch), f"{_WAITING} messages wait for the event loop; this machine is busy")
        fill_zones(batch)
        entries = [
            {"request_id": record.request_id, "choice": record.choice, "model": record.model, **record.to_dict()}
            for record in batch
        ]
        text = json.dumps({"type": "records", "records": entries}, allow_nan=False)
        self._waiting += 1
        self._loop.call_soon_threadsafe(self._broadcast, text)

    def stop(self) -> None:
        """Disconnect the clients and stop listening."""
        loop, self._loop = self._loop, None
        if loop is not None and self._ended is not None and self._thread is not None:
            loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()

    def abandon(self) -> None:
        """Close the listening socket alone."""
        _inherited.append((self._loop, self._thread, self._clients, self._ended))
        self._loop = self._thread = self._ended = None
        self._clients = {}
        if self._socket is not None:
            self._socket.close()

    def _broadcast(self, text: str) -> None:
        self._waiting -= 1
        for client, queue in list(self._clients.items()):
            if queue.full():
                del self._clients[client]
                self.dropped["slow_client"] += 1
                client.transport.abort()  # a close frame would wait behind what it does not read
            else:
                queue.put_nowait(text)

    async def _serve(self, client: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        queue: asyncio.Queue[str] = asyncio.Queue(_WAITING)
        queue.put_nowait(json.dumps({"type": "hello", "schema_version": SCHEMA_VERSION}))
        self._clients[client] = queue
        sender = asyncio.create_task(self._send(client, queue))
        try:
            async for _ in client:  # what a client says is read, so that its pings and its end are seen, and left
                continue
        except ConnectionClosed:
            return
        finally:
            self._clients.pop(client, None)
            sender.cancel()

    async def _send(self, client: ServerConnection, queue: asyncio.Queue[str]) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                await client.send(await queue.get())
        except ConnectionClosed:
            return

    def _check(self, client: ServerConnection, request: Request) -> Response | None:
        origin = request.headers.get("Origin")
        if origin is not None and origin != self._origin and not _ORIGINS.fullmatch(origin):
            return client.respond(403, f"pages of {origin[:80]} may not watch: allow them with ?origin=\n")
        if self._token is None:
            return None
        given = parse_qs(urlsplit(request.path).query).get("token", [None])[0]
        if given is None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if same_token(given, self._token):
            return None
        return client.respond(401, "give the token as ?token=... or as a bearer token\n")
