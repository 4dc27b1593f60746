"""What every stage's ``main`` begins with."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu.findings import Findings

#: What an engine notes (`tools.gpu.notes`): queries read from the buffers of graphs, a copy that became part of one.
KEPT, RECORDED = "kept", "recorded"


@dataclass
class Context:
    """Where a stage writes, and how it runs."""

    findings: Findings
    rehearse: bool
    scratch: Path
    _end: float = field(default_factory=lambda: time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", "3600")))

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" in a rehearsal."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._end - time.monotonic()


def begin(run: Callable[[Context], None]) -> int:
    """Parse a stage's arguments and run it; 1 where it found something wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--findings", type=Path, default=None)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    scratch = Path(os.environ.get("GPU_CHECK_SCRATCH", "/tmp"))
    context = Context(Findings(options.findings), options.rehearse, scratch)
    run(context)
    return int(context.findings.failed)
