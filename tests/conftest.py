"""Shared fixtures: the real SmolLM2-135M-Instruct, loaded once per test run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.full_run import FullRun

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in [name for name in os.environ if name.startswith("ATTNHOOK") and name != "ATTNHOOK_CACHE"]:
    del os.environ[name]  # a developer's settings must not change what the tests see


#: Whether other tests run at the same time (pytest -n): each then has one core.
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ

# no property is about time, and an example can take any time on a machine that does other things as well
hypothesis.settings.register_profile("attnhook", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("attnhook")

# what takes longest begins first, or one worker is left alone with it at the end
_LONGEST = ("backends/vllm", "backends/sglang", "backends")


def pytest_configure(config: pytest.Config) -> None:
    from attnhook.cli import progress as cli_progress

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        # a shell's background job ignores it, and so would every process that a test starts and interrupts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # a command that a test runs in this process says nothing of its progress, however busy the machine is
    cli_progress.FIRST = 3600.0
    if BESIDE_OTHERS:
        import torch

        torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FullRun(), "attnhook-full-run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        place = item.path.relative_to(here).as_posix()
        return next((n for n, folder in enumerate(_LONGEST) if place.startswith(folder)), len(_LONGEST))

    items.sort(key=rank)  # stable


@pytest.fixture(scope="session")
def smol_path() -> str:
    """Folder of the default model, converted on first use."""
    from attnhook.backends.transformers.default_model import default_model_path

    return str(default_model_path())


@pytest.fixture(scope="session")
def smol(smol_path: str) -> Any:
    """SmolLM2 in float32 with sdpa attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smol_path, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def tokenizer(smol_path: str) -> Any:
    """SmolLM2's tokenizer, padding on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smol_path, padding_side="left")


@pytest.fixture(scope="session")
def long_text() -> str:
    """A few thousand tokens of real English: our own design notes and licence."""
    return (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are several times faster on one thread where the machine has other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
