"""The HTTP server of the collector, in a thread, so that signals stay with the main one."""

from __future__ import annotations

import logging
import threading
from typing import Any

from attnhook.system.addresses import host_port, listener, require_token


class Server:
    """Serves an ASGI application on ``address`` (``host:port``).

    Raises PluginError where it cannot listen, or could be reached from other machines without a ``token``.
    """

    def __init__(self, address: str, *, token: str | None) -> None:
        host, port = host_port(address, user="--http")
        require_token(host, token, user="--http (see --token-file)")
        self._socket = listener(host, port, user="the collector's HTTP interface")
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def start(self, app: Any) -> None:
        """Begin to serve."""
        import uvicorn

        from attnhook.collector.clients import Client

        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a line for each bad request would fill a disk
        settings = uvicorn.Config(
            app,
            http=Client,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="attnhook http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked, for at most two seconds, and stop."""
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self._socket.close()
