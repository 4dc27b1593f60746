"""Where an extra is not installed: one line before any slow work, with the way from a registry and from a checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnhook.errors import install
from tests.cli.test_sinks import write
from tests.helpers import ROOT, environment
from tests.sinks.samples import record

#: A command, a module that is missing, and the extra that brings it.
CASES = [
    ("run hi", "transformers", "transformers"),
    ("run hi", "torch", "transformers"),
    ("probe --out p.db", "transformers", "transformers"),
    ("session x.db r", "pyarrow", "sinks"),
    ("calibrate x.db --out out", "sklearn", "analysis"),
    ("calibrate x.db --out out", "matplotlib", "analysis"),
    ("discover x.db --out out", "umap", "analysis"),
    ("discover x.db --out out", "hdbscan", "analysis"),
    ("discover x.db --out out", "matplotlib", "analysis"),
    ("compare x.db y.db", "matplotlib", "analysis"),
    ("compare x.db y.db", "pyarrow", "analysis"),
    ("drift fit x.db --out b.npz", "pyarrow", "analysis"),
    ("drift check x.db --baseline b.npz", "pyarrow", "analysis"),
    ("sinks convert x.db p/", "pyarrow", "sinks"),
    ("sinks test p/", "pyarrow", "sinks"),
    ("sinks test zmq:tcp://127.0.0.1:9", "zmq", "sinks"),
    ("sinks prune x.db --keep-days 1", "pyarrow", "sinks"),
    ("collect --store x.db", "zmq", "sinks"),
    ("collect --store x.db", "starlette", "sinks"),
]
CODE = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
sys.argv = ["attnhook", *sys.argv[2:]]
from attnhook.cli import app as cli
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "module", "extra"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_missing_library_is_told_before_slow_work(tmp_path: Path, command: str, module: str, extra: str) -> None:
    for name in ("x.db", "y.db"):
        write(f"sqlite:{tmp_path / name}", [record(0)])
    before = sorted(tmp_path.iterdir())
    ran = subprocess.run(
        [sys.executable, "-c", CODE, module, *command.split()],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stdout + ran.stderr
    (line,) = ran.stderr.splitlines()
    assert re.fullmatch(rf"error: .*\bneeds {module}(\.\w+)*: {re.escape(install(extra))}.*", line), line
    assert sorted(tmp_path.iterdir()) == before


def test_how_an_extra_is_installed() -> None:
    assert install("sinks") == "pip install 'attnhook[sinks]', or in a checkout of attnhook pip install '.[sinks]'"


def test_every_message_about_an_extra_comes_from_one_function() -> None:
    others = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "attnhook").rglob("*.py")
        if re.search(r"pip install '?(attnhook|\.)\[", path.read_text(encoding="utf-8"))
    ]
    assert others == ["attnhook/errors.py"]


def test_the_extras_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    named = {extra for _, _, extra in CASES}
    assert named <= extras, json.dumps(sorted(extras))
