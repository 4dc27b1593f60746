"""What a whole run of the tests (`tools/test.sh`) may not leave out without a word.

The first server's test of `same_json` has nobody to compare with and is skipped. So a run in which only one server
runs, or none, would compare nothing and pass. And a test that failed and is run again alone says nothing if it is
skipped then.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: Set by tools/test.sh: a file for what a whole run left out; whether tests that failed are run again.
WHOLE, AGAIN = "FULL_RUN", "RUN_AGAIN"
SAME_JSON = "test_the_same_json_from_every_server"


class FullRun:
    """A pytest plugin of the process that runs, or hands out, the tests."""

    def __init__(self) -> None:
        # taken out: runs of pytest that a test starts are not the whole run
        self.whole, self.again = os.environ.pop(WHOLE, ""), os.environ.pop(AGAIN, "")
        self.compared: dict[str, str] = {}  # outcome of each server's test of `same_json`, by node id
        self.skipped: list[str] = []  # node ids

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.nodeid.endswith(f"::{SAME_JSON}"):
                self.compared[report.nodeid] = report.outcome
            if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
                self.skipped.append(report.nodeid)

    @property
    def problem(self) -> str | None:
        """What this run left out, or None."""
        if self.again:
            return f"skipped when run again: {', '.join(self.skipped)}" if self.skipped else None
        if not self.whole:
            return None
        skipped = sorted(name for name, outcome in self.compared.items() if outcome == "skipped")
        if len(self.compared) < 2:
            few = ", ".join(self.compared) or "-"
            return f"{SAME_JSON}: {len(self.compared)} of at least 2 servers were to be compared ({few})"
        if len(skipped) > 1:
            return f"{SAME_JSON}: only the first server may be skipped, and {', '.join(skipped)} were"
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.problem is None:
            return
        if self.whole:
            Path(self.whole).write_text(self.problem + "\n", encoding="utf-8")
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problem is not None:
            terminalreporter.write_line(f"LEFT OUT: {self.problem}", red=True)
