"""Real SGLang on the CPU for tests: offline in a process of its own, or a server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.backends.forking import Ready
from tests.backends.servers import Server, free_port, run, running
from tests.backends.vllm import engine as other
from tests.conftest import BESIDE_OTHERS
from tests.helpers import ROOT, environment

PROBABILITY = 5e-6  # max |dP| against eager at float32: what a throw-away plugin reached, and more

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

#: The kernel package's stand-in, and torchvision, which nothing else here may see (tools/venv.sh).
_PATHS = (str(Path(__file__).parent / "standin"), str(Path(sys.prefix) / "sglang-extra"))

#: Names a folder with another version than the environment's, for all tests or in the environment of one.
UNDER_TEST = "SGLANG_UNDER_TEST"

#: How every engine of these tests runs.
COMMON: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "dtype": "float32",
    "context_length": 2048,
    "max_total_tokens": 8192,
    "max_running_requests": 8,
    "sleep_on_idle": True,
}


def _other_models(version: str) -> str:
    """SGLang's model files but those that tests use: importing them all takes long at each start."""
    found = importlib.util.find_spec("sglang")
    folders = [f"{version}/sglang"] if version else (found.submodule_search_locations or ()) if found else ()
    files = {path.stem for folder in folders for path in (Path(folder) / "srt" / "models").glob("*.py")}
    return ",".join(sorted(files - {"llama", "gemma3_causal", "mellum", "gpt_oss", "deepseek_v2"}))


def engine_environment(**environ: str) -> dict[str, str]:
    version = environ.pop(UNDER_TEST, os.environ.get(UNDER_TEST, ""))
    paths = [*_PATHS, version, str(ROOT), os.environ.get("PYTHONPATH", "")]
    return environment(
        **{
            "ATTNHOOK": "1",
            "HF_HUB_OFFLINE": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_DISABLED_MODEL_ARCHS": _other_models(version),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONWARNINGS": "ignore",
            **({"OMP_NUM_THREADS": "1"} if BESIDE_OTHERS else {}),
            **environ,
        }
    )


#: What an engine or a server imports before it does anything; the last has its processes forked. By TRITON_INTERPRET.
READY = {
    interpreted: Ready(
        [
            "sglang.launch_server",
            "sglang.srt.managers.scheduler",
            "sglang.srt.models.llama",
            "tests.backends.sglang.forks",
        ],
        partial(engine_environment, **({"TRITON_INTERPRET": interpreted} if interpreted else {})),
        later=["SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_TEST_NOTES"],  # many others are read at imports
    )
    for interpreted in ("", "1")
}


def ready_for(environ: dict[str, str], fresh: bool = False) -> Ready | None:
    """Whose fork a process with this environment may be."""
    ready = READY.get(environ.get("TRITON_INTERPRET", ""))
    return ready and ready.unless(fresh, environ)


@contextlib.contextmanager
def serve(folder: Path, model: str, *arguments: str, fresh: bool = False, **environ: str) -> Iterator[Server]:
    """``sglang.launch_server`` on a free port of the loopback interface, ended with everything that it started.

    Unless ``fresh``, it is a fork of `READY`, and its own processes are forks of it, in place of SGLang's spawned ones.
    """
    log = folder / "server.log"
    # older versions want the port that is higher by 10000 too, and 65535 is the last
    while (port := free_port()) > 55_000:
        pass
    argv = [
        "sglang.launch_server", "--model-path", model, "--served-model-name", "smol",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip
    for name, value in COMMON.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    # SGLang's /health answers before the warm-up is over, with 503
    whole = engine_environment(**environ)
    with running([*argv, *arguments], port, log, whole, ready=ready_for(whole, fresh)) as server:
        yield server


def offline(
    tmp_path: Path, model: str, batches: Sequence[Any], *, fresh: bool = False, environ: Any = None, **engine: Any
) -> list[Any]:
    """What calls of ``sglang.Engine.generate`` return, one after the other, in a process of its own."""
    job = {"engine": {"model_path": model, "log_level": "warning", **COMMON, **engine}, "batches": batches}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    argv = ["tests.backends.sglang.offline", str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    whole = engine_environment(**(environ or {}))
    code, output = run(argv, whole, tmp_path / "log", ready=ready_for(whole, fresh))
    assert code == 0, output[-6000:]
    result: list[Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return result


def check(*arguments: Any, **options: Any) -> Any:
    """`tests.backends.vllm.engine.check` with this engine's own bound."""
    worst = other.check(*arguments, **options)
    assert worst.probability <= PROBABILITY, worst
    return worst
