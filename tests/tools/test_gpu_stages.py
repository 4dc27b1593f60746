"""What a stage does on a GPU alone: the lines that a rehearsal on the CPU does not reach."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from benchmarks import overhead
from tools.gpu import engines, stage_sanitizer, stage_sglang, stage_speed, stage_vllm
from tools.gpu.findings import Findings
from tools.gpu.model import REHEARSED, SIZE
from tools.gpu.stage import Context


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Findings(tmp_path / "findings.json"), False, tmp_path)


@pytest.mark.parametrize("stage", [stage_sglang, stage_vllm])
def test_jobs_of_the_engines(stage: Any, tmp_path: Path) -> None:
    for jobs, size in ((stage.jobs("m"), SIZE), (stage.rehearsed("m"), REHEARSED)):
        assert len({job.name for job in jobs}) == len(jobs)
        assert any(job.graphs for job in jobs) and any(job.cached for job in jobs)
        for job in jobs:
            folder = tmp_path / f"{size['vocab_size']}-{job.name}"
            folder.mkdir()
            command = stage.start(job, folder)
            told = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            assert told["engine"] == job.engine and str(folder / "job.json") in command
            assert job.numbers in engines.BOUNDS and job.numbers in engines.REBUILT
            asks = [ask for batch in job.batches for ask in batch]
            assert max(max(ask.ids) for ask in asks) < size["vocab_size"]
            # graphs that keep some layers cannot give others, so who must come out of graphs asks for those
            if job.graphs and "ATTNHOOK_GRAPH_LAYERS" not in job.environ:
                assert any(ask.fields == engines.SOME_LAYERS for ask in asks)
            # a step that checks itself is not a graph's
            if job.graphs:
                assert any(not any("attention_self_check" in ask.fields for ask in batch) for batch in job.batches)
    assert "ATTNHOOK" in stage.environment(Context(Findings(), False, tmp_path))
    checked = {job.numbers for job in stage.jobs("m") for batch in job.batches for ask in batch
               if "attention_self_check" in ask.fields}  # fmt: skip
    assert checked == {"float32", "tf32", "bfloat16"}
    covered = {job.numbers for job in stage.jobs("m")}
    assert covered == {"float32", "tf32", "bfloat16"}


def test_both_runners_and_every_kind_of_graph_of_vllm() -> None:
    jobs = stage_vllm.jobs("m")
    assert {job.environ["VLLM_USE_V2_MODEL_RUNNER"] for job in jobs} == {"0", "1"}
    kinds = {job.engine.get("compilation_config", {}).get("cudagraph_mode") for job in jobs}
    assert kinds == {None, "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}
    assert {job.engine["attention_backend"] for job in jobs} == {"TRITON_ATTN", "FLASH_ATTN"}


def result(batch: int, keys: int, method: str, seconds: float, share: float, extra: int | None) -> dict[str, Any]:
    size = {"batch": batch, "keys": keys, "heads": 32, "kv_heads": 8, "dim": 128}
    return {
        "size": size, "method": method, "seconds": seconds, "copy_share": share, "extra_bytes": extra,
        "key_bytes": batch * keys * 2048,
    }  # fmt: skip


def test_bars_of_speed(context: Context) -> None:
    rows = [
        result(8, 4096, stage_speed.OURS, 2.0, 0.4, 1 << 20),
        result(8, 4096, stage_speed.GRAPH, 1.0, 0.81, None),  # what an engine replays counts
        result(8, 131_072, stage_speed.OURS, 2.0, 0.7, 1 << 30),
        result(8, 131_072, "naive torch: softmax(QK^T), topk", 18.0, 0.1, None),
        result(1, 4096, stage_speed.OURS, 1.0, 0.2, 1 << 10),
    ]
    stage_speed.judge(context, rows)
    states = {check.what: check.state for check in context.findings.checks}
    eight, long, one = "8 x 4,096 keys", "8 x 131,072 keys", "1 x 4,096 keys"
    found = {key: [state for what, state in states.items() if key in what] for key in (eight, long, one)}
    assert found[eight] == ["ok", "ok"]
    assert found[long] == ["missed", "missed", "missed"]  # bandwidth, ten times naive, memory
    assert found[one] == ["seen", "ok"]
    assert not context.findings.failed
    stage_speed.judge(context, [])
    assert context.findings.failed


def test_bars_of_a_server(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are those that benchmarks.overhead writes."""
    samples = {}
    for batch in (1, 8):
        for mode, wall in zip(overhead.MODES, (1.0, 1.005, 1.03, 1.04, 1.5), strict=True):
            samples[mode, batch] = overhead.Sample(wall * batch, wall, wall)
    options = type("Options", (), {"engine": "vllm", "batch": [1, 8]})()
    told = overhead.figures(options, [samples])

    def run(command: list[str], **_: Any) -> Any:
        assert "--device" in command and float(command[command.index("--minutes") + 1]) > 0
        Path(command[command.index("--json") + 1]).write_text(json.dumps(told), encoding="utf-8")
        return type("Done", (), {"stdout": "", "returncode": 0})()

    monkeypatch.setattr(engines.subprocess, "run", run)
    engines.overhead(context, "vllm", Path("m"))
    states = {check.what: check.state for check in context.findings.checks}
    lost = "tokens per second lost, batch 8, "
    assert states[lost + "idle"] == "ok" and states[lost + "last layer"] == "missed"
    assert states[lost + "4 layers"] == "ok" and states[lost + "all layers"] == "seen"
    (table,) = context.findings.tables.values()
    assert "| 8 | last layer | 2.9% | 2.9% to 2.9% |" in table


@pytest.mark.parametrize(
    ("said", "status", "failed"),
    [
        ("========= ERROR SUMMARY: 0 errors\n3 passed", 0, False),
        ("========= ERROR SUMMARY: 2 errors\n3 passed", 9, True),
        ("3 passed", 0, True),
        ("========= ERROR SUMMARY: 0 errors\nno tests ran", 5, True),
    ],
)
def test_what_the_sanitizer_says(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, status: int, failed: bool
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'X'\n{said}\nX\nexit {status}\n", encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stage_sanitizer.run(context)
    assert context.findings.failed is failed


def test_no_sanitizer_is_said(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stage_sanitizer.run(context)
    assert context.findings.failed and "CUDA toolkit" in context.findings.checks[0].value


def test_jobs_that_fail_are_told_and_the_others_are_kept(context: Context, tmp_path: Path) -> None:
    import sys

    def start(job: engines.Job, folder: Path) -> list[str]:
        code = "raise MemoryError('too little')" if job.name == "bad" else "print('fine')"
        return [sys.executable, "-c", code]

    jobs = [engines.Job(name, "float32", {}, []) for name in ("bad", "good", "other")]
    done = engines.run_jobs(context, jobs, start, 2, dict(os.environ))
    assert set(done) == {"good", "other"}
    (check,) = context.findings.checks
    assert check.what == "bad: runs" and check.value == "MemoryError: too little" and check.state == "failed"
