"""vLLM's caches on disk are named by a hash that tells runs with attnhook from runs without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.servers import run
from tests.backends.vllm.engine import engine_environment, needs_vllm, ready_for

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


def test_the_hash_is_salted(tmp_path: Path) -> None:
    environ = engine_environment(ATTNHOOK="0")
    code, output = run(["-c", SCRIPT], environ, tmp_path / "log", ready=ready_for(environ))
    assert code == 0, output[-3000:]
