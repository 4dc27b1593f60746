"""What a stage finds: checks with their bars, notes and tables, written to a file after each, so that a stage that is
stopped has told what it knew."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["ok", "failed", "missed", "seen"]


@dataclass
class Check:
    """One line of the report."""

    what: str
    value: str
    bar: str = ""
    state: State = "seen"  # "failed": wrong; "missed": right, but not within its bar; "seen": has no bar
    seconds: float = 0.0  # since the stage began


@dataclass
class Findings:
    """The findings of one stage; every addition is on disk and on the terminal when the call returns."""

    path: Path | None = None
    checks: list[Check] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)  # title -> Markdown
    facts: dict[str, str] = field(default_factory=dict)  # versions and the like
    _start: float = field(default_factory=time.monotonic)

    def must(self, what: str, holds: bool, value: object, bar: str = "") -> None:
        """Something that is wrong where it does not hold."""
        self._add(Check(what, str(value), bar, "ok" if holds else "failed"))

    def bar(self, what: str, met: bool, value: object, bar: str) -> None:
        """A goal of speed or memory."""
        self._add(Check(what, str(value), bar, "ok" if met else "missed"))

    def see(self, what: str, value: object) -> None:
        """Something that is worth telling."""
        self._add(Check(what, str(value)))

    def table(self, title: str, markdown: str) -> None:
        """A table for the report."""
        self.tables[title] = markdown.strip()
        self._write()

    def fact(self, name: str, value: object) -> None:
        """What the figures belong to."""
        self.facts[name] = str(value)
        self._write()

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return any(check.state == "failed" for check in self.checks)

    def _add(self, check: Check) -> None:
        check.seconds = round(time.monotonic() - self._start, 1)
        self.checks.append(check)
        bar = f" (bar: {check.bar})" if check.bar else ""
        print(f"[{check.state}] {check.what}: {check.value}{bar}", flush=True)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            told = {"checks": [asdict(x) for x in self.checks], "tables": self.tables, "facts": self.facts}
            whole = self.path.with_suffix(".part")
            whole.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            whole.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Findings:
        """What a stage has left; empty where it left nothing."""
        if not path.exists():
            return cls()
        told = json.loads(path.read_text(encoding="utf-8"))
        return cls(None, [Check(**check) for check in told["checks"]], told["tables"], told["facts"])
