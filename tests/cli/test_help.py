"""The help of every command, and wrong calls of each: one line that tells the remedy."""

from __future__ import annotations

import re
import shlex

import pytest

from attnhook.cli.help import COMMANDS
from tests.cli.test_run import Cli, Ran, attnhook_cli, commands, tiny  # noqa: F401 - fixtures

ORDER = ["run", "verify", "probe", "session", "calibrate", "discover", "compare", "drift", "sinks", "collect",
         "monitor", "model-path"]  # fmt: skip
#: Commands that need an argument, and the one that is missing first.
MISSING = {
    "session": "STORE",
    "calibrate": "STORE",
    "discover": "STORE",
    "compare": "STORE_A",
    "drift fit": "STORE",
    "drift check": "STORE",
    "sinks test": "SINK",
    "sinks convert": "STORE",
    "sinks prune": "SINK",
    "collect": "--store",
}


def one_line(ran: Ran) -> str:
    assert (ran.code, ran.out) == (2, ""), ran.out
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_every_command_has_a_summary_and_an_example():
    assert {*commands(), "drift", "sinks"} == set(COMMANDS)
    for name, command in commands().items():
        assert COMMANDS[name][1].startswith(f"attnhook {name}")
        assert len(COMMANDS[name][0]) <= 60, "it would be cut off in 80 columns"
        words = shlex.split(COMMANDS[name][1])[1 + len(name.split()) :]
        command.make_context(name, words)  # raises where an argument or an option is wrong


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_of_every_command(attnhook_cli, name, flag):  # noqa: F811
    ran = attnhook_cli(*name.split(), flag)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(['attnhook', *name.split()])}")
    assert re.search(r"  -h, --help +Show this message", ran.out)
    assert "..." not in ran.out.partition("Commands:")[2], "a summary is cut off"
    assert not re.search(r"[<{\[](str|int|float|path|list|bool)\b", ran.out)
    if name:
        assert f"\n    {COMMANDS[name][1]}\n" in ran.out
    else:
        assert re.findall(r"^  ([a-z-]+)  +[A-Z]", ran.out.partition("Commands:")[2], re.MULTILINE) == ORDER
        assert all(COMMANDS[one][1] in ran.out for one in ORDER)


@pytest.mark.parametrize("columns", ["20", "40", "500"])
def test_help_in_any_terminal(attnhook_cli, monkeypatch, columns):  # noqa: F811
    monkeypatch.setenv("COLUMNS", columns)
    ran = attnhook_cli("-h")
    assert ran.code == 0
    assert all(one in ran.out for one in ORDER)
    assert f"\n    {COMMANDS['run'][1]}\n" in ran.out, "an example is for copying: it is not wrapped"


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_argument_is_told_with_an_example(attnhook_cli, name):  # noqa: F811
    line = one_line(attnhook_cli(*name.split()))
    assert f"'{MISSING[name]}'" in line
    assert f"for example: {COMMANDS[name][1]} (attnhook {name} -h tells more)" in line


@pytest.mark.parametrize("name", commands())
def test_an_unknown_option_is_told(attnhook_cli, name):  # noqa: F811
    line = one_line(attnhook_cli(*name.split(), "--nosuch"))
    assert "No such option: --nosuch" in line and f"attnhook {name} -h tells more" in line


@pytest.mark.parametrize("name", ["", "drift", "sinks"])
def test_a_group_without_a_command_shows_its_help(attnhook_cli, name):  # noqa: F811
    ran = attnhook_cli(*name.split())
    assert ran.code == 2 and "Commands:" in ran.out + ran.err
    assert f"{' '.join(['attnhook', *name.split()])} -h tells more" in one_line(attnhook_cli(*name.split(), "nosuch"))


def test_an_unquoted_prompt_is_told(attnhook_cli):  # noqa: F811
    line = one_line(attnhook_cli("run", "What", "is", "this?"))
    assert "put the prompt in quotes" in line


@pytest.mark.parametrize("words", [["--top-k", "abc"], ["--top-k=abc"]])
def test_a_value_of_another_type_is_shown(attnhook_cli, words):  # noqa: F811
    line = one_line(attnhook_cli("run", "hi", *words))
    assert "'--top-k'" in line and "integer: 'abc'; for example: attnhook run" in line


def test_a_near_miss_is_named(attnhook_cli):  # noqa: F811
    assert "Did you mean 'verify'?" in one_line(attnhook_cli("verfiy"))
