"""Progress: a bar on a terminal, a line now and then on standard error where output is piped."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from attnhook.cli import progress as cli_progress
from attnhook.cli.progress import Work, progress
from tests.helpers import environment


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(cli_progress, "FIRST", 0.05)
    monkeypatch.setattr(cli_progress, "LONGEST", 0.2)


def test_lines_come_at_growing_distances_and_say_how_far_it_is(often):
    out = io.StringIO()
    with progress("copying [x]", 100, console=Console(file=out)) as work:
        work.tell(25)
        time.sleep(1.0)
    lines = out.getvalue().splitlines()
    assert 3 <= len(lines) <= 7  # after 0.05, 0.15, 0.35, then each 0.2 s: 6, fewer on a busy machine
    assert all(re.fullmatch(r"copying \[x\]: 25/100, \d s so far, about \d s left", line) for line in lines), lines
    time.sleep(0.3)
    assert out.getvalue().splitlines() == lines, "a line came after the end"
    assert not [thread for thread in threading.enumerate() if thread.name == "attnhook-progress"]


def test_what_is_over_soon_prints_nothing():
    out = io.StringIO()
    with progress("copying", 100, console=Console(file=out)) as work:
        work.tell(100)
    assert out.getvalue() == ""


def test_work_without_an_amount(often):
    out = io.StringIO()
    with progress("loading the model", measured=False, console=Console(file=out)):
        time.sleep(0.2)
    assert re.match(r"loading the model: 0 s so far\n", out.getvalue())


@pytest.mark.parametrize(
    ("passed", "done", "line"),
    [
        (8, 0, "x: 0/64, 8 s so far"),
        (8, 16, "x: 16/64, 8 s so far, about 24 s left"),
        (8, 64, "x: 64/64, 8 s so far"),
        (600, 16, "x: 16/64, 10 min so far, about 30 min left"),
        (3600, 16, "x: 16/64, 1 h 0 min so far, about 3 h 0 min left"),
    ],
)
def test_the_line(monkeypatch, passed, done, line):
    work = Work("x", done=done, total=64)
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: work.begin + passed)
    assert work.line == line


def test_a_reader_that_has_gone_ends_nothing(often, monkeypatch):
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    read, write = os.pipe()
    os.close(read)
    closed = os.fdopen(write, "w")
    with progress("copying", 2, console=Console(file=closed)) as work:
        time.sleep(0.2)
        work.tell(2)
    assert unhandled == []
    with contextlib.suppress(BrokenPipeError):
        closed.close()


CODE = """
import time
from attnhook.cli import progress as cli_progress
cli_progress.FIRST = 0.1
with cli_progress.progress("counting", 4) as work:
    for i in range(4):
        work.tell(i + 1)
        time.sleep(0.15)
print("done")
"""


@pytest.mark.slow
def test_a_pipe_gets_lines_and_a_terminal_a_bar(tmp_path):
    piped = subprocess.run([sys.executable, "-c", CODE], env=environment(), capture_output=True, text=True, timeout=60)
    assert (piped.returncode, piped.stdout) == (0, "done\n")
    assert re.search(r"^counting: [1-4]/4, 0 s so far", piped.stderr) and "\x1b" not in piped.stderr
    shown = on_a_terminal(TERM="xterm")
    assert "counting" in shown and "4/4" in shown and "\x1b[" in shown and "so far" not in shown
    plain = on_a_terminal(TERM="xterm", NO_COLOR="1")
    assert "4/4" in plain and not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain), "NO_COLOR is set"
    dumb = on_a_terminal(TERM="dumb")
    assert "so far" in dumb and "\x1b" not in dumb


def on_a_terminal(**environ: str) -> str:
    """What the code shows on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], env=environment(**environ), stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the last writer has gone
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode()
