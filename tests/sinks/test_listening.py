"""Sinks that listen, in processes that have children: real ports, real forks, real pools."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from pathlib import Path

import pytest

import attnhook
from attnhook.errors import PluginError
from attnhook.process import lifecycle
from attnhook.sinks import listening
from attnhook.sinks.opening import open_sink
from tests.helpers import python
from tests.sinks.samples import record

SCHEMES = ("prometheus", "websocket")
PRELUDE = """
import json, os, socket, sys, time
import transformers  # a script's own import, which every child repeats
from attnhook.process import lifecycle
from tests.sinks.samples import record

def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 10).close()
    except ConnectionRefusedError:
        return False
    return True

PORTS = [int(port) for port in os.environ["PORTS"].split()]

def publish(count=3):
    lifecycle.publish([record(i) for i in range(count)])
    assert lifecycle.flush(60)
    return {name.partition(":")[0]: counts["dropped"] for name, counts in lifecycle.sink_stats().items()}
"""
REFUSED = {"prometheus": {"not_listening": 3}, "websocket": {"not_listening": 3}}


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def urls(ports: list[int]) -> list[str]:
    return [f"{scheme}:127.0.0.1:{port}" for scheme, port in zip(SCHEMES, ports, strict=True)]


def run(folder: Path, code: str) -> list[object]:
    """The JSON lines that a script printed; with ``ATTNHOOK=1`` and both sinks, its last line ends it well."""
    ports = free_ports(2)
    script = folder / "script.py"
    script.write_text(PRELUDE + code)
    environ = {"ATTNHOOK": "1", "ATTNHOOK_SINKS": ",".join(urls(ports)), "PORTS": " ".join(map(str, ports))}
    done = python(str(script), timeout=60, **environ)
    assert done.returncode == 0, done.stderr
    for scheme in SCHEMES:  # whoever could not listen said so, in one line per sink and process
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{scheme}:")]
        assert all(
            "drops records: DroppedError: sink" in line and "another process has that port" in line for line in lines
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_listens_from_the_first_record_on(tmp_path):
    ports = free_ports(2)
    attnhook.install(sinks=urls(ports))
    try:
        for port in ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        lifecycle.publish([record(i) for i in range(3)])
        assert lifecycle.flush(60)
        for port in ports:
            socket.create_connection(("127.0.0.1", port)).close()
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=60) as reply:
            assert b'attnhook_records_total{row="generated"} 3.0' in reply.read()
    finally:
        attnhook.uninstall()
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_a_bad_address_is_refused_before_that():
    with pytest.raises(PluginError, match="give a token"):
        attnhook.install(sinks="websocket:0.0.0.0:9003")
    with pytest.raises(PluginError, match="bad address"):
        attnhook.install(sinks="prometheus:nowhere")
    assert lifecycle.installed() == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_port_that_is_taken_is_tried_again(scheme, monkeypatch, caplog):
    monkeypatch.setattr(listening, "RETRY_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        url = f"{scheme}:127.0.0.1:{port}"
        with pytest.raises(PluginError, match="another process has that port"):
            open_sink(url)  # asked for now, it is refused now
        attnhook.install(sinks=url)
        try:
            lifecycle.publish([record(0)])
            assert lifecycle.flush(60)
            assert lifecycle.sink_stats()[url] == {"queued": 0, "written": 0, "dropped": {"not_listening": 1}}
            taken.close()
            time.sleep(0.3)
            lifecycle.publish([record(1), record(2)])
            assert lifecycle.flush(60)
            assert lifecycle.sink_stats()[url] == {"queued": 0, "written": 2, "dropped": {"not_listening": 1}}
            socket.create_connection(("127.0.0.1", port)).close()
        finally:
            attnhook.uninstall()
    (message,) = (line.message for line in caplog.records if "drops records" in line.message)
    assert "another process has that port" in message and "the port is tried again" in message


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_works_and_its_children_warn_and_go_on(tmp_path, method):
    told = run(
        tmp_path,
        f"""
if __name__ == "__main__":
    import multiprocessing
    print(json.dumps(publish()))
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(json.dumps(pool.map(abs, [-1, 2])))
        print(json.dumps(pool.apply(publish)))
        pool.close()
        pool.join()
    print(json.dumps([answers(port) for port in PORTS]))
""",
    )
    assert told == [{"prometheus": {}, "websocket": {}}, [1, 2], REFUSED, [True, True]]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_leaves_at_once_and_holds_no_port(tmp_path):
    told = run(
        tmp_path,
        """
import attnhook
publish()
reading, writing = os.pipe()
began = time.monotonic()
for captures in (False, True):
    pid = os.fork()
    if pid == 0:
        if captures:
            print(json.dumps(publish()), flush=True)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
print(json.dumps(time.monotonic() - began < 5))
print(json.dumps([answers(port) for port in PORTS]))
pid = os.fork()
if pid == 0:
    os.read(reading, 1)
    print(json.dumps([answers(port) for port in PORTS]), flush=True)  # the parent has gone from the ports
    print(json.dumps(publish(4)), flush=True)
    print(json.dumps([answers(port) for port in PORTS]), flush=True)
    sys.exit(0)
attnhook.uninstall()
os.write(writing, b"x")
assert os.waitpid(pid, 0)[1] == 0
""",
    )
    assert told == [REFUSED, True, [True, True], [False, False], {"prometheus": {}, "websocket": {}}, [True, True]]
