"""The sink that counts records for Prometheus to scrape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnhook.errors import PluginError, needs
from attnhook.record.columns import mean_fingerprints
from attnhook.record.tally import Tally
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.listening import ListeningSink
from attnhook.system.addresses import host_port, listen_remedy, masked

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class PrometheusSink(ListeningSink):
    """``prometheus::9464`` serves ``http://127.0.0.1:9464/metrics``; ``prometheus:0.0.0.0:9464`` to other machines.

    Records by row and zone, zone shares of the last minute, histograms of entropy and mass by band, and of this
    process: rows that capture dropped, what its sinks wrote and dropped, by reason, and the seconds that capture
    took. No metric names a request.

    Of ``ATTNHOOK_SINKS`` and `install` it listens from the first captured record on, in the process that has it.

    Delivery guarantee: a record is counted once `write` returned; counts begin at 0 with the process.
    """

    keeps_tokens = False

    def __init__(self) -> None:
        super().__init__()
        self._tally = Tally()
        self._address = ("", 0)
        self._user = ""
        self._server: Any = None
        self._thread: Any = None

    def prepare(self, config: str) -> None:
        """Raises PluginError for a bad address, or without prometheus-client."""
        self._user = f"sink prometheus:{config}"
        self._address = host_port(config, user=self._user)
        with needs("the sink prometheus:", "sinks"):
            import prometheus_client  # noqa: F401

    def listen(self) -> None:
        """Raises PluginError where the port is taken."""
        from prometheus_client import start_http_server

        from attnhook.sinks.metrics import registry

        host, port = self._address
        self._tally = Tally()
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry(self._families))
        except (OSError, OverflowError) as error:
            remedy = listen_remedy(getattr(error, "errno", None))
            raise PluginError(f"{self._user} cannot listen: {error}; {remedy}") from error
        self.port = self._server.server_port

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Count the records.

        Raises RecordError where one has no valid fingerprint (none is then counted), DroppedError where it cannot
        listen.
        """
        from attnhook.record.token_record import free_fingerprints
        from attnhook.record.zones import classify_many

        self.ready(len(batch))
        fingerprints = mean_fingerprints(batch)
        zones, _ = classify_many(free_fingerprints(batch, fingerprints))
        steps = np.array([-1 if record.is_prompt else 0 for record in batch], np.int32)
        self._tally.add(fingerprints, zones, [record.request_id for record in batch], steps)

    def stop(self) -> None:
        """Shut the server down."""
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        self._thread.join()

    def abandon(self) -> None:
        """Close the socket alone: the server's own shutdown waits for its thread."""
        server, self._server = self._server, None
        server.socket.close()

    def _families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        from attnhook.capture.session import spent
        from attnhook.sinks import metrics, outlet

        yield from metrics.of_tally(self._tally)
        yield metrics.counter("attnhook_capture_dropped_rows", "Rows that capture dropped.", "reason", outlet.dropped())
        stats = {_scheme(name): counts for name, counts in outlet.sink_stats().items()}
        dropped = CounterMetricFamily(
            "attnhook_sink_dropped_records", "Records that a sink dropped.", labels=["sink", "reason"]
        )
        for name, counts in stats.items():
            for reason, count in counts["dropped"].items():
                dropped.add_metric([name, reason], count)
        yield dropped
        written = {name: counts["written"] for name, counts in stats.items()}
        yield metrics.counter("attnhook_sink_written_records", "Records that a sink took.", "sink", written)
        queued = {name: counts["queued"] for name, counts in stats.items()}
        yield metrics.gauge("attnhook_sink_queued_records", "Records that wait for a sink.", "sink", queued)
        with spent._lock:
            seconds, steps = spent.seconds, spent.steps
        yield CounterMetricFamily("attnhook_capture_seconds", "Time that capture took, in seconds.", seconds)
        yield CounterMetricFamily("attnhook_capture_steps", "Forward steps that were captured.", steps)


def _scheme(url: str) -> str:
    """A sink's name without its options and its user info."""
    return masked(url).partition("?")[0]
