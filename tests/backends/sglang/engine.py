"""Real SGLang on the CPU for tests: offline in a process of its own, or a server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.backends.servers import Server, free_port, running
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


@contextlib.contextmanager
def serve(folder: Path, model: str, *arguments: str, **environ: str) -> Iterator[Server]:
    """``sglang.launch_server`` on a free port of the loopback interface, ended with everything that it started."""
    log = folder / "server.log"
    # older versions want the port that is higher by 10000 too, and 65535 is the last
    while (port := free_port()) > 55_000:
        pass
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--served-model-name", "smol",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip
    for name, value in COMMON.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    # SGLang's /health answers before the warm-up is over, with 503
    with running([*command, *arguments], port, log, engine_environment(**environ)) as server:
        yield server


def offline(tmp_path: Path, model: str, batches: Sequence[Any], *, environ: Any = None, **engine: Any) -> list[Any]:
    """Run calls of ``sglang.Engine.generate`` one after the other in a process of its own; what each returns."""
    job = {"engine": {"model_path": model, "log_level": "warning", **COMMON, **engine}, "batches": batches}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "tests.backends.sglang.offline", str(tmp_path / "job.json")]
    done = subprocess.run(
        [*command, str(tmp_path / "out.json")],
        cwd=ROOT,
        env=engine_environment(**(environ or {})),
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result: list[Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return result


def check(*arguments: Any, **options: Any) -> Any:
    """`tests.backends.vllm.engine.check` with this engine's own bound."""
    worst = other.check(*arguments, **options)
    assert worst.probability <= PROBABILITY, worst
    return worst
