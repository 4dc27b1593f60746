"""The list of tests that may fail beside others and pass alone: short, dated, and checked.

``python tools/flaky.py check LIST PYTEST`` ends with status 1 where an entry is not as it must be; ``python
tools/flaky.py unlisted LIST`` reads node ids from standard input and prints those that the list lacks, with status 1.
A line of the list is a date (when the test was listed), its node id and why, with two spaces or a tab between them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

OLDEST = 60  # days until an entry must be mended or, with a reason, listed anew
MOST = 10  # entries


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    number: int
    listed: date
    test: str
    why: str


def read(path: Path, today: date) -> tuple[list[Entry], list[str]]:
    """The entries, and what is wrong with the list; a file that is not there is an empty list."""
    entries: list[Entry] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = re.split(r"\t+| {2,}", line.strip(), maxsplit=2)
        try:
            entry = Entry(number, date.fromisoformat(parts[0]), parts[1], parts[2])
        except (ValueError, IndexError):
            problems.append(f"line {number} is not a date, a node id and a reason, two spaces apart: {line!r}")
            continue
        age = (today - entry.listed).days
        if age > OLDEST:
            problems.append(f"line {number}: {entry.test} was listed {age} days ago, more than {OLDEST}: mend the test")
        elif age < 0:
            problems.append(f"line {number}: {entry.test} is listed on {entry.listed}, which is to come")
        if entry.test in [other.test for other in entries]:
            problems.append(f"line {number}: {entry.test} is there twice")
        entries.append(entry)
    if len(entries) > MOST:
        problems.append(f"there are {len(entries)} entries, more than {MOST}: mend some of the tests")
    return entries, problems


def nameless(entries: list[Entry], pytest: str) -> list[str]:
    """What is wrong with entries that name no test, as pytest's own collection tells."""
    problems = []
    for entry in entries:
        found = subprocess.run(
            [pytest, "--collect-only", "-q", "-p", "no:cacheprovider", entry.test], capture_output=True, text=True
        )
        names = found.stdout.splitlines()
        # a file, a class or a test without its parameters would excuse many
        if found.returncode or entry.test not in names:
            problems.append(f"line {entry.number} names no test: {entry.test}")
    return problems


def main(arguments: list[str]) -> int:
    """Do what the command line asks for."""
    command, path = arguments[0], Path(arguments[1])
    entries, problems = read(path, date.today())
    if command == "check":
        problems += nameless(entries, arguments[2])
        for problem in problems:
            print(f"{path.name}: {problem}")
        return 1 if problems else 0
    listed = {entry.test for entry in entries}
    unlisted = [test for test in sys.stdin.read().splitlines() if test not in listed]
    for test in unlisted:
        print(f"  {test}")
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
