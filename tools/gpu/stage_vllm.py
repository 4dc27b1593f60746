"""Real vLLM: both runners, eager, piecewise and full graphs, every row against Transformers; what capture costs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tools.gpu import engines
from tools.gpu.engines import DECODING, EVERY_ROW, SOME_LAYERS, Answer, Ask, Job, mixed, prompts
from tools.gpu.machine import ROOT
from tools.gpu.model import REHEARSED, SIZE
from tools.gpu.stage import Context, begin

EAGER: dict[str, Any] = {"enforce_eager": True}
# graphs without Inductor, which would take a minute of each start and changes nothing that attention sees
PIECEWISE = {"compilation_config": {"mode": 3, "backend": "eager", "cudagraph_mode": "PIECEWISE"}}
FULL = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
BOTH = {"compilation_config": {"mode": 3, "backend": "eager", "cudagraph_mode": "FULL_AND_PIECEWISE"}}


def run(context: Context) -> None:
    """Make the model, run the jobs, judge them, measure."""
    engines.run_stage(
        context, "vllm", rehearsed if context.rehearse else jobs, start, answers, environment(context), at_once=4
    )


def jobs(model: str) -> list[Job]:
    """On a GPU, those first that tell most."""
    ids = prompts(SIZE["vocab_size"], 700)
    common = {
        "model": model, "max_model_len": 2048, "seed": 0, "kv_cache_memory_bytes": 2 << 30, "max_num_seqs": 16,
        "gpu_memory_utilization": 0.1, "max_num_batched_tokens": 256, "enable_chunked_prefill": True,
        "attention_backend": "TRITON_ATTN",
    }  # fmt: skip
    late = [[Ask(ids[3], 5, SOME_LAYERS)]]
    float32, bfloat16 = {**common, "dtype": "float32"}, {**common, "dtype": "bfloat16"}
    flash = {**bfloat16, "attention_backend": "FLASH_ATTN"}
    v1 = {"VLLM_USE_V2_MODEL_RUNNER": "0", "TRITON_F32_DEFAULT": "ieee"}
    v2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_F32_DEFAULT": "ieee"}
    every = {"ATTNHOOK_GRAPH_LAYERS": "all"}
    rows, decoding = [mixed(ids, EVERY_ROW, self_check=True), *late], [mixed(ids, DECODING), *late]
    both = [rows[0], *decoding]
    return [
        Job("V1, eager, float32", "float32", float32 | EAGER, rows, v1, cached=True),
        Job("V2, eager, float32", "float32", float32 | EAGER, rows, v2, cached=True),
        Job("V1, full graphs, float32", "float32", float32 | FULL, decoding, v1 | every, graphs=True, cached=True),
        Job("V2, full graphs, bfloat16", "bfloat16", bfloat16 | FULL, both, v2 | every, graphs=True, cached=True),
        Job("V1, piecewise graphs, float32", "float32", float32 | PIECEWISE, rows, v1, cached=True),
        Job("V2, full and piecewise graphs, FlashAttention, bfloat16", "bfloat16", flash | BOTH, both, v2 | every,
            graphs=True, cached=True),
        Job("V1, eager, float32 as it comes (TF32)", "tf32", float32 | EAGER,
            [[Ask(ids[3], 6, {**EVERY_ROW, "attention_self_check": True})]], {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    ]  # fmt: skip


def rehearsed(model: str) -> list[Job]:
    """The same lines on the CPU: there the buffers of graphs are filled without graphs."""
    ids = prompts(REHEARSED["vocab_size"], 90)
    common = {
        "model": model, "dtype": "float32", "max_model_len": 2048, "seed": 0, "enforce_eager": True,
        "max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_num_seqs": 16, "block_size": 32,
    }  # fmt: skip
    late = [[Ask(ids[3], 5, SOME_LAYERS)]]
    return [
        Job("V1, eager, float32", "float32", common, [mixed(ids, EVERY_ROW, self_check=True), *late], cached=True),
        Job("V1, graphs keep all layers, float32", "float32", common, [mixed(ids, DECODING), *late],
            {"ATTNHOOK_GRAPH_LAYERS": "all"}, graphs=True, cached=True),
    ]  # fmt: skip


def environment(context: Context) -> dict[str, str]:
    """Of an engine's processes."""
    notes = str(Path(__file__).with_name("site"))
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if context.rehearse:
        from tests.backends.vllm.engine import engine_environment

        environ = engine_environment(**own)
        return {**environ, "PYTHONPATH": os.pathsep.join([notes, environ["PYTHONPATH"]])}
    path = os.pathsep.join([notes, os.environ.get("PYTHONPATH", str(ROOT))])
    return {**os.environ, **own, "ATTNHOOK": "1", "PYTHONPATH": path}


def start(job: Job, folder: Path) -> list[str]:
    """The command of a job, which tests/backends/vllm/offline.py runs."""
    requests = [
        [
            {"ids": ask.ids, "sampling": {"max_tokens": ask.new, "ignore_eos": True}, "fields": ask.fields}
            for ask in batch
        ]
        for batch in job.batches
    ]
    (folder / "job.json").write_text(json.dumps({"engine": job.engine, "batches": requests}), encoding="utf-8")
    return [sys.executable, "-m", "tests.backends.vllm.offline", str(folder / "job.json"), str(folder / "out.json")]


def answers(job: Job, found: Any) -> list[list[Answer]]:
    """What came back for every batch of a job, from what its process wrote."""
    replies = iter(found["replies"])
    return [[answer(next(replies)) for _ in batch] for batch in job.batches]


def answer(reply: dict[str, Any]) -> Answer:
    """What vLLM gave for one request."""
    from tests.backends.vllm.engine import records

    (choice,) = reply["choices"]
    return Answer(
        choice["ids"], records(choice["generated"]), records(choice["prompt"]), choice["error"], choice["check"],
        choice["asked"], reply["cached"],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(begin(run))
