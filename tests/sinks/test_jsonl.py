"""jsonl: whole lines only, whatever happens to the disk, the process and the file."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from attnhook.errors import PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import jsonl
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.opening import open_sink

ROOT = Path(__file__).parents[2]
TORN = b'{"request_id":"old","choice":0,"mo'


def record(position: int, **changes: object) -> TokenRecord:
    values: dict = {
        "request_id": "r",
        "query_position": position,
        "layers": (0,),
        "token_positions": np.array([[position, 0]], np.int32),
        "attention_scores": np.array([[0.75, 0.25]], np.float32),
        "fingerprints": fp.assemble(np.full((1, 16), 1 / 16), np.ones(1)),
        "model": "m",
    }
    return TokenRecord(**{**values, **changes})


def positions(path: Path, **options: bool) -> list[int]:
    return [entry["query_position"] for entry in read_jsonl(path, **options)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


# -- writing


def test_a_line_is_the_record_with_its_request(path):
    sink = open_sink(f"jsonl:{path}")
    written = record(7, choice=1, request_id="é\ud800\n")
    sink.write([written, record(8)])
    sink.close()
    sink.close()
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 3
    assert lines[-1] == b""
    assert json.loads(lines[0]) == {"request_id": "é\ud800\n", "choice": 1, "model": "m", **written.to_dict()}
    assert list(json.loads(lines[0]))[:3] == ["request_id", "choice", "model"]
    assert positions(path) == [7, 8]


def test_records_are_readable_before_flush_and_appended_by_the_next_run(path):
    first = open_sink(f"jsonl:{path}")
    first.write([record(0)])
    assert positions(path) == [0]
    first.close()
    second = open_sink(f"jsonl:{path}")
    second.write([record(1)])
    second.close()
    assert positions(path) == [0, 1]


def test_a_batch_is_one_write(path, monkeypatch):
    sink = open_sink(f"jsonl:{path}")
    sizes = []
    write = os.write
    monkeypatch.setattr(jsonl.os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    sink.write([record(i) for i in range(1000)])
    assert sizes == [path.stat().st_size]


def test_standard_output(capsys):
    sink = open_sink("jsonl:-")
    sink.write([record(0), record(1)])
    sink.close()
    print("still open")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["query_position"] for line in lines[:2]] == [0, 1]
    assert lines[2:] == ["still open"]


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_sink("jsonl:~/here.jsonl").close()
    assert (tmp_path / "here.jsonl").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprints": np.full((1, 20), np.nan, np.float32)},
        {"attention_scores": np.array([[np.inf, 0.25]], np.float32)},
    ],
    ids=["fingerprint", "score"],
)
def test_nan_is_refused_before_anything_is_written(path, changes):
    sink = open_sink(f"jsonl:{path}")
    with pytest.raises(ValueError, match=r"nan|not JSON compliant"):
        sink.write([record(0), record(1, **changes)])
    sink.write([record(2)])
    assert positions(path) == [2]


def test_writing_after_close_is_an_error(path):
    sink = open_sink(f"jsonl:{path}")
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write([record(0)])


# -- what cannot be opened


def test_no_path():
    with pytest.raises(PluginError, match=r"jsonl:records\.jsonl"):
        open_sink("jsonl:")


def test_a_missing_folder_is_not_made(tmp_path):
    with pytest.raises(PluginError, match=rf"mkdir -p {tmp_path}/no/such") as caught:
        open_sink(f"jsonl:{tmp_path}/no/such/file.jsonl")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not (tmp_path / "no").exists()


def test_a_folder(tmp_path):
    with pytest.raises(PluginError, match=rf"is a folder: name a file in it, such as jsonl:{tmp_path}/records\.jsonl"):
        open_sink(f"jsonl:{tmp_path}")


@pytest.fixture
def unprivileged():
    """A folder of an ordinary user, and that user's rights if the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="attnhook-"))
    nobody = 65534
    if os.geteuid() == 0:
        os.chown(folder, nobody, nobody)
        os.seteuid(nobody)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o700)
    shutil.rmtree(folder)


def test_a_read_only_file(unprivileged):
    path = unprivileged / "records.jsonl"
    path.write_text("")
    path.chmod(0o444)
    with pytest.raises(PluginError, match=r"(?s)records\.jsonl.*Permission denied.*change its permissions"):
        open_sink(f"jsonl:{path}")


def test_an_unwritable_folder(unprivileged):
    unprivileged.chmod(0o500)
    with pytest.raises(PluginError, match=r"Permission denied.*change its permissions"):
        open_sink(f"jsonl:{unprivileged}/records.jsonl")


def test_nothing_stays_open_when_opening_fails(path, monkeypatch):
    path.write_bytes(TORN)

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(jsonl.os, "write", full)
    with pytest.raises(PluginError, match="The disk is full: make room"):
        open_sink(f"jsonl:{path}")
    assert len(os.listdir("/proc/self/fd")) == before
    assert path.read_bytes() == TORN


# -- torn lines


def test_new_records_start_on_a_fresh_line(path, caplog):
    path.write_bytes(TORN)
    with caplog.at_level(logging.WARNING, "attnhook"):
        sink = open_sink(f"jsonl:{path}")
        sink.write([record(0), record(1)])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert "fresh line" in caplog.text
    lines = path.read_bytes().splitlines()
    assert lines[0] == TORN
    assert [json.loads(line)["query_position"] for line in lines[1:]] == [0, 1]


def test_a_whole_file_is_left_alone(path, caplog):
    open_sink(f"jsonl:{path}").close()
    assert path.read_bytes() == b""
    path.write_bytes(b"{}\n")
    open_sink(f"jsonl:{path}").close()
    assert path.read_bytes() == b"{}\n"
    assert not caplog.records


def _failing_write(monkeypatch, *, after: int):
    """The next os.write takes ``after`` bytes, the one after it finds the disk full."""
    write, calls = os.write, []

    def partial(fd, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(fd, data[:after])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(jsonl.os, "write", partial)


def test_a_failed_write_is_taken_back(path, monkeypatch):
    sink = open_sink(f"jsonl:{path}")
    sink.write([record(0)])
    before = path.read_bytes()
    _failing_write(monkeypatch, after=700)
    with pytest.raises(OSError, match="No space left"):
        sink.write([record(1), record(2)])
    assert path.read_bytes() == before
    sink.write([record(3)])
    assert positions(path) == [0, 3]


def test_a_failed_write_that_cannot_be_taken_back_harms_no_later_line(path, monkeypatch, caplog):
    sink = open_sink(f"jsonl:{path}")
    sink.write([record(0)])
    _failing_write(monkeypatch, after=100)

    def refuse(fd, size):
        raise OSError(errno.EPERM, "append-only file")

    monkeypatch.setattr(jsonl.os, "ftruncate", refuse)
    with pytest.raises(OSError, match="No space left"):
        sink.write([record(1)])
    sink.write([record(2)])
    sink.write([record(3)])
    with pytest.raises(RecordError, match="line 2"):
        positions(path)
    assert positions(path, tolerate_torn_tail=True) == [0, 2, 3]


# -- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_whole_lines_and_writing_goes_on_when_there_is_room(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 16384)
    path = small_disk / "records.jsonl"
    sink = open_sink(f"jsonl:{path}")
    written = 0
    with pytest.raises(OSError, match="No space left") as caught:
        for start in range(0, 10**6, 7):
            sink.write([record(start + i) for i in range(7)])
            written += 7
    assert caught.value.errno == errno.ENOSPC
    assert written > 0
    assert positions(path) == list(range(written))
    with pytest.raises(OSError, match="No space left"):
        sink.write([record(i) for i in range(7)])
    ballast.unlink()
    sink.write([record(written)])
    assert positions(path) == list(range(written + 1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_takes_nothing():
    sink = open_sink("jsonl:/dev/full")
    with pytest.raises(OSError, match="No space left"):
        sink.write([record(0)])
    sink.close()


# -- several processes


def test_batches_of_several_processes_do_not_mix(path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jsonl import open_sink, record
sink = open_sink("jsonl:{path}")
for _ in range(40):
    sink.write([record(i, request_id=sys.argv[1]) for i in range(25)])
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(n)], env=environ) for n in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    entries = [(e["request_id"], e["query_position"]) for e in read_jsonl(path)]
    assert len(entries) == 3 * 40 * 25
    for start in range(0, len(entries), 25):
        assert [p for _, p in entries[start : start + 25]] == list(range(25))
        assert len({r for r, _ in entries[start : start + 25]}) == 1


def test_taking_back_a_failed_write_spares_what_another_process_appends(path, monkeypatch):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jsonl import open_sink, record
print("ready", flush=True)
open_sink("jsonl:{path}").write([record(7)])
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    sink = open_sink(f"jsonl:{path}")
    sink.write([record(0)])
    write, others = os.write, []

    def partial(fd, data):
        if not others:
            others.append(subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE))
            assert others[0].stdout.readline() == b"ready\n"
            return write(fd, data[:100])
        with pytest.raises(subprocess.TimeoutExpired):
            others[0].wait(0.5)  # it waits for us
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "write", partial)
    with pytest.raises(OSError, match="No space left"):
        sink.write([record(1)])
    assert others[0].wait(20) == 0
    others[0].stdout.close()
    assert positions(path) == [0, 7]


# -- reading


def _file(path: Path, *tail: bytes) -> Path:
    sink = open_sink(f"jsonl:{path}")
    sink.write([record(0), record(1)])
    sink.close()
    with path.open("ab") as file:
        file.writelines(tail)
    return path


def test_a_torn_last_line_is_named(path):
    with pytest.raises(RecordError, match=r"records\.jsonl, line 3 is not a record.*tolerate_torn_tail=True"):
        positions(_file(path, TORN))


def test_every_torn_last_line_is_noticed(path):
    whole = _file(path).read_bytes()
    last = whole.index(b"\n") + 1
    for end in range(last + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(RecordError, match="line 2"):
            positions(path)
        assert positions(path, tolerate_torn_tail=True) == [0]
    path.write_bytes(whole[:-1])  # only the line break is missing: the record is whole
    assert positions(path) == [0, 1]


def test_a_torn_last_line_is_skipped_when_asked_and_said_so(path, caplog):
    assert positions(_file(path, TORN), tolerate_torn_tail=True) == [0, 1]
    assert "line 3: skipped" in caplog.text


def test_records_before_a_bad_line_are_handed_out_first(path):
    reader = read_jsonl(_file(path, TORN))
    assert [next(reader)["query_position"], next(reader)["query_position"]] == [0, 1]
    with pytest.raises(RecordError):
        next(reader)


@pytest.mark.parametrize(
    "line", [b"hello\n", b"\n", b"3\n", b"[1]\n", b"\xff\xfe\n", b"{}\n", b'{"schema_version":3}\n', b"\x00" * 8]
)
def test_other_lines_are_never_skipped(path, line):
    with pytest.raises(RecordError, match="line 3"):
        positions(_file(path, line), tolerate_torn_tail=True)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        positions(tmp_path / "none.jsonl")
