"""The README shows what the commands print today."""

from __future__ import annotations

import re
import shlex

import pytest
from rich.cells import cell_len

from tests.cli.test_run import command, commands
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
_SCORE = re.compile(r"\b0\.\d{3}\b")


def shown() -> tuple[list[str], list[str]]:
    """The words of the README's `attnhook run` and the lines that it shows below."""
    block = next(one for one in re.findall(r"```console\n(.*?)```", README, re.DOTALL) if "where each token" in one)
    *_, typed, printed = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    return shlex.split(typed, comments=True), printed.splitlines()


@pytest.mark.model
@pytest.mark.slow
def test_the_excerpt_is_what_the_command_prints(tmp_path):
    words, lines = shown()
    assert words[:2] == ["attnhook", "run"]
    ran = command(*[str(tmp_path / word) if word.endswith(".html") else word for word in words[1:]], COLUMNS="80")
    assert ran.code == 0, ran.err
    printed = [line.rstrip() for line in ran.out.splitlines()]
    without = [_SCORE.sub("0.000", line) for line in printed]
    at = 0
    for line in lines:
        if line.strip() in ("", "..."):
            continue
        # in order, to the character, but for the last digit of a score: processors round differently
        found = without.index(_SCORE.sub("0.000", line), at)
        for one, other in zip(_SCORE.findall(line), _SCORE.findall(printed[found]), strict=True):
            assert abs(float(one) - float(other)) < 0.0015, (line, printed[found])
        at = found + 1
    assert at > 5 and all(cell_len(line) <= 80 for line in lines)


def test_the_table_has_every_command_in_the_order_of_the_help():
    table = README.partition("## On the command line")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`attnhook .*?) \|", table, re.MULTILINE)
    named = [re.match(r"`attnhook ([a-z-]+(?: (?:fit|list))?)", row).group(1) for row in rows]
    order = list(dict.fromkeys(name.split()[0] for name in named))
    assert order == list(dict.fromkeys(name.split()[0] for name in commands()))
    for name in commands():
        first, _, second = name.partition(" ")
        assert any(row.startswith(f"`attnhook {first}") and second in row for row in rows), name
