"""Forks of a process that has imported: they run what they are given, as it would run alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.forking import FRESH, Ready
from tests.backends.servers import run
from tests.backends.sglang import engine as sglang
from tests.backends.vllm import engine as vllm
from tests.helpers import environment


@pytest.fixture(scope="module")
def ready() -> Ready:
    return Ready(["json", "torch"], lambda: environment(FIXED="1"), later=["MINE"], again=["gc:enable"])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text("import os\nos.environ['CUSTOMIZED'] = '1'\n")
    return tmp_path


def test_output_status_and_environment(ready: Ready, tmp_path: Path) -> None:
    script = """
        import os, sys
        print(os.environ["MINE"], sys.argv, os.getcwd(), "json" in sys.modules, sys.stdin.read() == "")
        print("and this", file=sys.stderr)
        sys.exit(3)
    """
    environ = environment(FIXED="1", MINE="here")
    code, output = run(["-c", script, "x"], environ, tmp_path / "log", ready=ready)
    alone = run(["-c", "import sys; sys.exit(3)"], environ, tmp_path / "alone")
    assert code == alone[0] == 3
    assert output.splitlines() == [f"here ['-c', 'x'] {os.getcwd()} True True", "and this"]
    code, output = run(["json.tool", "--help"], environ, tmp_path / "log", ready=ready)
    assert code == 0 and "usage" in output
    code, output = run(["-c", "raise ValueError('seven')"], environ, tmp_path / "log", ready=ready)
    assert code == 1 and "ValueError: seven" in output


def test_what_is_settled_at_an_import_is_no_fork(ready: Ready) -> None:
    assert ready.takes(environment(FIXED="1", MINE="2", ATTNHOOK_SINKS="jsonl:x", OMP_NUM_THREADS="1"))
    assert not ready.takes(environment(FIXED="2"))
    assert not ready.takes(environment())
    assert not ready.takes(environment(FIXED="1", ANOTHER="1"))


def test_what_this_process_sets_meanwhile_is_no_difference(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FRESH, raising=False)
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "True")  # as libraries do
    assert ready.takes(environment(FIXED="1"))
    assert vllm.ready_for(vllm.engine_environment(ATTNHOOK_SINKS="jsonl:x", VLLM_LOGGING_LEVEL="INFO")) is vllm.READY
    assert sglang.ready_for(sglang.engine_environment(TRITON_INTERPRET="1")) is sglang.READY["1"]
    assert sglang.ready_for(sglang.engine_environment(SGLANG_TEST_RETRACT="1")) is None
    assert vllm.ready_for(vllm.engine_environment(), fresh=True) is None
    monkeypatch.setenv(FRESH, "1")
    assert vllm.ready_for(vllm.engine_environment()) is sglang.ready_for(sglang.engine_environment()) is None


def test_a_signal_and_a_sitecustomize(ready: Ready, folder: Path) -> None:
    environ = environment(FIXED="1", MINE="1")
    process = ready.start(["-c", "import time; time.sleep(60)"], environ, folder / "log")
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
    with_path = Ready(["json"], lambda: environ, later=["PYTHONPATH"])
    script = "import os; print(os.environ.get('CUSTOMIZED'))"
    path = f"{folder / 'custom'}{os.pathsep}{environ['PYTHONPATH']}"
    code, output = run(["-c", script], {**environ, "PYTHONPATH": path}, folder / "log", ready=with_path)
    assert (code, output) == (0, "1\n")
    assert run(["-c", script], environ, folder / "log", ready=with_path) == (0, "None\n")
