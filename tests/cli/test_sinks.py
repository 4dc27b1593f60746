"""attnhook sinks: list, test, convert, prune, with one line for everything that cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnhook.record.columns import from_records
from attnhook.sinks.opening import open_sink
from attnhook.sinks.retention import DAY_US
from attnhook.store import open_store
from tests.cli.test_run import Cli, attnhook_cli  # noqa: F401 - a fixture
from tests.helpers import environment
from tests.record.samples import assert_same
from tests.sinks.samples import lean, record, with_ids

STORES = ("sqlite:{}/records.db", "parquet:{}/records", "jsonl:{}/records.jsonl")


@pytest.fixture
def sinks(attnhook_cli: Cli) -> Cli:  # noqa: F811
    return lambda *arguments: attnhook_cli("sinks", *arguments)


def write(url: str, records: list, time: int | None = None) -> None:
    sink = open_sink(url)
    sink.write_columns(from_records(records, time)) if time else sink.write(records)
    sink.close()


def test_list(sinks):
    ran = sinks("list")
    assert ran.code == 0
    lines = {line.split()[0]: line for line in ran.out.splitlines() if ":" in line.split(" ")[0]}
    assert {"memory:", "jsonl:", "parquet:", "sqlite:"} <= set(lines)
    assert "yes" in lines["sqlite:"].split()
    assert "no" in lines["memory:"].split()


@pytest.mark.parametrize("source", ["sqlite:{}/a.db", "parquet:{}/a", "jsonl:{}/a.jsonl"])
@pytest.mark.parametrize("target", ["sqlite:{}/b.db", "parquet:{}/b", "jsonl:{}/b.jsonl"])
def test_convert_keeps_token_ids_only_where_the_target_asks(sinks, source, target, tmp_path):
    source, target = source.format(tmp_path), target.format(tmp_path)
    whole = [with_ids(i, token_positions=np.array([[i, 0], [i, 0]], np.int32)) for i in range(3)]
    write(f"{source}?tokens=1", [*whole, record(7, token_positions=np.zeros((2, 2), np.int32))])
    ran = sinks("convert", source, target)
    assert ran.code == 0
    said = " ".join(ran.out.split())
    assert f"the token ids of 3 rows were left out: keep them with {target}?tokens=1" in said
    with open_store(target) as store:
        assert [one.token_ids for one in store.records()] == [None] * 4
    asking = f"{target.replace('/b', '/c')}?tokens=1"
    ran = sinks("convert", source, asking)
    assert (ran.code, "left out" in ran.out) == (0, False)
    with open_store(asking) as store:
        for found, given in zip(store.records(), whole, strict=False):
            np.testing.assert_array_equal(found.token_ids, given.token_ids)
            assert found.query_token == given.query_token
        assert store.count() == 4


def test_no_command_shows_the_help(sinks):
    ran = sinks()
    assert ran.code == 2
    for word in ("list", "test", "convert", "prune"):
        assert f"  {word}" in ran.out + ran.err


@pytest.mark.parametrize("options", ["", "?fingerprints=1&hash_ids=1"])
@pytest.mark.parametrize("make", STORES)
def test_a_probe_is_written_read_and_deleted(sinks, make, options, tmp_path):
    url = make.format(tmp_path) + options
    for _ in range(2):
        ran = sinks("test", url)
        assert (ran.code, ran.err) == (0, "")
        assert "a record was written in" in ran.out
        assert "read back and deleted: this sink works" in ran.out
    write(url, [record(1)])
    assert sinks("test", url).code == 0
    with open_store(url) as store:
        assert store.count() == 1


def test_a_probe_of_a_sink_that_cannot_be_read(sinks):
    ran = sinks("test", "memory:")
    assert ran.code == 0
    assert "cannot be read back: look for the request id attnhook-probe-" in ran.out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch:x", "error: unknown sink 'nosuch:x'"),
        ("sqlite:/no/such/folder/x.db", "error: sqlite:/no/such/folder/x.db cannot be used: .*mkdir -p"),
        ("jsonl:/dev/full", "error: sink jsonl:/dev/full opens, but cannot be written to: OSError.*No space left"),
        ("sqlite:x.db?keep_days=x", "error: sink sqlite:x.db.*keep_days='x' must be a number of days"),
    ],
)
def test_a_sink_that_does_not_work(sinks, url, message, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    ran = sinks("test", url)
    assert ran.code == 2
    assert re.search(message, ran.err)
    assert ran.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", STORES[:2])
@pytest.mark.parametrize("source", STORES[:2])
def test_conversion_keeps_records_and_times(sinks, source, target, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    source, target = source.format(tmp_path / "a"), target.format(tmp_path / "b")
    records = [record(0), lean(1, model="m"), record(2, request_id="s", decode_step=None)]
    write(source, records, time=DAY_US)
    ran = sinks("convert", source, target)
    assert ran.code == 0, ran.err
    assert f"3 rows of {source} are in {target}" in ran.out
    with open_store(source) as one, open_store(target) as other:
        for before, after in zip(
            sorted(one.records(), key=lambda r: r.query_position),
            sorted(other.records(), key=lambda r: r.query_position),
            strict=True,
        ):
            assert_same(before, after)
        times = [t.timestamp() for b in other.fingerprints() for t in b["time"].to_pylist()]
        assert times == [86400.0] * 3


def test_conversion_to_and_from_jsonl(sinks, tmp_path):
    source, lines, target = (make.format(tmp_path) for make in STORES[:1] + STORES[2:] + STORES[1:2])
    write(source, [record(p) for p in range(50)])
    assert sinks("convert", source, lines).code == 0
    assert sinks("convert", lines, target).code == 0
    with open_store(target) as store:
        assert [r.query_position for r in store.records()] == list(range(50))
    with open(lines.partition(":")[2], encoding="ascii") as file:
        assert len(file.readlines()) == 50


def test_fingerprint_lines_convert_to_fingerprints(sinks, tmp_path):
    lines, target = STORES[2].format(tmp_path), STORES[0].format(tmp_path)
    write(lines, [lean(p) for p in range(20)])
    assert sinks("convert", lines, target).code == 0
    with open_store(target) as store:
        (batch,) = store.fingerprints()
    assert batch["query_position"].to_pylist() == list(range(20))
    assert batch["fingerprint"].to_pylist()[7] == pytest.approx(lean(7).fingerprint.tolist(), abs=1e-7)


def test_conversion_applies_the_targets_rules(sinks, tmp_path):
    source, target = STORES[0].format(tmp_path), STORES[1].format(tmp_path) + "?fingerprints=1&hash_ids=1"
    write(source, [record(0)])
    assert sinks("convert", source, target).code == 0
    with open_store(target) as store:
        (kept,) = store.records()
    assert kept.mode == "fingerprint"
    assert kept.request_id != "r"


def test_conversion_into_a_store_that_exists_is_asked_for(sinks, tmp_path):
    source, target = STORES[1].format(tmp_path), STORES[0].format(tmp_path)
    write(source, [record(0), record(1)])
    write(target, [record(1), record(2)])
    ran = sinks("convert", source, target)
    assert ran.code == 2
    assert "exists already: name a new one, or add to it with --append" in ran.err
    ran = sinks("convert", source, target, "--append")
    assert "2 rows" in ran.out
    assert "1 of them were there already" in ran.out
    with open_store(target) as store:
        assert store.count() == 3


def test_conversion_onto_itself_is_refused(sinks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = STORES[0].format(tmp_path)
    write(url, [record(0)])
    ran = sinks("convert", url, "sqlite:records.db?busy=2s", "--append")
    assert ran.code == 2
    assert "are the same store" in ran.err


@pytest.mark.parametrize(("source", "target"), [("memory:", "sqlite:x.db"), ("sqlite:none.db", "parquet:x")])
def test_conversion_of_nothing(sinks, source, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sinks("convert", source, target).code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", STORES[:2])
def test_pruning(sinks, make, tmp_path):
    url = make.format(tmp_path)
    now = time.time_ns() // 1000
    write(url, [record(0), record(1)], time=now - 10 * DAY_US)
    write(url, [record(2)], time=now - 2 * DAY_US)
    ran = sinks("prune", url, "--keep-days", "5")
    assert ran.code == 0, ran.err
    assert "2 records" in ran.out
    with open_store(url) as store:
        assert [r.query_position for r in store.records()] == [2]
    for days in ("0", "-1", "nan"):
        ran = sinks("prune", url, "--keep-days", days)
        assert ran.code == 2
        assert "must be a number of days from" in ran.err
    with open_store(url) as store:
        assert store.count() == 1


def test_pruning_makes_no_store(sinks, tmp_path):
    assert sinks("prune", f"sqlite:{tmp_path}/none.db", "--keep-days", "5").code == 2
    assert os.listdir(tmp_path) == []


def test_the_real_command_shows_a_progress_bar_on_a_terminal(tmp_path):
    source, target = STORES[0].format(tmp_path), STORES[1].format(tmp_path)
    write(source, [lean(p) for p in range(100)])
    command = [str(Path(sys.executable).with_name("attnhook")), "sinks", "convert", source, target]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(FORCE_COLOR="1", TTY_COMPATIBLE="1")
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"100 rows of {source} are in {target}\n"
    assert "100/100" in run.stderr
