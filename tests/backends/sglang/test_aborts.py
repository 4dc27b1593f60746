"""SGLang: requests that are aborted leave nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.sglang.engine import COMMON, engine_environment, needs_sglang
from tests.helpers import ROOT, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.long, needs_sglang]

MB = 2**20
REQUESTS, WARM_UP = 1600, 800


def test_aborted_requests_leave_nothing(tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    job = {
        "engine": {
            **COMMON, "model_path": str(tmp_path / "model"), "log_level": "error", "skip_tokenizer_init": True,
            "context_length": 64, "max_total_tokens": 2048, "max_running_requests": 32, "disable_radix_cache": True,
        },
        "requests": REQUESTS, "at_once": 48, "warm_up": WARM_UP,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tests.backends.sglang.aborting",
        str(tmp_path / "job.json"),
        str(tmp_path / "out"),
    ]
    environ = engine_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    seen, resident = result["seen"], result["resident"]
    print(seen, [f"{size / MB:.1f}" for size in resident])
    assert seen["without a token"] + seen["after a token"] == REQUESTS
    assert seen["aborted"] > REQUESTS // 2 and seen["after a token"] > REQUESTS // 4
    assert seen["records"] > REQUESTS // 2 and seen.get("errors", 0) == 0
    assert result["kept"] == [] and result["after"] == 8
    growth = [(later - before) / MB for before, later in itertools.pairwise(resident)]
    assert len(growth) == 4 and min(growth) < 2, growth
