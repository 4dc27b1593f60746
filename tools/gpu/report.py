"""report.md and report.json: what the stages found, under the machine's versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.gpu.findings import Findings
from tools.gpu.stages import Stage

_LOG_LINES = 60


@dataclass
class Outcome:
    """How one stage ended."""

    stage: Stage
    how: str  # "done", "failed", "stopped at its limit", or why it was not begun
    seconds: float
    findings: Findings
    log: str = ""

    @property
    def ran(self) -> bool:
        """Whether it was begun."""
        return self.seconds > 0

    def count(self, state: str) -> int:
        """Checks of a state."""
        return sum(check.state == state for check in self.findings.checks)

    @property
    def good(self) -> bool:
        """Done, something was checked, and nothing is wrong; a bar may be missed."""
        return self.how == "done" and not self.count("failed") and self.count("ok") + self.count("missed") > 0


def verdict(outcomes: list[Outcome]) -> list[str]:
    """One line per stage and one for all."""
    lines = []
    for one in outcomes:
        counts = f"{one.count('ok')} ok, {one.count('failed')} wrong, {one.count('missed')} bars missed"
        lines.append(f"{one.stage.name}: {one.how}" + (f" after {one.seconds:.0f} s; {counts}" if one.ran else ""))
    good = [one for one in outcomes if one.good]
    missed = sum(one.count("missed") for one in outcomes)
    whole = f"{len(good)} of {len(outcomes)} stages are right" + (f"; {missed} bars are missed" if missed else "")
    return [*lines, f"VERDICT: {whole}"]


def write(out: Path, machine: dict[str, str], notes: list[str], outcomes: list[Outcome], *, rehearsal: bool) -> None:
    """Write both files; called after each stage, so that what is known is there whatever happens next."""
    told = {
        "rehearsal": rehearsal,
        "machine": machine,
        "notes": notes,
        "verdict": verdict(outcomes),
        "stages": {
            one.stage.name: {
                "how": one.how,
                "seconds": round(one.seconds, 1),
                "limit": one.stage.seconds,
                "checks": [asdict(check) for check in one.findings.checks],
                "tables": one.findings.tables,
                "facts": one.findings.facts,
            }
            for one in outcomes
        },
    }
    (out / "report.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(machine, notes, outcomes, rehearsal=rehearsal), encoding="utf-8")


def markdown(machine: dict[str, str], notes: list[str], outcomes: list[Outcome], *, rehearsal: bool) -> str:
    """The report for people."""
    title = "Rehearsal on the CPU: it shows that the script runs, nothing about a GPU" if rehearsal else "GPU check"
    lines = [f"# {title}", "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", "```text", *verdict(outcomes), "```"]
    for one in outcomes:
        lines += ["", f"## {one.stage.name}: {one.how}", "", f"{one.stage.about[0].upper()}{one.stage.about[1:]}."]
        if one.findings.facts:
            lines += ["", ", ".join(f"{name} {value}" for name, value in one.findings.facts.items())]
        if one.findings.checks:
            lines += ["", "| check | value | bar | state |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {_cell(x.what)} | {_cell(x.value)} | {_cell(x.bar)} | {x.state} |" for x in one.findings.checks
            ]
        for name, table in one.findings.tables.items():
            lines += ["", f"### {name}", "", table]
        if one.ran and not one.good and one.log:
            lines += ["", "The end of its log:", "", "```text", *one.log.splitlines()[-_LOG_LINES:], "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
