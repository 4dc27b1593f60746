"""PEFT's models: the tests that need peft, in a process that has it on its path.

Transformers imports peft where it finds it, and with it Triton, which tests/kernels must import first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment

FOLDER = Path(sys.prefix) / "peft-extra"


@pytest.mark.slow
def test_virtual_tokens_with_peft() -> None:
    assert FOLDER.is_dir(), f"{FOLDER.name} is missing: make venv puts it there"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environ = {**environment(), "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)])}
    done = subprocess.run(
        [*command, "tests/backends/transformers/test_virtual.py"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-600:]
