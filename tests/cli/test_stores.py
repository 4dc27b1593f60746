"""Every command takes a store the same way: as a path, or as a URL."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attnhook.cli import stores as cli_stores
from attnhook.errors import OptionError
from attnhook.store import open_store
from tests.cli.test_run import COMMAND, Cli, attnhook_cli, commands, tiny  # noqa: F401 - fixtures
from tests.cli.test_sinks import write
from tests.helpers import environment
from tests.sinks.samples import record

KINDS = {"jsonl": "x.jsonl", "sqlite": "x.db", "parquet": "x"}
PROBE = ("--packs", "grammar", "--limit", "1", "--new-tokens", "1")

#: Every command that reads a store: its arguments, and what a store of three records leads to.
READERS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "session": (("{}", "r"), 0, r"rows +3"),
    "calibrate": (("{}", "--out", "out"), 2, r"is no output of attnhook probe, since x(\.\w+)?\.probes is not"),
    "discover": (("{}", "--out", "out"), 2, r"has 3 fingerprints; a map needs"),
    "compare A": (("{}", "other.db"), 2, r"side A .* has 1 requests"),
    "compare B": (("other.db", "{}"), 2, r"side [AB] .* has 1 requests"),
    "drift fit": (("{}", "--out", "out"), 2, r"1 requests are too few for a baseline"),
    "drift check": (("{}", "--baseline", "nosuch"), 2, r"nosuch"),
    "sinks convert": (("{}", "copy.jsonl"), 0, r"3 rows of .* are in jsonl:copy.jsonl"),
    "sinks prune": (("{}", "--keep-days", "1"), 0, r"0 records of .* were older"),
}
#: Every command that writes one.
WRITERS: dict[str, tuple[tuple[str, ...], str]] = {
    "run": (("hi", "--max-new-tokens", "1", "--model", "{model}", "--out", "{}"), r"wrote "),
    "probe": (("--model", "{model}", "--out", "{}", *PROBE), r"wrote "),
    "sinks convert": (("other.db", "{}"), r"1 rows of sqlite:other.db are in "),
    "sinks test": (("{}",), r"it was read back and deleted"),
}


def forms(kind: str, path: str = "") -> list[str]:
    """How a person may name a store of a kind."""
    path = path or KINDS[kind]
    return [f"{path}/" if kind == "parquet" else path, f"{kind}:{path}"]


def test_the_tables_hold_every_command_that_takes_a_store():
    takes = {
        name: [p.name for p in command.params if str(p.metavar).startswith(("STORE", "SINK"))]
        for name, command in commands().items()
    }
    tested = {*READERS, *WRITERS, "compare", "collect"}
    assert {name for name, found in takes.items() if found} == {
        name for name in tested if name[-2:] not in (" A", " B")
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("sqlite:other.db", [record(0, request_id="s")])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_a_path_and_a_url_alike(attnhook_cli, here, name, kind):  # noqa: F811
    write(f"{kind}:{KINDS[kind]}", [record(i) for i in range(3)])
    arguments, code, said = READERS[name]
    words = [word for word in name.split() if word not in ("A", "B")]
    ran = []
    for form in forms(kind):
        ran.append(attnhook_cli(*words, *(argument.format(form) for argument in arguments)))
        (here / "copy.jsonl").unlink(missing_ok=True)
    for one in ran:
        assert one.code == code, one.err
        assert re.search(said, one.out + one.err), one.out + one.err
        assert "is no store" not in one.err
    assert not (here / "out.partial").exists()
    assert ran[0].err.replace(f"{KINDS[kind]}/", KINDS[kind]) == ran[1].err
    missing = attnhook_cli(*words, *(argument.format("nosuch.db") for argument in arguments))
    assert missing.code == 2 and re.search(r"error: 'nosuch.db' is no store|'nosuch'|nosuch ", missing.err), missing.err
    assert not (here / "nosuch.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_takes_a_path_and_a_url_alike(attnhook_cli, here, tiny, name):  # noqa: F811
    arguments, said = WRITERS[name]
    for kind in KINDS:
        for number, form in enumerate(forms(kind, f"{number}-{KINDS[kind]}") for number in range(2)):
            text = form[number]
            ran = attnhook_cli(*name.split(), *(argument.format(text, model=tiny) for argument in arguments))
            assert ran.code == 0, ran.err
            assert re.search(said, ran.out), ran.out
            with open_store(f"{kind}:{number}-{KINDS[kind]}") as store:
                assert store.count() == (0 if name == "sinks test" else 1)
    unclear = attnhook_cli(*name.split(), *(argument.format("results", model=tiny) for argument in arguments))
    assert unclear.code == 2 and "does not tell what kind of store it is: name x.jsonl, x.db" in unclear.err


def test_run_adds_to_a_store_and_writes_a_plain_file_of_lines_anew(attnhook_cli, here, tiny):  # noqa: F811
    for out, count in (
        ("a.db", 2),
        ("sqlite:a.db", 3),
        ("a.jsonl", 1),
        ("jsonl:a.jsonl", 1),
        ("jsonl:a.jsonl?tokens=1", 2),
    ):
        if out == "a.db":
            write("sqlite:a.db", [record(0)])
        ran = attnhook_cli("run", "hi", "--max-new-tokens", "1", "--model", tiny, "--out", out)
        assert ran.code == 0, ran.err
        with open_store(cli_stores.readable(out)) as store:
            assert store.count() == count, out


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("folder", "it is a folder that holds other things"),
        (".", "it is a folder that holds other things"),
        ("text.db", "text.db cannot be used"),
        ("x.jsonl.zst", "no store is written compressed"),
        ("memory:", "keeps nothing when the command ends"),
        ("nosuch:x", "unknown sink 'nosuch:x'"),
        ("jsonl:-", "would mix records with the answer"),
        ("no/x.db", "the folder no does not exist"),
        ("sqlite:no/x.db", "the folder no does not exist"),
        ("", "the name of the store is empty"),
        ("/dev/null", "it is a device or a pipe"),
        ("y.db?nosuch=1", "unknown option 'nosuch'; known: busy, keep_days"),
        ("other.db?keep_days=x", "keep_days='x' must be a number of days"),
        ("y.jsonl?zstd=1", "sink jsonl:y.jsonl: zstd=1 and keep_days are for files that are rotated"),
        ("y/?nosuch=1", "unknown option 'nosuch'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(attnhook_cli, here, out, said):  # noqa: F811
    (here / "folder").mkdir()
    (here / "folder" / "notes.txt").write_text("mine")
    (here / "text.db").write_text("some text that is no database")
    before = sorted(here.rglob("*"))
    ran = attnhook_cli("run", "hi", "--model", "nosuch/model", "--out", out)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err
    assert sorted(here.rglob("*")) == before
    if "?" in out and out != "other.db?keep_days=x":  # a run of probes has an output of its own
        ran = attnhook_cli("probe", "--model", "nosuch/model", "--out", out)
        assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err
        assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "url"),
    [
        ("a.db", b"", "sqlite:"),
        ("a.sqlite3", b"", "sqlite:"),
        ("records", b'{"schema_version": 1}\n', "jsonl:"),
        ("a.json", b'\n {"schema_version": 1}\n', "jsonl:"),
        ("wrong.db", b'{"schema_version": 1}\n', "jsonl:"),
        ("records", b"SQLite format 3\0" + bytes(84), "sqlite:"),
        ("wrong.jsonl", b"SQLite format 3\0" + bytes(84), "sqlite:"),
        ("12:30.db", b"", "sqlite:"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "jsonl:"),
        ("a.txt", b"some text", None),
        ("a", b"", None),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", None),
    ],
)
def test_the_first_bytes_of_a_file_tell_what_it_is(here, name, content, url):
    (here / name).write_bytes(content)
    if url is None:
        with pytest.raises(
            OptionError, match=rf"{re.escape(name)} is no store: it is neither SQLite nor lines of JSON"
        ):
            cli_stores.readable(name)
    else:
        assert cli_stores.readable(name) == f"{url}{name}"


def test_what_is_there_only_in_rotated_files_is_found(here):
    write("jsonl:x.jsonl?rotate=4096", [record(i) for i in range(20)])
    live = here / "x.jsonl"
    live.unlink(missing_ok=True)
    assert len(list(here.glob("x*.jsonl"))) >= 1
    with open_store(cli_stores.readable("x.jsonl")) as store:
        assert store.count() > 0


def test_buckets_need_no_scheme_in_front():
    assert cli_stores.readable("s3://bucket/records") == "parquet:s3://bucket/records"
    assert cli_stores.writable("s3://bucket/records") == "parquet:s3://bucket/records"
    assert cli_stores.local_path("parquet:s3://bucket/records") is None


def test_collect_takes_a_path(tmp_path):
    arguments = (
        "collect",
        "--store",
        "x.db",
        "--store",
        "y.jsonl",
        "--listen",
        "tcp://127.0.0.1:*",
        "--http",
        "127.0.0.1:0",
    )
    process = subprocess.Popen(
        [str(COMMAND), *arguments], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert "into sqlite:x.db, jsonl:y.jsonl" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "x.db").is_file()


def test_a_store_in_a_path_with_options_is_found(here):
    write("sqlite:x.db", [record(0, token_positions=np.array([[0, -1], [0, -1]], np.int32))])
    assert cli_stores.readable("x.db?keep_days=3") == "sqlite:x.db?keep_days=3"
    assert cli_stores.writable("y.db?keep_days=3") == "sqlite:y.db?keep_days=3"


#: What a newcomer may name in place of a store: its content, and what is said of it by every reader.
WRONG: dict[str, tuple[bytes | None, str]] = {
    "text.txt": (b"hello\n", "text.txt is no store: it is neither SQLite nor lines of JSON"),
    "empty.db": (b"", "sqlite:empty.db is not there, or empty"),
    "binary.db": (b"\xff\xfe\0", "so it is no SQLite file"),
    "other.jsonl": (b'{"a": 1}\n', "schema version"),
    "newer.jsonl": (b'{"schema_version": 99}\n', "upgrade attnhook"),
    "folder": (None, "parquet:folder holds no records"),
    "nosuch": (None, "'nosuch' is no store: there is no such file or folder"),
    "": (None, "the name of the store is empty"),
    "nosuch:x": (None, "'nosuch:x' is no store"),
    "memory:": (None, "'memory:' is no store that can be read"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [name for name in READERS if name != "drift check"])
def test_what_is_no_store_is_told_in_one_line(attnhook_cli, here, name, wrong):  # noqa: F811
    content, said = WRONG[wrong]
    if content is not None:
        (here / wrong).write_bytes(content)
    (here / "folder").mkdir()
    before = sorted(here.rglob("*"))
    words = [word for word in name.split() if word not in ("A", "B")]
    ran = attnhook_cli(*words, *(argument.format(wrong) for argument in READERS[name][0]))
    if name in ("calibrate", "sinks prune") and wrong in ("other.jsonl", "newer.jsonl"):
        return  # neither reads a line of such a file: one looks for the run's record, the other for rotated files
    if name == "compare B" and ran.err.startswith("error: side A"):
        return  # the other side is refused first
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert [path for path in sorted(here.rglob("*")) if path not in before] == []


def test_a_request_that_is_not_there_is_told_with_some_that_are(attnhook_cli, here):  # noqa: F811
    write("sqlite:x.db", [record(0, request_id=f"r{i}") for i in range(9)])
    ran = attnhook_cli("session", "x.db", "r")
    assert "sqlite:x.db has no records of request 'r', but of 'r0', 'r1', 'r2', 'r3' and others" in ran.err
    ran = attnhook_cli("session", "other.db", "r")
    assert "has no records of request 'r', but of 's': name one exactly" in ran.err
    (here / "empty.jsonl").write_text("")
    assert "jsonl:empty.jsonl is empty" in attnhook_cli("session", "empty.jsonl", "r").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "memory:"], "memory: keeps nothing when the command ends"),
        (["--store", "results"], "does not tell what kind of store"),
        (["--store", "x.db", "--drain-seconds", "-1"], "--drain-seconds -1 must be from 0 to 86400"),
        (["--store", "x.db", "--stop-seconds", "nan"], "--stop-seconds nan must be from 0 to 86400"),
    ],
)
def test_collect_refuses_in_one_line(attnhook_cli, here, arguments, said):  # noqa: F811
    ran = attnhook_cli("collect", *arguments)
    assert (ran.code, ran.out) == (2, "") and said in ran.err and ran.err.count("\n") == 1
    assert [path.name for path in here.iterdir() if path.name != "other.db"] == []


@pytest.mark.parametrize("out", ["other.db", "other.db/deep/folder"])
def test_calibrate_looks_at_its_folder_first(attnhook_cli, here, out):  # noqa: F811
    ran = attnhook_cli("calibrate", "other.db", "--out", out)
    assert ran.code == 2 and f"--out {out} cannot be made, since" in ran.err
