"""The HTTP interface of a real collector process."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest

from attnhook.record.zones import classify_many
from attnhook.sinks.zmq import ZmqSink
from tests.collector.processes import collect, wait_for
from tests.sinks.samples import record

TOKEN = "a-token-of-some-length"
COUNT = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A collector with a token, two stores and 120 records of two models."""
    folder = tmp_path_factory.mktemp("http")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    stores = ["--store", "sqlite:x.db", "--store", "parquet:data?every=1s"]
    with collect(folder, *stores, "--token-file", "token") as collector:
        sink = ZmqSink()
        sink.open(collector.address)
        rows = [record(i, request_id=f"r{i // 20}", model="even" if i // 20 % 2 == 0 else "odd") for i in range(COUNT)]
        sink.write(rows)
        sink.close()

        def written() -> bool:
            stats = json.loads(collector.get("/stats", token=TOKEN)[1])
            return all(store["written"] == COUNT for store in stats["stores"].values())

        wait_for(written, "120 records written")
        yield collector


def rows_of(server, query: str) -> list[dict]:
    status, body = server.get(f"/fingerprints?{query}", token=TOKEN)
    assert status == 200, body
    return json.loads(body)["rows"]


def test_only_health_answers_without_the_token(server):
    assert server.get("/health") == (200, b'{"status":"ok"}')
    for path in ("/stats", "/metrics", "/fingerprints", "/nothing"):
        for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
            status, body = server.get(path, token=None if token is None else token.encode().decode("latin-1"))
            assert status == 401 and b"Authorization: Bearer" in body
    assert server.get("/nothing", token=TOKEN)[0] == 404
    assert server.get("/classify", token=TOKEN)[0] == 405


def test_fingerprints_are_those_that_were_sent(server):
    rows = rows_of(server, "limit=1000")
    assert len(rows) == COUNT
    for i, row in enumerate(rows):
        sent = record(i)
        assert (row["request_id"], row["query_position"]) == (f"r{i // 20}", i)
        assert np.array_equal(np.array(row["fingerprint"], np.float32), sent.fingerprint)
        assert row["zone"] == sent.zone
        assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(row["time"])) < timedelta(hours=1)


def test_filters(server):
    assert {row["model"] for row in rows_of(server, "model=odd")} == {"odd"}
    assert [row["query_position"] for row in rows_of(server, "request_id=r2")] == list(range(40, 60))
    zone = record(0).zone
    assert {row["zone"] for row in rows_of(server, f"zone={zone}")} == {zone}
    hour = 3600
    now = datetime.now(timezone.utc).timestamp()
    assert len(rows_of(server, f"since={now - hour}&until={now + hour}")) == COUNT
    assert rows_of(server, f"until={now - hour}") == []
    iso = (datetime.now(timezone.utc) - timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    assert len(rows_of(server, f"since={iso}")) == COUNT


def test_paging_goes_through_all_rows_once(server):
    seen, offset = [], 0
    while offset is not None:
        _, body = server.get(f"/fingerprints?limit=50&offset={offset}", token=TOKEN)
        page = json.loads(body)
        seen += [row["query_position"] for row in page["rows"]]
        offset = page["next_offset"]
    assert seen == list(range(COUNT))


@pytest.mark.parametrize("how", ["accept", "format"])
def test_arrow(server, how):
    headers = {"Accept": "application/vnd.apache.arrow.stream"} if how == "accept" else {}
    query = "" if how == "accept" else "&format=arrow"
    status, body = server.get(f"/fingerprints?limit=100{query}", token=TOKEN, **headers)
    assert status == 200
    table = pa.ipc.open_stream(io.BytesIO(body)).read_all()
    assert table.num_rows == 100
    assert table.schema.field("fingerprint").type == pa.list_(pa.float32(), 20)
    assert table.column("query_position").to_pylist() == list(range(100))
    status, body = server.get(f"/fingerprints?model=none{query}", token=TOKEN, **headers)
    empty = pa.ipc.open_stream(io.BytesIO(body)).read_all()
    assert empty.num_rows == 0 and empty.schema == table.schema


def test_the_other_store_by_its_name(server):
    wait_for(lambda: len(rows_of(server, "store=parquet:data")) == COUNT, "the Parquet file")
    assert server.get("/fingerprints?store=sqlite:/etc/passwd", token=TOKEN)[0] == 400


@pytest.mark.parametrize(
    "query, said",
    [
        ("limit=0", "limit='0' must be a whole number from 1"),
        ("limit=1000000000", "from 1 to 100000"),
        ("offset=-1", "offset='-1'"),
        ("since=yesterday", "since='yesterday' must be a time such as"),
        ("until=1e300", "until='1e300'"),
        ("format=csv", "must be json or arrow"),
        ("modell=x", "unknown parameter 'modell'"),
        ("limit=" + "9" * 5000, "limit='" + "9" * 60 + "…' must be a whole number from 1 to 100000"),
        ("offset=" + "9" * 5000, "…' must be a whole number from 0"),
        ("offset=" + str(2**62 + 1), "must be a whole number from 0"),
        ("limit=%D9%A3", "must be a whole number"),  # an Arabic three: a digit, and no number here
        ("limit=1e3", "must be a whole number"),
        ("limit=", "must be a whole number"),
        ("limit=%00", "must be a whole number"),
        ("limit=%ED%A0%80", "must be a whole number"),
        ("since=" + "9" * 5000, "must be a time such as"),
        ("since=nan", "must be a time such as"),
        ("until=-inf", "must be a time such as"),
        ("since=%ED%A0%80", "must be a time such as"),
        ("store=%ED%A0%80" + "x" * 5000, "is none of sqlite:x.db"),
        ("format=" + "x" * 5000, "must be json or arrow"),
        ("%ED%A0%80=1", "unknown parameter"),
        ("zone=x&" + "y" * 5000 + "=1", "unknown parameter"),
    ],
)
def test_bad_parameters_are_named(server, query, said):
    status, body = server.get(f"/fingerprints?{query}", token=TOKEN)
    assert status == 400 and said in json.loads(body)["error"]
    assert len(body) < 400, "what was asked is not sent back whole"


@pytest.mark.parametrize("store", ["sqlite:x.db", "parquet:data"])
@pytest.mark.parametrize("name", ["model", "request_id", "zone"])
@pytest.mark.parametrize("value", ["%00", "%ED%A0%80", "'", "%27%20OR%201=1--", "x" * 5000, "%F0%9F%98%80", ""])
def test_a_name_that_no_row_has_finds_none_whatever_it_is(server, store, name, value):
    assert rows_of(server, f"{name}={value}&store={store}") == []


@pytest.mark.parametrize("query", [f"offset={2**62}", f"offset={2**62}&format=arrow", f"limit={2**62}&format=arrow"])
def test_the_largest_numbers_that_are_taken(server, query):
    for store in ("sqlite:x.db", "parquet:data"):
        assert server.get(f"/fingerprints?{query}&store={store}", token=TOKEN)[0] == 200


def test_classify_gives_the_zones(server):
    fingerprints = np.stack([record(i).fingerprint for i in range(16)])
    codes, confidence = classify_many(fingerprints)
    body = json.dumps({"fingerprints": fingerprints.tolist()}).encode()
    status, reply = server.get("/classify", token=TOKEN, data=body)
    results = json.loads(reply)["results"]
    assert status == 200
    assert [one["label"] for one in results] == [record(i).zone for i in range(16)]
    assert np.allclose([one["confidence"] for one in results], confidence, atol=1e-6)
    assert len(set(codes.tolist())) > 1


@pytest.mark.parametrize(
    "body, said",
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"fingerprints": ' + b"[" * 100_000, "20 numbers each"),
        (b'{"else": ' + b"[" * 100_000, "no JSON"),
        (b"[]", "send {"),
        (b"", "no JSON"),
        (b"null", "send {"),
        (b"{}", "missing required field `fingerprints`"),
        (b"\xff\xfe{\0}\0", "no JSON"),
        (b'{"fingerprints": [[' + b"9" * 400 + b"]]}", "out of range"),
        (b'{"fingerprints": [[' + b"9" * 5000 + b"]]}", "20 numbers each"),
        (b'{"fingerprints": [[1e999]]}', "out of range"),
        (b'{"fingerprints": [[' + b",".join([b"1e300"] * 20) + b"]]}", "outside [0, 1]"),
        (b'{"fingerprints": [[' + b",".join([b"-1e300"] * 20) + b"]]}", "outside [0, 1]"),
        (b'{"fingerprints": [[true]]}', "20 numbers each"),
        (b'{"fingerprints": [[null]]}', "20 numbers each"),
        (b'{"fingerprints": [[' + b",".join([b"0"] * 21) + b"]]}", "20 numbers each"),
        (b'{"fingerprints": [' + b",".join([b"[]"] * 100_001) + b"]}", "length <= 100000"),
        (b'{"fingerprints": [], "classifier": "\\ud800"}', "no JSON"),
        (b'{"fingerprints": [], "classifier": "\xed\xa0\x80"}', "no JSON"),
        (b'{"fingerprints": [], "classifier": 7}', "Expected `str`"),
        (b'{"fingerprints": [], "classifier": "' + b"x" * 100_000 + b'"}', "none of zones"),
        (b'{"fingerprints": [[1, 2]]}', "shape"),
        (b'{"fingerprints": [["a"]]}', "20 numbers each"),
        (b'{"fingerprints": [[1], [1, 2]]}', "20 numbers each"),
        (b'{"fingerprints": [' + b",".join([b"5"] * 20) + b"]}", "20 numbers each"),
        (b'{"fingerprints": [[' + b",".join([b"5"] * 20) + b"]]}", "outside [0, 1]"),
        (b'{"fingerprints": [[' + b",".join([b"NaN"] * 20) + b"]]}", "no JSON"),
        (b'{"fingerprints": [], "classifier": "fitted"}', "none of zones"),
    ],
)
def test_what_cannot_be_classified_is_refused(server, body, said):
    status, reply = server.get("/classify", token=TOKEN, data=body)
    assert status == 400 and said in json.loads(reply)["error"]
    assert len(reply) < 500


def test_a_body_without_end_is_not_read_to_its_end(server):
    status, reply = server.get("/classify", token=TOKEN, data=b" " * (17 * 2**20))
    assert status == 413 and b"longer than" in reply


def test_metrics_pass_prometheus_own_check(server):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    status, text = server.get("/metrics", token=TOKEN)
    assert status == 200
    lines = text.decode().splitlines()
    assert 'attnhook_records_total{row="generated"} 120.0' in lines
    assert 'attnhook_store_written_records_total{store="sqlite:x.db"} 120.0' in lines
    assert 'attnhook_entropy_ratio_bucket{le="+Inf"} 120.0' in lines
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()


def test_without_a_token_only_names_of_this_machine_are_answered(tmp_path):
    """A web page that rebinds its own name to 127.0.0.1 cannot read what is stored."""
    with collect(tmp_path, "--store", "sqlite:x.db") as collector:
        port = collector.url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "[::1]"):
            assert collector.get("/stats", Host=f"{host}:{port}")[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
            assert collector.get("/stats", Host=f"{host}:{port}")[0] == 403
        for host in ("[::1", "[", "[x]", "127.0.0.1:99999999999", "127.0.0.1:x"):
            assert collector.get("/stats", Host=host)[0] in (200, 400), host  # as the release of starlette reads it
