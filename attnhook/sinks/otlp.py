"""The sink that sends one OpenTelemetry span per request."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import numpy as np

from attnhook.errors import PluginError, needs
from attnhook.plugins.contracts import Sink
from attnhook.record.columns import mean_fingerprints
from attnhook.record.tally import MEASURES
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import config

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

IDLE_SECONDS = 5.0
CLOSE_SECONDS = 10.0
_MAX_OPEN = 10_000  # requests that are counted at the same time


class OtlpSink(Sink):
    """``otlp:http://127.0.0.1:4318``: one span ``attnhook.request`` per request, to ``/v1/traces``; ``?idle=5s``.

    A span runs from a request's first record to its last and has the model, the numbers of records, the zone shares
    and the means of entropy and masses. A request is over when no record of it came for ``idle``; one that comes back
    after that gets a second span. Records hold no end of a request.

    Delivery guarantee: at most once. Spans wait in the SDK's bounded queue. Those that the receiver refuses or that
    time out are counted in `dropped` as ``export_failed``; those that found the queue full, or were still in it when
    `close` gave up, as ``not_exported`` once it is closed. `close` ends all open spans and waits up to 10 seconds.
    """

    keeps_tokens = False

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """``exporter`` replaces the one for OTLP over HTTP."""
        self.dropped: Counter[str] = Counter()  #: spans, by reason
        self._exporter = exporter
        self._provider: Any = None
        self._open: OrderedDict[tuple[str, str], _Request] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._idle = IDLE_SECONDS
        self._thread: threading.Thread | None = None
        self._pid = 0

    def open(self, config_text: str) -> None:
        """Start the exporter; the receiver may come later.

        Raises PluginError for an address that is not http(s), or without the OpenTelemetry SDK.
        """
        address, options = config.parse("otlp", config_text, {"idle": config.seconds})
        self._idle = options.get("idle", IDLE_SECONDS)
        parts = urlsplit(address)
        if self._exporter is None and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise PluginError(f"sink otlp:{config_text}: write an address such as otlp:http://127.0.0.1:4318")
        with needs("the sink otlp:", "sinks"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        url = address.rstrip("/")
        exporter = self._exporter or OTLPSpanExporter(
            endpoint=url if parts.path.rstrip("/").endswith("/v1/traces") else f"{url}/v1/traces",
            timeout=CLOSE_SECONDS / 2,
        )
        resource = Resource({SERVICE_NAME: "attnhook"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.dropped = Counter()
        self._counting = _Counting(exporter, self.dropped)
        self._provider.add_span_processor(BatchSpanProcessor(cast(Any, self._counting)))
        self._tracer = self._provider.get_tracer("attnhook")
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open.clear()
        self.dropped.clear()
        self._ended = self._counting.seen = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._expire, name="attnhook otlp", daemon=True)
        self._thread.start()

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Count the records with their requests. Raises RecordError where one has no valid fingerprint."""
        if self._provider is None:
            raise ValueError("sink otlp: is closed")
        from attnhook.record.token_record import free_fingerprints
        from attnhook.record.zones import classify_many

        if self._pid != os.getpid():  # forked: the requests so far are the parent's, and its thread is not here
            self._start()
        fingerprints = mean_fingerprints(batch)
        zones, _ = classify_many(free_fingerprints(batch, fingerprints))
        values = fingerprints[:, list(MEASURES.values())].astype(np.float64)
        now = time.monotonic()
        with self._lock:
            for record, zone, row in zip(batch, zones.tolist(), values, strict=True):
                key = record.request_id, record.model
                request = self._open.get(key)
                if request is None:
                    request = self._open[key] = _Request(now)
                    if len(self._open) > _MAX_OPEN:
                        self._end(self._open.popitem(last=False), partial=True)
                else:
                    self._open.move_to_end(key)
                request.add(record.is_prompt, zone, row, now)

    def close(self) -> None:
        """End the open spans, and wait up to 10 seconds for the receiver."""
        provider, self._provider = self._provider, None
        if provider is None or self._pid != os.getpid():  # the latter: a parent's, and nothing was written here
            return
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            while self._open:
                self._end(self._open.popitem(last=False))
        impatient = threading.Timer(CLOSE_SECONDS, self._counting.shutdown)  # the SDK's own limit is 30 seconds
        impatient.daemon = True
        impatient.start()
        try:
            provider.shutdown()
        finally:
            impatient.cancel()
        if self._ended > self._counting.seen:
            self.dropped["not_exported"] += self._ended - self._counting.seen

    def _expire(self) -> None:
        while not self._closed.wait(min(self._idle / 4, 1.0)):
            limit = time.monotonic() - self._idle
            with self._lock:
                # the one that was silent longest comes first
                while self._open and next(iter(self._open.values())).last <= limit:
                    self._end(self._open.popitem(last=False))

    def _end(self, item: tuple[tuple[str, str], _Request], partial: bool = False) -> None:
        (request_id, model), request = item
        span = self._tracer.start_span(
            "attnhook.request", start_time=request.began, attributes=request.attributes(request_id, model)
        )
        if partial:
            span.set_attribute("attnhook.partial", True)  # more of its records may follow in another span
        self._ended += 1
        span.end(request.began + int((request.last - request.first) * 1e9))


class _Counting:
    """An exporter around another, which counts."""

    def __init__(self, exporter: SpanExporter, dropped: Counter[str]) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self.seen = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.seen += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._dropped["export_failed"] += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Request:
    def __init__(self, now: float) -> None:
        self.began = time.time_ns()  # looked at once: a clock that jumps cannot make a span end before it began
        self.first = self.last = now
        self.prompt = 0
        self.zones: Counter[int] = Counter()
        self.sums = np.zeros(len(MEASURES))

    def add(self, is_prompt: bool, zone: int, values: np.ndarray, now: float) -> None:
        self.prompt += is_prompt
        self.zones[zone] += 1
        self.sums += values
        self.last = now

    def attributes(self, request_id: str, model: str) -> dict[str, Any]:
        from attnhook.record.zones import ZONE_NAMES

        records = self.zones.total()
        means = (self.sums / records).tolist()
        return {
            "attnhook.request.id": request_id,
            "gen_ai.request.model": model,
            "attnhook.records": records,
            "attnhook.prompt_records": self.prompt,
            **{f"attnhook.zone.{name}": self.zones[i] / records for i, name in enumerate(ZONE_NAMES)},
            **{f"attnhook.mean.{name}": mean for name, mean in zip(MEASURES, means, strict=True)},
        }
