"""Real SGLang: every row against Transformers, eager and out of CUDA graphs; what capture costs its server."""

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


def run(context: Context) -> None:
    """Make the model, run the jobs, judge them, measure."""
    engines.run_stage(
        context, "sglang", rehearsed if context.rehearse else jobs, start, answers, environment(context), at_once=3
    )


def jobs(model: str) -> list[Job]:
    """On a GPU."""
    ids = prompts(SIZE["vocab_size"], 700)
    common = {
        "model_path": model, "log_level": "warning", "attention_backend": "triton", "sampling_backend": "pytorch",
        "grammar_backend": "none", "context_length": 2048, "max_total_tokens": 16_384, "max_running_requests": 16,
        "chunked_prefill_size": 256, "enable_mixed_chunk": True, "cuda_graph_max_bs_decode": 16,
    }  # fmt: skip
    late = [[Ask(ids[3], 5, SOME_LAYERS)]]
    float32, bfloat16 = {**common, "dtype": "float32"}, {**common, "dtype": "bfloat16"}
    exact = {"TRITON_F32_DEFAULT": "ieee"}
    every = {"ATTNHOOK_GRAPH_LAYERS": "all"}
    return [
        # a step in which somebody asks for layers that graphs do not keep runs without graphs
        Job("float32, eager steps and graphs", "float32", float32,
            [mixed(ids, EVERY_ROW, self_check=True), mixed(ids, SOME_LAYERS), *late], exact, graphs=True, cached=True),
        Job("bfloat16, graphs keep all layers", "bfloat16", bfloat16,
            [[Ask(ids[0], 2)], mixed(ids, EVERY_ROW, self_check=True), mixed(ids, DECODING), *late], every, graphs=True,
            cached=True),
        Job("float32 as it comes (TF32)", "tf32", float32,
            [[Ask(ids[3], 6, {**EVERY_ROW, "attention_self_check": True})]]),
    ]  # fmt: skip


def rehearsed(model: str) -> list[Job]:
    """The same lines on the CPU: there the buffers of graphs are filled without graphs."""
    from tests.backends.sglang.engine import COMMON

    ids = prompts(REHEARSED["vocab_size"], 90)
    common = {
        **COMMON,
        "model_path": model,
        "log_level": "warning",
        "chunked_prefill_size": 64,
        "enable_mixed_chunk": True,
    }
    late = [[Ask(ids[3], 5, SOME_LAYERS)]]
    return [
        Job("float32, eager steps", "float32", common, [mixed(ids, EVERY_ROW, self_check=True), *late], cached=True),
        Job("float32, graphs keep all layers", "float32", common, [[Ask(ids[0], 2)], mixed(ids, DECODING), *late],
            {"ATTNHOOK_GRAPH_LAYERS": "all"}, graphs=True, cached=True),
    ]  # fmt: skip


def environment(context: Context) -> dict[str, str]:
    """Of an engine's processes."""
    if context.rehearse:
        from tests.backends.sglang.engine import engine_environment

        return engine_environment(IDLE_IMPORT="tools.gpu.notes")
    notes = str(Path(__file__).with_name("site"))
    return {
        **os.environ,
        "ATTNHOOK": "1",
        "PYTHONPATH": os.pathsep.join([notes, os.environ.get("PYTHONPATH", str(ROOT))]),
    }


def start(job: Job, folder: Path) -> list[str]:
    """The command of a job, which tests/backends/sglang/offline.py runs."""
    batches = [
        {"input_ids": [ask.ids for ask in batch], "sampling_params": [sampling(ask) for ask in batch]}
        for batch in job.batches
    ]
    (folder / "job.json").write_text(json.dumps({"engine": job.engine, "batches": batches}), encoding="utf-8")
    return [sys.executable, "-m", "tests.backends.sglang.offline", str(folder / "job.json"), str(folder / "out.json")]


def sampling(ask: Ask) -> dict[str, Any]:
    """Greedy, of a set length."""
    custom = {"custom_params": ask.fields} if ask.fields else {}
    return {"max_new_tokens": ask.new, "temperature": 0.0, "ignore_eos": True, **custom}


def answers(job: Job, found: Any) -> list[list[Answer]]:
    """What came back for every batch of a job, from what its process wrote."""
    return [[answer(result) for result in batch] for batch in found]


def answer(result: dict[str, Any]) -> Answer:
    """What one call of SGLang's engine returned."""
    from tests.backends.vllm.engine import from_entry

    meta = result["meta_info"]
    check = meta.get("attention_self_check")
    return Answer(
        result["output_ids"],
        [from_entry(entry) for entry in meta.get("attention_tokens", [])],
        [from_entry(entry) for entry in meta.get("prompt_attention_tokens", [])],
        meta.get("attention_error"),
        check["max_error"] if check else None,
        any("attention" in name for name in meta),
        meta.get("cached_tokens"),
    )


if __name__ == "__main__":
    sys.exit(begin(run))
