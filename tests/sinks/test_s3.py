"""parquet:s3://…: against moto, which answers S3's HTTP interface in a process of its own on 127.0.0.1."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import polars
import pytest

from attnhook.errors import PluginError
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from tests.helpers import python
from tests.sinks.samples import lean, record, write_around_a_fork

#: `make venv` puts moto there
MOTO = Path(sys.prefix) / "moto-extra"
PATIENCE = 120.0  # seconds

pytestmark = pytest.mark.skipif(not MOTO.exists(), reason=f"moto is not in {MOTO}: make venv puts it there")


class Server:
    """A moto process; what it holds ends with it."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        with open(log, "a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                env={**os.environ, "PYTHONPATH": str(MOTO)},
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.request("GET", "moto-api/")
                break
            except urllib.error.URLError:
                assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        self.request("PUT", "bucket")

    def request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, plain, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return reply.read()

    def url(self, path: str, **options: str) -> str:
        """The URL of a sink in this server."""
        options = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http", "region": "us-east-1"} | options
        return f"parquet:s3://{path}?" + "&".join(f"{key}={value}" for key, value in options.items())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(free_port(), tmp_path_factory.mktemp("moto") / "log")
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("ATTNHOOK_CACHE", str(tmp_path / "cache"))  # journals


def positions(url: str) -> list[int]:
    with open_store(url) as store:
        return sorted(row.query_position for row in store.records())


def journals(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.arrows"))


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "from attnhook.cli.app import main; main()", "sinks", *arguments)


@pytest.mark.slow
def test_records_come_back_from_s3(server, tmp_path):
    url = server.url("bucket/some/records")
    sink = open_sink(url)
    written = [lean(i, model=f"m{i % 2}", request_id=f"r{i // 10}") for i in range(100)]
    sink.write(written)
    assert len(journals(tmp_path)) == 1
    sink.publish()
    sink.write([record(200)])
    sink.close()
    assert journals(tmp_path) == []
    with open_store(url) as store:
        assert store.count() == 101
        assert store.count(model="m1") == 50
        rows = {row.key: row for row in store.records()}
        assert [batch.num_rows for batch in store.fingerprints(offset=95, limit=3)] == [3]
    for one in [*written, record(200)]:
        assert rows[one.key].to_bytes() == one.to_bytes()
    sink = open_sink(url)
    assert sink.delete("r3") == 10
    assert sink.prune((time.time_ns() + 10**14) // 1000) == 91
    sink.close()
    with open_store(url) as store:
        assert store.count() == 0


def test_another_reader_of_s3(server):
    sink = open_sink(server.url("bucket/polars"))
    sink.write([lean(i, model=f"org/m{i % 2}") for i in range(50)])
    sink.close()
    frame = polars.scan_parquet(
        "s3://bucket/polars/**/*.parquet",
        hive_partitioning=True,
        storage_options={
            "aws_endpoint_url": f"http://127.0.0.1:{server.port}",
            "aws_allow_http": "true",
            "aws_region": "us-east-1",
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
        },
    ).collect()
    assert frame.group_by("model").len().sort("model").rows() == [("org/m0", 25), ("org/m1", 25)]
    assert sorted(frame["query_position"].to_list()) == list(range(50))


@pytest.mark.slow
def test_attnhook_sinks_test(server):
    run = cli("test", server.url("bucket/probe"))
    assert run.returncode == 0, run.stderr
    assert "it was read back and deleted" in run.stdout
    with open_store(server.url("bucket/probe")) as store:
        assert store.count() == 0


@pytest.mark.slow
def test_attnhook_sinks_convert(server, tmp_path):
    local = open_sink(f"sqlite:{tmp_path}/a.db")
    local.write([record(i) for i in range(30)])
    local.close()
    for source, target in (
        (f"sqlite:{tmp_path}/a.db", server.url("bucket/copy")),
        (server.url("bucket/copy"), f"sqlite:{tmp_path}/b.db"),
    ):
        run = cli("convert", source, target)
        assert run.returncode == 0, run.stderr
    assert positions(f"sqlite:{tmp_path}/b.db") == list(range(30))


def test_what_is_queued_when_the_interpreter_ends_is_uploaded(server, tmp_path):
    """pyarrow ends its S3 at exit as well."""
    url = server.url("bucket/exit")
    run = python(
        "-c",
        f"""
        from attnhook.sinks.delivery import Delivery
        from tests.sinks.samples import record
        delivery = Delivery.from_urls(["{url}"])
        delivery.put([record(i) for i in range(10)])
        """,
    )
    assert run.returncode == 0, run.stderr
    assert "failed" not in run.stderr
    assert positions(url) == list(range(10))
    assert journals(tmp_path) == []


def test_the_journal_of_a_killed_process_is_uploaded_once(server, tmp_path):
    url = server.url("bucket/killed")
    run = python(
        "-c",
        f"""
        import os, signal
        from attnhook.sinks import open_sink
        from tests.sinks.samples import record
        sink = open_sink("{url}")
        sink.write([record(i) for i in range(10)])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert run.returncode == -signal.SIGKILL
    assert positions(url) == []
    assert len(journals(tmp_path)) == 1
    for _ in range(2):
        open_sink(url).close()
        assert positions(url) == list(range(10))
    assert journals(tmp_path) == []


@pytest.mark.slow
def test_a_forked_child_writes_too(server):
    write_around_a_fork(server.url("bucket/fork"))
    assert positions(server.url("bucket/fork")) == [0, 1, 2]


def test_a_missing_bucket(server):
    with pytest.raises(PluginError, match=r"'nowhere' not found.*allow_bucket_creation=1"):
        open_sink(server.url("nowhere/records"))
    with pytest.raises(PluginError, match="there is no bucket 'nowhere'; correct its name"):
        open_store(server.url("nowhere/records"))
    with pytest.raises(PluginError, match="holds no records"):
        open_store(server.url("bucket/nothing"))
    open_sink(server.url("made/records", allow_bucket_creation="1")).close()
    assert b"made" in server.request("GET", "")


def test_urls_without_a_bucket_or_with_credentials(server):
    with pytest.raises(PluginError, match="names no bucket"):
        open_sink(server.url(""))
    with pytest.raises(PluginError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_sink(server.url("someone:hush@bucket/records"))
    assert "hush" not in str(caught.value)


def test_credentials_that_the_server_refuses(server):
    url = server.url("bucket/refused")
    sink = open_sink(url)
    sink.write([record(0)])
    sink.publish()
    sink.write([record(1)])
    with open_store(url) as store:
        server.request("POST", "moto-api/reset-auth", b"0")  # from now on it looks at the keys, and knows none
        try:
            with pytest.raises(PluginError, match=r"cannot be used.*check AWS_ACCESS_KEY_ID"):
                open_sink(url)
            with pytest.raises(PluginError, match=r"cannot be read.*check AWS_ACCESS_KEY_ID"):
                store.count()
            with pytest.raises(OSError, match=r"403|ACCESS_DENIED"):
                sink.publish()
        finally:
            server.request("POST", "moto-api/reset-auth", b"inf")
        assert store.count() == 1
    sink.close()
    assert positions(url) == [0, 1]


@pytest.mark.slow  # waits for the AWS SDK's retries, seven seconds each
def test_a_server_that_goes_and_comes_back(tmp_path, caplog):
    """What was written waits in the journal, what the queue cannot hold meanwhile is counted."""
    server = Server(free_port(), tmp_path / "log")
    try:
        url = server.url("bucket/records", rotate="4096")
        delivery = Delivery.from_urls([url], queue_size=100)
        sink = delivery.sinks[url]
        server.kill()
        put = 0
        with caplog.at_level(logging.WARNING, "attnhook"):
            deadline = time.monotonic() + PATIENCE
            while not sink.failed:  # it tries to upload, which ends after seconds; meanwhile the queue runs full
                assert time.monotonic() < deadline
                delivery.put([record(put + i) for i in range(20)])
                put += 20
                time.sleep(0.02)
            assert delivery.flush(PATIENCE)
        assert "the rows wait in the journal" in caplog.text
        stats = delivery.stats()[url]
        assert stats["dropped"].keys() == {"queue_full"}
        assert stats["written"] + stats["dropped"]["queue_full"] == put
        with pytest.raises(PluginError, match="The server does not answer"):
            open_store(url)
        server = Server(server.port, tmp_path / "log")
        delivery.close()
        open_sink(url).close()  # the new server has no marker of the data set
        assert len(positions(url)) == stats["written"]
        assert journals(tmp_path) == []
    finally:
        server.kill()
