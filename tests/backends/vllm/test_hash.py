"""vLLM's caches on disk are named by a hash that tells runs with attnhook from runs without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.backends.vllm.engine import engine_environment, needs_vllm
from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, needs_vllm]

SCRIPT = """
from vllm.config import VllmConfig
import attnhook
config = VllmConfig()
plain = config.compute_hash(), config.compute_hash(include_version=False)
attnhook.install()
salted = config.compute_hash(), config.compute_hash(include_version=False)
again = config.compute_hash()
attnhook.uninstall()
assert again == salted[0] and len({*plain, *salted}) == 4, (plain, salted)
assert len(salted[0]) == len(plain[0]) and config.compute_hash() == plain[0]
"""


def test_the_hash_is_salted() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=ROOT, env=engine_environment(ATTNHOOK="0"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
