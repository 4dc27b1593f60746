"""The collector's HTTP interface: health, stats, metrics, classification and stored fingerprints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from attnhook.collector import clients
from attnhook.collector.classifiers import Classifier, Zones
from attnhook.collector.exposition import families
from attnhook.errors import AttnhookError, OptionError, RecordError
from attnhook.sinks.metrics import registry
from attnhook.store import open_store
from attnhook.system.addresses import is_loopback, same_token

if TYPE_CHECKING:
    import pyarrow as pa

    from attnhook.collector.service import Collector

ARROW = "application/vnd.apache.arrow.stream"
_BODY_BYTES = 16 * 2**20
_ROWS = 100_000  # most that one JSON answer holds
_PAGE = 1000
_SMALL_BYTES = 64 * 2**10  # a body that is always taken
_BODIES_BYTES = 4 * _BODY_BYTES  # of larger ones, all that are being read or classified together
_QUERIES = 8  # of stores, that are answered at the same time
_TURN_SECONDS: Final = 10.0  # that a query waits for its turn
_SHOWN = 60  # characters of what was asked, in an error


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
            host = _host(request)
            if host is None:
                refusal = _error(
                    400, f"the header Host is {_shown(request.headers.get('host', ''))}, which is no address"
                )
            elif not is_loopback(host):
                refusal = _error(403, f"{_shown(host)} is no name of this machine: use 127.0.0.1")
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
        self._bodies = 0  # bytes
        self._turns = asyncio.Semaphore(_QUERIES)

    async def health(self, request: Request) -> Response:
        problems = await run_in_threadpool(lambda: self._collector.problems)
        # what is wrong may name paths, and this page asks for no token
        return JSONResponse({"status": "failing" if problems else "ok"}, 503 if problems else 200)

    async def stats(self, request: Request) -> Response:
        found = await run_in_threadpool(self._collector.stats)
        return JSONResponse({**found, "http": {"closed": dict(clients.closed)}})

    async def metrics(self, request: Request) -> Response:
        text = await run_in_threadpool(generate_latest, self._registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def classify(self, request: Request) -> Response:
        body = bytearray()
        counted = 0
        try:
            async for part in request.stream():
                body += part
                if len(body) > _BODY_BYTES:
                    return _error(413, f"the body is longer than {_BODY_BYTES} bytes: send fewer fingerprints at once")
                if len(body) > _SMALL_BYTES:
                    self._bodies += len(body) - counted
                    counted = len(body)
                    if self._bodies > _BODIES_BYTES:
                        return _busy("other requests hold the memory for bodies")
            results = await run_in_threadpool(self._classified, bytes(body))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        finally:
            self._bodies -= counted
        return Response(results, media_type="application/json")

    async def fingerprints(self, request: Request) -> Response:
        query = dict(request.query_params)
        wanted = query.pop("format", "arrow" if ARROW in request.headers.get("accept", "") else "json")
        if wanted not in ("json", "arrow"):
            raise OptionError("format", f"format={_shown(wanted)} must be json or arrow")
        url = self._store(query.pop("store", None))
        offset = _number(query, "offset", 0, 0, 2**62)
        limit = _number(query, "limit", _PAGE, 1, _ROWS if wanted == "json" else 2**62)
        filters: dict[str, Any] = {name: query.pop(name) for name in ("model", "request_id", "zone") if name in query}
        filters |= {name: _time(name, query.pop(name)) for name in ("since", "until") if name in query}
        if query:
            raise OptionError(next(iter(query)), f"unknown parameter {_shown(next(iter(query)))}; {_PARAMETERS}")
        if wanted == "arrow":
            arguments = {**filters, "offset": offset, "limit": limit}
            return _InTurn(self._turn, lambda: _arrow_response(url, arguments))
        return _InTurn(self._turn, lambda: _page_response(url, filters, offset, limit))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[bool]:
        """Wait for one of the places that queries of stores have; whether it came."""
        try:
            await asyncio.wait_for(self._turns.acquire(), _TURN_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):  # two names before Python 3.11
            yield False
            return
        try:
            yield True
        finally:
            self._turns.release()

    def _store(self, name: str | None) -> str:
        stores = {url.partition("?")[0]: url for url in self._collector.stores}
        if name is None:
            return self._collector.stores[0]
        if name not in stores:
            raise OptionError("store", f"store={_shown(name)} is none of {', '.join(stores)}")
        return stores[name]

    def _classified(self, body: bytes) -> bytes:
        try:
            asked = _asked.decode(body)
        except msgspec.ValidationError as error:
            raise RecordError(
                'send {"fingerprints": [[20 numbers], ...], "classifier": "zones"}: fingerprints are arrays of 20 '
                f"numbers each: {error}"
            ) from error
        except (ValueError, RecursionError) as error:  # of msgspec, or text that is no UTF-8
            raise RecordError(f"the body is no JSON: {error}") from error
        classifier = self._classifiers.get(asked.classifier)
        if classifier is None:
            raise OptionError(
                "classifier", f"classifier {_shown(asked.classifier)} is none of {', '.join(self._classifiers)}"
            )
        try:
            with np.errstate(over="ignore"):  # beyond float32 is beyond [0, 1] too, and refused as such
                fingerprints = np.array(asked.fingerprints, np.float32)
        except ValueError as error:
            raise RecordError(f"fingerprints are arrays of 20 numbers each: {error}") from error
        return msgspec.json.encode({"results": classifier.classify(fingerprints)})


class _Asked(msgspec.Struct):
    fingerprints: Annotated[list[Annotated[list[float], msgspec.Meta(max_length=20)]], msgspec.Meta(max_length=_ROWS)]
    classifier: str = "zones"


_asked = msgspec.json.Decoder(_Asked)


class _InTurn(Response):  # type: ignore[misc] # starlette is not followed
    """An answer that is made and sent in one of the places for such: what it holds is bounded by their number."""

    def __init__(self, turn: Any, make: Any) -> None:
        super().__init__()
        self._turn, self._make = turn, make

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._turn() as mine:
            if mine:
                try:
                    response = await run_in_threadpool(self._make)
                except AttnhookError as error:
                    response = await _bad_request(Request(scope), error)
            else:
                response = _busy("other queries have every place")
            await response(scope, receive, send)


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

    from attnhook.record.arrow import LIGHT, arrow_schema

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


def _arrow_response(url: str, arguments: dict[str, Any]) -> Response:
    return StreamingResponse(_arrow_stream(url, arguments), media_type=ARROW)


def _page_response(url: str, filters: dict[str, Any], offset: int, limit: int) -> Response:
    """One page as JSON, made batch by batch: as objects of Python, 100,000 rows would take 200 MB."""
    parts: list[bytes] = []
    left = limit
    more = False
    with open_store(url) as store:
        for batch in store.fingerprints(**filters, offset=offset, limit=limit + 1):
            more = batch.num_rows > left
            for row in batch.slice(0, left).to_pylist():
                row["time"] = row["time"].isoformat()
                parts.append(msgspec.json.encode(row))
            left -= min(batch.num_rows, left)
    following = str(offset + limit).encode() if more else b"null"
    body = b'{"rows":[' + b",".join(parts) + b'],"next_offset":' + following + b"}"
    return Response(body, media_type="application/json")


def _number(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.pop(name, None)
    if text is None:
        return default
    # int() refuses thousands of digits, and would take longer and longer for fewer
    if not (text.isascii() and text.isdecimal()) or len(text) > 20 or not low <= int(text) <= high:
        raise OptionError(name, f"{name}={_shown(text)} must be a whole number from {low} to {high}")
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
            name, f"{name}={_shown(text)} must be a time such as 2026-01-31T12:00:00Z, or seconds since 1970"
        ) from error


def _host(request: Request) -> str | None:
    """The name that the request was sent to; None where the header Host is none."""
    try:
        return request.url.hostname or ""
    except ValueError:
        return None


def _shown(text: str) -> str:
    """A text as an error shows it."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _busy(why: str) -> JSONResponse:
    refusal = _error(503, f"the collector is busy: {why}; try again")
    refusal.headers["Retry-After"] = "5"
    return refusal


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _bad_request(request: Request, error: Exception) -> Response:
    wrong = isinstance(error, (OptionError, RecordError))
    return _error(400 if wrong else 503, str(error))
