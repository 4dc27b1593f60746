"""jsonl files that are rotated, compressed and removed, by one process or several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnhook.errors import PluginError
from attnhook.sinks import rotation
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.opening import open_sink
from attnhook.sinks.retention import DAY_US
from attnhook.store import open_store
from tests.helpers import environment
from tests.sinks.samples import lean, record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def positions(path: Path) -> list[int]:
    with open_store(f"jsonl:{path}") as store:
        return [row for batch in store.fingerprints() for row in batch["query_position"].to_pylist()]


def test_without_options_nothing_rotates(path):
    sink = open_sink(f"jsonl:{path}")
    for start in range(0, 200, 50):
        sink.write([record(start + i) for i in range(50)])
    sink.close()
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("zstd", [False, True])
def test_a_file_that_is_large_enough_is_put_away(path, zstd):
    sink = open_sink(f"jsonl:{path}?rotate=64KiB" + "&zstd=1" * zstd)
    for start in range(0, 600, 50):
        sink.write([record(start + i) for i in range(50)])
    sink.close()
    away = rotation.rotated_files(path)
    assert len(away) >= 3
    assert all(file.suffix == (".zst" if zstd else ".jsonl") for file in away)
    assert not list(path.parent.glob(".*"))
    assert positions(path) == list(range(600))
    whole = [entry["query_position"] for file in away for entry in read_jsonl(file)]
    assert whole == list(range(len(whole)))
    if zstd:
        assert sum(file.stat().st_size for file in away) < 0.2 * 64 * 1024 * len(away)


def test_a_file_that_is_old_enough_is_put_away(path):
    sink = open_sink(f"jsonl:{path}?every=1s")
    sink.write([record(0)])
    sink.write([record(1)])
    assert not rotation.rotated_files(path)
    time.sleep(1.05)
    sink.write([record(2)])
    sink.write([record(3)])
    sink.close()
    assert len(rotation.rotated_files(path)) == 1
    assert len(list(read_jsonl(path))) == 1
    assert positions(path) == [0, 1, 2, 3]


@pytest.mark.slow
def test_processes_that_rotate_one_file_lose_no_line(path):
    code = f"""
import sys
from attnhook.sinks import open_sink
from tests.sinks.samples import lean
sink = open_sink("jsonl:{path}?rotate=32KiB&zstd=1")
for start in range(0, 600, 20):
    sink.write([lean(start + i, request_id=sys.argv[1]) for i in range(20)])
sink.close()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, f"r{i}"], env=environment()) for i in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert len(rotation.rotated_files(path)) > 5
    with open_store(f"jsonl:{path}") as store:
        for i in range(3):
            rows = [r for batch in store.fingerprints(request_id=f"r{i}") for r in batch["query_position"].to_pylist()]
            assert rows == list(range(600))


def test_a_file_that_is_there_plain_and_compressed_counts_once(path):
    sink = open_sink(f"jsonl:{path}?rotate=4096")
    sink.write([lean(i) for i in range(20)])
    sink.close()
    (away,) = rotation.rotated_files(path)
    kept = away.read_bytes()
    rotation.compress(away)
    away.write_bytes(kept)  # a crash between the two steps
    assert positions(path) == list(range(20))


def test_other_files_beside_it_are_not_touched(path):
    others = ["records-old.jsonl", "records-20261301T000000.000000Z-1.jsonl", "records-20261123T153000.000001Z-x.jsonl"]
    for name in others:
        (path.parent / name).write_text("not ours\n")
        os.utime(path.parent / name, (0, 0))
    sink = open_sink(f"jsonl:{path}?rotate=4096&keep_days=1")
    sink.write([lean(i) for i in range(20)])
    assert sink.prune(time.time_ns() // 1000 + DAY_US) == 20
    sink.write([lean(99)])
    sink.close()
    assert sorted(os.listdir(path.parent)) == sorted([*others, path.name])
    assert positions(path) == [99]


def test_old_files_go_and_new_ones_stay(path):
    sink = open_sink(f"jsonl:{path}?rotate=4096&zstd=1")
    for start in (0, 20, 40):
        sink.write([lean(start + i) for i in range(20)])
    sink.close()
    old = rotation.rotated_files(path)
    for age, file in zip((5, 3, 1), old, strict=True):
        moment = time.time() - age * 86400
        os.utime(file, (moment, moment))
    sink = open_sink(f"jsonl:{path}?rotate=4096&keep_days=4")
    sink.close()
    assert positions(path) == list(range(20, 60))


def test_a_rotation_that_fails_costs_no_record(path, caplog):
    (path.parent / "elsewhere").mkdir()
    sink = open_sink(f"jsonl:{path}?rotate=4096")
    sink.write([lean(0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "rotated_name", lambda path: path.parent / "no" / "such" / "folder")
        sink.write([lean(1 + i) for i in range(20)])
    assert "cannot be rotated" in caplog.text
    sink.write([lean(21)])
    sink.close()
    assert positions(path) == list(range(22))


def test_a_folder_that_is_gone_for_a_while(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "records.jsonl"
    sink = open_sink(f"jsonl:{path}?rotate=4096")
    sink.write([lean(i) for i in range(20)])  # rotated: the next write begins a file
    folder.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            sink.write([lean(20)])
    (tmp_path / "away").rename(folder)
    sink.write([lean(20)])
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write([lean(21)])
    assert positions(path) == list(range(21))


def test_a_request_is_deleted_in_place(path):
    sink = open_sink(f"jsonl:{path}")
    sink.write([lean(0), lean(1, request_id='o"dd\n'), lean(2), lean(3, request_id='o"dd\n'), lean(4)])
    assert sink.delete("o") == 0
    assert sink.delete('o"dd\n') == 2
    sink.write([lean(5)])
    sink.close()
    assert positions(path) == [0, 2, 4, 5]


def test_a_damaged_compressed_file_is_named(path):
    sink = open_sink(f"jsonl:{path}?rotate=4096&zstd=1")
    sink.write([lean(i) for i in range(20)])
    sink.close()
    (away,) = rotation.rotated_files(path)
    away.write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 500)
    with pytest.raises(PluginError, match=rf"{away.name}.*damaged"):
        positions(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("x.jsonl?zstd=1", "are for files that are rotated; add rotate=64MB"),
        ("x.jsonl?keep_days=3", "are for files that are rotated"),
        ("x.jsonl?rotate=1KB", "rotate='1KB' must be a size of at least 4096 bytes"),
        ("x.jsonl?rotate=64XB", "must be a size"),
        ("x.jsonl?every=1", "every='1' must be a time"),
        ("x.jsonl?every=0.5s", "from 1s to ten years"),
        ("x.jsonl?rotate=1MB&zstd=yes", "zstd='yes' must be 0 or 1"),
        ("x.jsonl?rotat=1MB", "unknown option 'rotat'; did you mean 'rotate'"),
        ("x.jsonl?rotate=1MB&keep_days=0", "keep_days='0' must be a number of days"),
        ("-?rotate=1MB", "standard output is no file"),
        ("/dev/null?rotate=1MB", "/dev/null is no file"),
    ],
)
def test_bad_options(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=message):
        open_sink(f"jsonl:{config}")


def test_a_question_mark_alone_is_part_of_the_name(tmp_path):
    open_sink(f"jsonl:{tmp_path}/what?.jsonl").close()
    assert os.listdir(tmp_path) == ["what?.jsonl"]
