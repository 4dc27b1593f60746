"""The collector's HTTP interface: health, stats, metrics, classification and stored fingerprints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from attnhook.addresses import is_loopback, same_token
from attnhook.collector.classifiers import Classifier, Zones
from attnhook.collector.exposition import families
from attnhook.errors import AttnhookError, OptionError, RecordError
from attnhook.metrics import registry
from attnhook.store import open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from attnhook.collector.service import Collector

ARROW = "application/vnd.apache.arrow.stream"
_BODY_BYTES = 16 * 2**20
_ROWS = 100_000  # most that one JSON answer holds
_PAGE = 1000


def application(
    collector: Collector, *, token: str | None = None, classifiers: Mapping[str, Classifier] | None = None
) -> Any:
    """The ASGI application.

    With a ``token`` everything but ``/health`` asks for it; without one, only requests to a name of this machine are
    answered, so that no web page can reach it under a name of its own.
    """
    pages = _Pages(collector, {"zones": Zones(), **(classifiers or {})})
    routes = [
        Route("/health", pages.health),
        Route("/stats", pages.stats),
        Route("/metrics", pages.metrics),
        Route("/classify", pages.classify, methods=["POST"]),
        Route("/fingerprints", pages.fingerprints),
    ]
    app = Starlette(routes=routes, exception_handlers={AttnhookError: _bad_request})
    return _Guard(app, token)


class _Guard:
    """Lets through what carries the token, or was sent to this machine's own name."""

    def __init__(self, app: Any, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        refusal: Response | None = None
        if self._token is None:
            if not is_loopback(request.url.hostname or ""):
                refusal = _error(403, f"{request.url.hostname!r} is no name of this machine: use 127.0.0.1")
        elif scope["path"] != "/health":
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not same_token(given, self._token):
                refusal = _error(401, "send the collector's token: Authorization: Bearer TOKEN")
                refusal.headers["WWW-Authenticate"] = "Bearer"
        await (refusal or self._app)(scope, receive, send)


class _Pages:
    def __init__(self, collector: Collector, classifiers: dict[str, Classifier]) -> None:
        self._collector = collector
        self._classifiers = classifiers
        self._registry = registry(lambda: families(collector))

    async def health(self, request: Request) -> Response:
        problems = await run_in_threadpool(lambda: self._collector.problems)
        # what is wrong may name paths, and this page asks for no token
        return JSONResponse({"status": "failing" if problems else "ok"}, 503 if problems else 200)

    async def stats(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._collector.stats))

    async def metrics(self, request: Request) -> Response:
        text = await run_in_threadpool(generate_latest, self._registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def classify(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _BODY_BYTES:
                return _error(413, f"the body is longer than {_BODY_BYTES} bytes: send fewer fingerprints at once")
        fingerprints, classifier = self._asked(bytes(body))
        found = await run_in_threadpool(classifier.classify, fingerprints)
        return JSONResponse({"results": found})

    async def fingerprints(self, request: Request) -> Response:
        query = dict(request.query_params)
        wanted = query.pop("format", "arrow" if ARROW in request.headers.get("accept", "") else "json")
        if wanted not in ("json", "arrow"):
            raise OptionError("format", f"format={wanted!r} must be json or arrow")
        url = self._store(query.pop("store", None))
        offset = _number(query, "offset", 0, 0, 2**62)
        limit = _number(query, "limit", _PAGE, 1, _ROWS if wanted == "json" else 2**62)
        filters: dict[str, Any] = {name: query.pop(name) for name in ("model", "request_id", "zone") if name in query}
        filters |= {name: _time(name, query.pop(name)) for name in ("since", "until") if name in query}
        if query:
            raise OptionError(next(iter(query)), f"unknown parameter {next(iter(query))!r}; {_PARAMETERS}")
        if wanted == "arrow":
            stream = await run_in_threadpool(_arrow_stream, url, {**filters, "offset": offset, "limit": limit})
            return StreamingResponse(stream, media_type=ARROW)
        return JSONResponse(await run_in_threadpool(_page, url, filters, offset, limit))

    def _store(self, name: str | None) -> str:
        stores = {url.partition("?")[0]: url for url in self._collector.stores}
        if name is None:
            return self._collector.stores[0]
        if name not in stores:
            raise OptionError("store", f"store={name!r} is none of {', '.join(stores)}")
        return stores[name]

    def _asked(self, body: bytes) -> tuple[np.ndarray, Classifier]:
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"the body is no JSON: {error}") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("fingerprints"), list):
            raise RecordError('send {"fingerprints": [[20 numbers], ...], "classifier": "zones"}')
        name = asked.get("classifier", "zones")
        if not isinstance(name, str) or name not in self._classifiers:
            raise OptionError("classifier", f"classifier {name!r} is none of {', '.join(self._classifiers)}")
        try:
            return np.array(asked["fingerprints"], np.float32), self._classifiers[name]
        except (ValueError, TypeError) as error:
            raise RecordError(f"fingerprints are arrays of 20 numbers each: {error}") from error


_PARAMETERS = "known: model, request_id, zone, since, until, offset, limit, format, store"


def _arrow_stream(url: str, arguments: dict[str, Any]) -> Iterator[bytes]:
    """Stored rows as an Arrow stream; what is wrong with the store raises here, before the first byte is sent."""
    store = open_store(url)
    try:
        batches = store.fingerprints(**arguments)
        first = next(batches, None)
    except BaseException:
        store.close()
        raise

    def stream() -> Iterator[bytes]:
        with store:
            yield from _arrow(first, batches)

    return stream()


def _arrow(first: pa.RecordBatch | None, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    import io

    import pyarrow as pa

    from attnhook.sinks.columns import LIGHT, arrow_schema

    whole = arrow_schema()
    schema = (
        pa.schema([whole.field(name) for name in LIGHT], metadata=whole.metadata) if first is None else first.schema
    )
    buffer = io.BytesIO()

    def taken() -> bytes:
        data = buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
        return data

    with pa.ipc.new_stream(buffer, schema) as writer:
        if first is not None:
            writer.write_batch(first)
            yield taken()
        for batch in batches:
            writer.write_batch(batch)
            yield taken()
    yield taken()


def _page(url: str, filters: dict[str, Any], offset: int, limit: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with open_store(url) as store:
        for batch in store.fingerprints(**filters, offset=offset, limit=limit + 1):
            rows += batch.to_pylist()
    more = len(rows) > limit
    for row in rows[:limit]:
        row["time"] = row["time"].isoformat()
    return {"rows": rows[:limit], "next_offset": offset + limit if more else None}


def _number(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.pop(name, None)
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise OptionError(name, f"{name}={text!r} must be a whole number from {low} to {high}")
    return int(text)


def _time(name: str, text: str) -> datetime:
    """ISO 8601, or seconds since 1970."""
    try:
        try:
            return datetime.fromtimestamp(float(text), timezone.utc)
        except ValueError:
            return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(
            name, f"{name}={text!r} must be a time such as 2026-01-31T12:00:00Z, or seconds since 1970"
        ) from error


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _bad_request(request: Request, error: Exception) -> Response:
    wrong = isinstance(error, (OptionError, RecordError))
    return _error(400 if wrong else 503, str(error))
