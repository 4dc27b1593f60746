"""tools/test.sh: what fails beside others and passes alone fails the run, unless it is listed for a while."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment
from tools import flaky

TODAY = date.today().isoformat()
UNSTABLE = "test_some.py::test_unstable[a b]"
TESTS = """
import pathlib
import pytest

def test_good():
    pass

@pytest.mark.parametrize("case", ["a b"])
def test_unstable(case):
    before = pathlib.Path("ran")  # fails the first time, and passes after
    there = before.exists()
    before.write_text("")
    assert there
"""
# tests/conftest.py does the same, and imports torch
LIGHT = """
from tests.full_run import FullRun

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FullRun())
"""
SERVER = """
import pytest

def test_the_same_json_from_every_server():
    {}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the script and tests of its own; two servers that are compared."""
    (tmp_path / "tools").mkdir()
    for name in ("test.sh", "flaky.py", "flaky-tests.txt"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(LIGHT)
    (tmp_path / "test_one.py").write_text(SERVER.format("pytest.skip('the first')"))
    (tmp_path / "test_two.py").write_text(SERVER.format("pass"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(project: Path) -> subprocess.CompletedProcess[str]:
    folder = Path(sys.executable).parent
    command = ["bash", "tools/test.sh", str(folder)]
    return subprocess.run(command, cwd=project, env=plain(), capture_output=True, text=True, timeout=120)


def plain() -> dict[str, str]:
    """The environment without what tells that tests run on several workers; of pytest's plugins xdist alone."""
    ours = {
        name: value
        for name, value in environment().items()
        if not name.startswith(("PYTEST_", "FULL_RUN", "RUN_AGAIN"))
    }
    return {**ours, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}


def listed(project: Path, *lines: str) -> None:
    (project / "tools" / "flaky-tests.txt").write_text("# tests\n" + "\n".join(lines) + "\n")


def test_a_test_that_passes_only_alone_fails_the_run(project: Path) -> None:
    ran = run(project)
    assert ran.returncode == 1, ran.stdout
    assert "once more, alone" in ran.stdout and "1 passed" in ran.stdout
    assert "FAILED: these are not in tools/flaky-tests.txt. Mend them; or list them there" in ran.stdout
    assert ran.stdout.endswith(f"  {UNSTABLE}\n")


def test_a_listed_one_does_not(project: Path) -> None:
    listed(project, f"{TODAY}  {UNSTABLE}  it is made so")
    ran = run(project)
    assert ran.returncode == 0, ran.stdout
    assert f"NOT STABLE: failed beside other tests and passed alone:\n  {UNSTABLE}\n" in ran.stdout


def test_what_fails_again_fails_the_run_listed_or_not(project: Path) -> None:
    listed(project, f"{TODAY}  test_some.py::test_good  no")
    (project / "test_some.py").write_text("def test_good():\n    assert 0\n")
    ran = run(project)
    assert ran.returncode == 1 and "NOT STABLE" not in ran.stdout


def test_a_good_run_is_good(project: Path) -> None:
    (project / "ran").write_text("")
    ran = run(project)
    assert ran.returncode == 0, ran.stdout
    assert "once more" not in ran.stdout


def test_a_test_that_is_skipped_alone_has_not_passed(project: Path) -> None:
    """A server's replies that differ from the other's: alone there is no other."""
    listed(project, f"{TODAY}  test_two.py::test_the_same_json_from_every_server  no")
    (project / "ran").write_text("")
    body = "import os\n    if os.environ.get('PYTEST_XDIST_WORKER'):\n        assert 0\n    pytest.skip('the first')"
    (project / "test_two.py").write_text(SERVER.format(body))
    ran = run(project)
    assert ran.returncode == 1, ran.stdout
    assert "LEFT OUT: skipped when run again: test_two.py::test_the_same_json_from_every_server" in ran.stdout


def test_servers_that_were_not_compared_fail_a_run_with_a_listed_test_too(project: Path) -> None:
    listed(project, f"{TODAY}  {UNSTABLE}  it is made so")
    (project / "test_one.py").unlink()
    ran = run(project)
    assert ran.returncode == 1, ran.stdout
    assert "FAILED: LEFT OUT: test_the_same_json_from_every_server: 1 of at least 2 servers" in ran.stdout


def test_many_failures_are_not_run_again(project: Path) -> None:
    (project / "test_many.py").write_text("".join(f"def test_{i}():\n    assert 0\n" for i in range(6)))
    ran = run(project)
    assert ran.returncode == 1 and "once more" not in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ("pytest.skip('first')", "pytest.skip('first')", "only the first server may be skipped, and test_one.py::"),
        (None, "pytest.skip('first')", "1 of at least 2 servers were to be compared (test_two.py::"),
        (None, None, "0 of at least 2 servers were to be compared (-)"),
    ],
)
def test_a_full_run_in_which_no_servers_are_compared_fails(
    project: Path, one: str | None, two: str | None, said: str
) -> None:
    (project / "ran").write_text("")
    for name, body in (("test_one.py", one), ("test_two.py", two)):
        (project / name).unlink()
        if body is not None:
            (project / name).write_text(SERVER.format(body))
    if one and two:
        (project / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    ran = run(project)
    assert ran.returncode == 1, ran.stdout
    assert f"LEFT OUT: test_the_same_json_from_every_server: {said}" in ran.stdout
    part = subprocess.run(
        [str(Path(sys.executable).with_name("pytest")), "test_some.py"],
        cwd=project, env=plain(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert part.returncode == 0 and "LEFT OUT" not in part.stdout, "a part of the tests compares nothing"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{date.today() - timedelta(days=61)}  {UNSTABLE}  slow", "was listed 61 days ago, more than 60"),
        (f"{date.today() + timedelta(days=3)}  {UNSTABLE}  slow", "which is to come"),
        (f"{TODAY}  test_some.py::test_gone  slow", "line 2 names no test: test_some.py::test_gone"),
        (f"{TODAY}  test_some.py  slow", "line 2 names no test: test_some.py"),
        (f"{TODAY}  test_some.py::test_unstable  slow", "line 2 names no test: test_some.py::test_unstable"),
        (f"{TODAY}  {UNSTABLE}", "is not a date, a node id and a reason"),
        (f"soon  {UNSTABLE}  slow", "is not a date, a node id and a reason"),
        (
            f"{TODAY}  {UNSTABLE}  slow\n{TODAY}  {UNSTABLE}  slow",
            "line 3: test_some.py::test_unstable[a b] is there twice",
        ),
    ],
)
def test_a_bad_entry_fails_before_any_test_runs(project: Path, line: str, said: str) -> None:
    listed(project, line)
    ran = run(project)
    assert ran.returncode == 1
    assert said in ran.stdout and "test session starts" not in ran.stdout


def test_a_long_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{TODAY}  test_some.py::test_{i}  slow\n" for i in range(11)))
    assert flaky.read(path, date.today())[1] == ["there are 11 entries, more than 10: mend some of the tests"]


def test_the_list_of_this_repository_can_be_read() -> None:
    path = ROOT / "tools" / "flaky-tests.txt"
    assert path.exists()
    assert [problem for problem in flaky.read(path, date.today())[1] if "names no" not in problem] == []
