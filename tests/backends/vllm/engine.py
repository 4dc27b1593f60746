"""Real vLLM for tests: offline in a process of its own, or a server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnhook import TokenRecord
from attnhook.record.entry_heads import read_heads
from attnhook.record.key_mass import KeyMass
from tests import oracle
from tests.backends.forking import Ready
from tests.backends.servers import Server, free_port, run, running
from tests.conftest import BESIDE_OTHERS
from tests.helpers import environment

#: Found without an import: vLLM brings Triton in, which tests/kernels must import first.
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

#: What is told of every head too.
OF_HEADS = {
    "attention_per_head": ["spans", "fingerprint", "sink", "top", "lse"],
    "attention_top_k_per_head": 4,
    "attention_spans": {name: list(span) for name, span in oracle.SPANS.items() if span[0] < 100},
}
#: Some rows of the prompt too.
CHOSEN = {"attention_spans": {"head": [0, 5]}, "attention_rows": ["head", [30, 34]]}
#: How much attention each key has got.
KEYS = {"attention_key_mass": "mean"}
#: Everything on, so that a request shows every layer and row.
ALL = {"return_attention_tokens": True, "attention_layers": "all", "top_k_attention": 8, "attention_prompt": True}


def engine_environment(**environ: str) -> dict[str, str]:
    return environment(
        **{
            "ATTNHOOK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1" if BESIDE_OTHERS else "2",
            **environ,
        }
    )


#: What an engine or a server imports before it does anything.
READY = Ready(
    [
        "vllm.entrypoints.cli.main",
        "vllm.entrypoints.llm",
        "vllm.entrypoints.openai.api_server",
        "vllm.model_executor.models.llama",
        "vllm.renderers.hf",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.v1.core.sched.scheduler",
        "vllm.v1.engine.core",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.metrics.loggers",
        "vllm.v1.worker.cpu_worker",
    ],
    engine_environment,
    later=["FAULTY_RANK", "PYTHONPATH", "VLLM_"],  # vLLM looks its own up when it needs them
    again=["vllm.logger:_configure_vllm_root_logger"],
)


def ready_for(environ: dict[str, str], fresh: bool = False) -> Ready | None:
    """Whose fork a process with this environment may be."""
    return READY.unless(fresh, environ)


def offline(
    tmp_path: Path,
    model: str,
    requests: Sequence[dict[str, Any]] = (),
    *,
    batches: Sequence[Sequence[dict[str, Any]]] = (),
    together: bool = True,
    uninstall: bool = False,
    fresh: bool = False,
    environ: Any = None,
    **engine: Any,
) -> dict[str, Any]:
    """Run requests through ``vllm.LLM`` in a process of its own; ``fresh``: not a fork of `READY`.

    A generate call takes all requests, or one of them (not ``together``), or each batch.
    """
    job = {
        "engine": {
            "model": model,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "seed": 0,
            **engine,
        },
        "batches": [
            [{"sampling": {}, "fields": {}, **request} for request in batch]
            for batch in batches or ([requests] if together else [[request] for request in requests])
        ],
        "uninstall": uninstall,
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environ or {})}
    argv = ["tests.backends.vllm.offline", str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    whole = engine_environment(**settings)
    code, output = run(argv, whole, tmp_path / "log", ready=ready_for(whole, fresh))
    assert code == 0, output[-6000:]
    result: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return result


def records(rows: Sequence[str]) -> list[TokenRecord]:
    return [TokenRecord.from_bytes(bytes.fromhex(row)) for row in rows]


def from_entry(entry: dict[str, Any], **names: Any) -> TokenRecord:
    """The record that an entry of the reply (raw mode) tells of."""
    layers = tuple(int(layer) for layer in entry["layers"])
    k = 32  # short rows end in -1, as the record's own do

    def padded(name: str, fill: float, dtype: Any) -> np.ndarray:
        rows = [layer[name] + [fill] * (k - len(layer[name])) for layer in entry["layers"].values()]
        return np.array(rows, dtype)

    spans = tuple(entry.get("spans", ()))
    heads = read_heads([*entry["layers"].values()], spans)
    for name, fill in (("head_positions", -1), ("head_scores", 0)):
        if name in heads:
            short = 16 - heads[name].shape[2]
            heads[name] = np.pad(heads[name], ((0, 0), (0, 0), (0, short)), constant_values=fill)
    return TokenRecord(
        request_id=names.get("request_id", ""),
        query_position=entry["query_position"],
        layers=layers,
        token_positions=padded("token_positions", -1, np.int32),
        attention_scores=padded("attention_scores", 0, np.float32),
        fingerprints=np.array([layer["fingerprint"] for layer in entry["layers"].values()], np.float32),
        decode_step=entry["decode_step"],
        span_names=spans,
        span_mass=np.array([[*layer.get("spans", {}).values()] for layer in entry["layers"].values()], np.float32),
        **heads,
        sink_mass=np.array([layer["sink_mass"] for layer in entry["layers"].values()], np.float32),
    )


def check(
    smol: Any, prompt: Sequence[int], output: Sequence[int], generated: Sequence[TokenRecord],
    prompt_rows: Sequence[TokenRecord] | None = None, *, top_k: int = 8, layers: int = 30,
    key_mass: Sequence[dict[str, Any]] | None = None,
) -> oracle.Worst:  # fmt: skip
    """Every row of one request against Transformers' eager attention on the same token ids."""
    ids = torch.tensor([[*prompt, *output][:-1]])
    attention = oracle.eager_attention(smol, ids)
    assert [r.query_position for r in generated] == list(range(len(prompt) - 1, len(prompt) + len(output) - 1))
    assert [r.decode_step for r in generated] == list(range(len(output)))
    rows = list(generated)
    if prompt_rows is not None:
        assert [r.query_position for r in prompt_rows] == list(range(len(prompt) - 1))
        assert all(r.decode_step is None for r in prompt_rows)
        rows = [*prompt_rows, *rows]
    assert all(len(r.layers) == layers for r in rows)
    worst = oracle.compare(rows, attention, top_k=top_k)
    assert worst.rows == layers * len(rows)
    oracle.check(worst)
    if key_mass is not None:
        oracle.check_key_mass(attention, KeyMass.from_list(key_mass), rows)
    return worst


@contextlib.contextmanager
def serve(folder: Path, model: str, *arguments: str, fresh: bool = False, **environ: str) -> Iterator[Server]:
    """``vllm serve MODEL`` on a free port of the loopback interface, ended with everything that it started.

    Unless ``fresh``, it is a fork of `READY`, and its own processes are forks of it, in place of vLLM's spawned ones.
    """
    port, log = free_port(), folder / "server.log"
    argv = [
        "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "smol", "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager", *arguments,
    ]  # fmt: skip
    whole = engine_environment(**environ)
    ready = ready_for(whole, fresh)
    if ready is not None:
        whole["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    with running(argv, port, log, whole, ready=ready) as server:
        yield server
