"""The journal gives back what was put in, whatever its last process did."""

from __future__ import annotations

import pytest

from attnhook.collector import journal as journal_module
from attnhook.collector.journal import Journal
from attnhook.errors import PluginError
from tests.sinks.samples import small_disk


def entries(folder, stores=("s",)):
    return [(e.number, e.kind, e.meta[1:], e.body) for e in Journal(folder, list(stores)).read() if e.kind != "state"]


def opened(folder, stores=("s",)):
    journal = Journal(folder, list(stores))
    for _ in journal.read():
        pass
    journal.begin({"counts": 1})
    return journal


def test_what_was_appended_is_read_back_with_its_number(tmp_path):
    journal = opened(tmp_path / "j")
    first = journal.append("frame", [], body=b"one")
    second = journal.append("passed", 7)
    journal.close()
    assert entries(tmp_path / "j") == [(first, "frame", [[]], b"one"), (second, "passed", [7], b"")]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_last_entry_that_was_cut_is_left_out_and_the_next_run_goes_on(tmp_path, cut):
    journal = opened(tmp_path / "j")
    kept = journal.append("frame", [], body=b"kept")
    journal.append("frame", [], body=b"torn")
    journal.close()
    (path,) = (tmp_path / "j").iterdir()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - cut)
    assert entries(tmp_path / "j") == [(kept, "frame", [[]], b"kept")]
    again = opened(tmp_path / "j")
    number = again.append("frame", [], body=b"new")
    again.close()
    assert [body for *_, body in entries(tmp_path / "j")] == [b"kept", b"new"]
    assert number > kept


@pytest.mark.parametrize("damage", [b"\0" * 64, b"\xff" * 64])
def test_damage_at_the_end_is_not_read_as_entries(tmp_path, damage):
    journal = opened(tmp_path / "j")
    journal.append("frame", [], body=b"kept")
    journal.close()
    (path,) = (tmp_path / "j").iterdir()
    with open(path, "ab") as file:
        file.write(damage)
    assert [body for *_, body in entries(tmp_path / "j")] == [b"kept"]


def test_segments_go_when_every_store_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1000)
    journal = opened(tmp_path / "j", ("a", "b"))
    numbers = []
    for _ in range(10):
        if journal.full:
            journal.begin({"counts": 1})
        numbers.append(journal.append("frame", [], body=bytes(600)))
    files = lambda: len(list((tmp_path / "j").iterdir()))  # noqa: E731
    assert files() == 5
    journal.acknowledge("a", numbers[-1])
    assert files() == 5, "b has nothing yet"
    journal.acknowledge("b", numbers[5])
    assert files() == 2
    journal.close()
    again = Journal(tmp_path / "j", ["a", "b"])
    list(again.read())
    assert (again.acknowledged("a"), again.acknowledged("b")) == (numbers[-1], numbers[5])
    assert [e.number for e in again.frames() if e.number > again.acknowledged("b")] == numbers[6:]


def test_a_full_disk_leaves_no_part_of_an_entry(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "ballast").write_bytes(bytes(8192))
        journal = opened(disk / "j")
        kept = []
        while (number := journal.append("frame", [], body=bytes(5000))) is not None:
            kept.append(number)
        assert journal.failed == 1 and "space" in journal.error and journal.full
        with pytest.raises(OSError, match="space"):
            journal.begin({"counts": bytes(20_000)})
        assert [e.number for e in Journal(disk / "j", ["s"]).read() if e.kind == "frame"] == kept
        journal.acknowledge("s", kept[-1])
        (disk / "ballast").unlink()
        # what is acknowledged goes as soon as there is room for the counts
        journal.begin({"counts": 2})
        assert journal.error == ""
        number = journal.append("frame", [], body=bytes(5000))
        journal.close()
        assert [e.number for e in Journal(disk / "j", ["s"]).read() if e.kind == "frame"] == [number]


def test_a_newer_journal_and_a_folder_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_VERSION", 2)
    opened(tmp_path / "j").close()
    monkeypatch.undo()
    with pytest.raises(PluginError, match="journal version 2; this attnhook reads 1: upgrade"):
        list(Journal(tmp_path / "j", ["s"]).read())
    with pytest.raises(PluginError, match="--journal"):
        list(Journal(tmp_path / "no" / "j", ["s"]).read())
