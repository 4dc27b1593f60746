"""Random requests of clients who want more than a server gives, and what may leave it all the same.

The server has a capture key, gives fingerprints only, hides a prefix and limits concurrency. Each request is made of a
route and a body with some of our fields, right and wrong, in their places and in others, some of them with the names
that our front ends and workers use among themselves.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from attnhook.options import RequestOptions
from attnhook.serving.wire import pack_options
from attnhook.sinks.jsonl import read_jsonl
from tests.backends.servers import Server

KEY = "open-sesame"
PREFIX, WIDTH, LIMIT = 50, 16, 6
#: Requests of a run; HOSTILE_REQUESTS=500 is the long one.
COUNT = int(os.environ.get("HOSTILE_REQUESTS", "30"))
ENVIRONMENT = {
    "ATTNHOOK_API_KEY": KEY,
    "ATTNHOOK_FINGERPRINT_ONLY": "1",
    "ATTNHOOK_MASK_PREFIX": str(PREFIX),
    "ATTNHOOK_MAX_CONCURRENT": str(LIMIT),
}
#: What only a record that tells positions has.
_TELLING = (b"token_positions", b"attention_scores", b"top_hubs", b"hub_scores", b"topk_mass", b"query_token")
_ENTRY = {
    "schema_version", "mode", "decode_step", "query_position", "think_phase", "fingerprint", "sink_mass", "manifold",
    "spans",
}  # fmt: skip
_PACKED = [
    *(pack_options(RequestOptions(layers="all", prompt=True), reply=reply) for reply in (True, False)),
    pack_options(RequestOptions(mode="fingerprint", spans={"one": (3, 4)})),
    "{}", "not json", '{"reply": true}', "[]", "", 7, None, True, ["x"], {"mode": "raw"}, "9" * 3000,
]  # fmt: skip
#: Field -> values that a client may try.
FIELDS: dict[str, list[Any]] = {
    "return_attention_tokens": [True, True, True, True, True, True, False, "yes", 1, None, [True]],
    "attention_mode": [*8 * ["fingerprint"], "raw", "sketch", "x", None, 3],
    "top_k_attention": [1, 8, 256, 0, 10**30, -1, "8", 2.5],
    "attention_layers": ["last", "all", "auto", [0, 29], [99], [-1], [], "x", {}, [[0]]],
    "attention_heads": [[0], [8], [9], None, "x", [-1]],
    "attention_prompt": [True, False, "x"],
    "attention_stride": [1, 3, 0],
    "attention_max_tokens": [1, 100, 0],
    "attention_mask_prefix": [0, 10, 60, -1, "0"],
    "attention_spans": [
        {"all": [0, 2**31 - 1]}, {"a": [64, 80]}, {"a": [0, 1]}, {f"p{n}": [n, n + 1] for n in range(62)},
        {"a": [0, 64], "b": [0, 65]}, {"a": [51, 52]}, {"a": [0, 50]}, {"x" * 300: [0, 64]}, {"a": [5]}, [], "x",
    ],
    "attention_self_check": [True, False, 0],
    "attention_unknown": [1],
    "attnhook": _PACKED,
}  # fmt: skip


class Route(NamedTuple):
    """A way in: its body with a prompt of so many words, and whether records may come out."""

    path: str
    body: Callable[[int], dict[str, Any]]
    carries: bool = False


class Sent(NamedTuple):
    """A request."""

    route: Route
    body: dict[str, Any]
    headers: dict[str, str]
    plain: dict[str, Any]  # the same of a client who knows nothing of us

    @property
    def may_capture(self) -> bool:
        """Whether records of it may leave at all: asked for by the name and with the key, on a route that has it."""
        return self.route.carries and self.headers.get("X-Attention-Key") == KEY


@dataclass
class Found:
    """What a run has seen."""

    statuses: list[int]  # of each request
    captured: int = 0  # replies with records
    rows: int = 0  # records in them
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # small request of somebody else, in seconds
    others: int = 0


def requests(routes: list[Route], hidden: list[Callable[[Any], dict[str, Any]]], seed: int) -> Iterator[Sent]:
    """Random requests; ``hidden`` make fields of a body in which an engine takes a client's own values."""
    chance = random.Random(seed)
    often = {"return_attention_tokens": 0.85, "attention_mode": 0.9, "attention_spans": 0.2}
    while True:
        route = chance.choice(routes)
        plain = route.body(chance.choice([3, 70, 120]))
        if chance.random() < 0.3:
            plain["stream"] = True
        body = dict(plain)
        for name, values in FIELDS.items():
            if chance.random() < often.get(name, 0.05):
                body[name] = chance.choice(values)
        if chance.random() < 0.3:
            names = chance.sample(list(FIELDS), 3)
            inner = {name: chance.choice(FIELDS[name]) for name in names}
            body.update(chance.choice(hidden)(inner))
        key = chance.choice([*4 * [KEY], "", KEY.upper(), KEY[:-1]])
        yield Sent(route, body, {"X-Attention-Key": key} if key else {}, plain)


def run(server: Server, sent: list[Sent], small: dict[str, Any]) -> Found:
    """Send them, eight at a time, while somebody else asks small things on ``/v1/completions``."""
    found, lock, over = Found([0] * len(sent)), threading.Lock(), threading.Event()

    def other() -> None:
        while not over.is_set():
            began = time.perf_counter()
            status, reply = server.post("/v1/completions", small)
            took = time.perf_counter() - began
            with lock:
                found.others += 1
                found.slowest = max(found.slowest, took)
                if status != 200 or b"attention" in json.dumps(reply).encode():
                    found.faults.append(f"somebody else got {status} {reply}")

    def one(number: int) -> None:
        request = sent[number]
        status, data = server.raw(request.route.path, request.body, **request.headers)
        faults, rows = check(request, status, data)
        with lock:
            found.statuses[number] = status
            found.captured += bool(rows)
            found.rows += rows
            found.faults += [
                f"{request.route.path} {json.dumps(request.body).replace('word ', '')[:900]}: {fault}"
                for fault in faults
            ]

    bystander = threading.Thread(target=other)
    bystander.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(len(sent))))
    finally:
        over.set()
        bystander.join()
    return found


def check(sent: Sent, status: int, data: bytes) -> tuple[list[str], int]:
    """What of a raw answer should not have left, and how many records it holds."""
    faults = [f"{name.decode()} in the answer" for name in _TELLING if name in data]
    if KEY.encode() in data:
        faults.append("the key is in the answer")
    if len(data) > 200_000:
        faults.append(f"{len(data)} bytes")
    entries = list(_entries(_parsed(data)))
    if entries and not sent.may_capture:
        faults.append(f"{len(entries)} records of a request that may not capture")
    for entry in entries:
        if entry["mode"] != "fingerprint" or entry.keys() - _ENTRY:
            faults.append(f"a record of mode {entry['mode']} with {sorted(entry)}")
        for name in entry.get("spans", {}):
            for start, end in _bounds(sent.body, name):
                if end < PREFIX or (start % WIDTH and start >= PREFIX) or (end % WIDTH and end < 10**6):
                    faults.append(f"a span of [{start}, {end}]")
    wanted = sent.body.get("return_attention_tokens") is True
    if status == 200 and wanted and not entries and b'error"' not in data:
        faults.append(f"asked, and got neither records nor an error: {data[:300]!r}")
    return faults, len(entries)


def _bounds(body: Any, label: str) -> Iterator[list[int]]:
    """Of the spans of this name that a body asks for, wherever."""
    if isinstance(body, dict):
        spans = body.get("attention_spans")
        if isinstance(spans, dict) and label in spans:
            yield spans[label]
    for inner in body.values() if isinstance(body, dict) else body if isinstance(body, list) else ():
        yield from _bounds(inner, label)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line) for line in lines]


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """Our records, wherever in an answer they are."""
    if isinstance(value, dict):
        if "think_phase" in value:
            yield value
        else:
            for inner in value.values():
                yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def check_sink(path: Path, most: int) -> None:
    """A sink got fingerprints alone, and of no more rows than were asked for by those who may."""
    lines = list(read_jsonl(path, tolerate_torn_tail=True)) if path.exists() else []
    assert all(line["mode"] == "fingerprint" and "layers" not in line for line in lines)
    assert len(lines) <= most, f"{len(lines)} records in the sink, where {most} were asked for"


def hostile_run(
    server: Server,
    routes: list[Route],
    hidden: list[Callable[[Any], dict[str, Any]]],
    small: dict[str, Any],
    sink: Path,
) -> None:
    """The whole: nothing leaves that should not, nobody else waits twice as long, and the server serves on."""
    source = requests(routes, hidden, seed=14)
    sent = [next(source) for _ in range(COUNT)]
    plain = run(server, [one._replace(body=one.plain) for one in sent], small)
    assert not plain.faults, "\n".join(plain.faults[:10])
    found = run(server, sent, small)
    statuses = Counter(found.statuses)
    print(
        f"{COUNT} requests: {dict(statuses)}, {found.captured} replies with {found.rows} records; slowest of "
        f"{found.others} small requests of others {found.slowest:.2f} s, without capture {plain.slowest:.2f} s"
    )
    assert not found.faults, "\n".join(found.faults[:10])
    for one, without, status in zip(sent, plain.statuses, found.statuses, strict=True):
        assert status < 500 or without >= 500, f"HTTP {status}: {one.route.path} {json.dumps(one.body)[:900]}"
    assert found.captured >= COUNT // 30 and statuses[400] and statuses[403]
    assert found.slowest <= 2 * plain.slowest + 0.5, (found.slowest, plain.slowest)
    check_sink(sink, most=2 * found.rows + 200)
    status, _ = server.post("/v1/completions", small)
    assert status == 200
