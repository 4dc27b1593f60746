"""The newest and the oldest Transformers that we support: the backend's tests, with each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment

WANTED = (ROOT / "tools" / "transformers-other-requirements.txt").read_text(encoding="utf-8")
VERSIONS = [line.partition("==")[2] for line in WANTED.splitlines() if line.startswith("transformers==")]
FILES = [
    "test_ledger.py", "test_listeners.py", "test_families.py",
    "test_tokens.py", "test_bos.py", "test_padding.py",
    "test_reasons.py", "test_midway.py",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("version", [VERSIONS[0], *(pytest.param(one, marks=pytest.mark.long) for one in VERSIONS[1:])])
def test_the_backend_with(version: str) -> None:
    folder = Path(sys.prefix) / f"transformers-{version}"
    assert folder.is_dir(), f"{folder.name} is missing: make test-all puts it there"
    path = os.pathsep.join([str(folder), str(ROOT)])
    told = "import transformers; print(transformers.__version__)"
    environ = {**environment(), "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", told], env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == version
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not model"]
    files = [f"tests/backends/transformers/{name}" for name in FILES]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_the_extra_ends_with_the_newest_that_is_tested() -> None:
    newest, oldest = (tuple(map(int, version.split(".")[:2])) for version in VERSIONS)
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}" in lines
