"""Models divided over processes: tensor-parallel ranks and pipeline stages answer like one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from attnhook.record.key_mass import KeyMass
from tests import oracle
from tests.backends.vllm.engine import ALL, KEYS, OF_HEADS, Server, check, needs_vllm, serve
from tests.backends.vllm.test_server import FAULT, chat, entries_of, message, rows

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_vllm]

FAULT_WHILE_TAKING = 11  # as in faulty/sitecustomize.py
FAULTY = str(Path(__file__).parent / "faulty")


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def check_crowd(client: Any, smol: Any) -> None:
    """Several at once, with and without prompt rows, whole and streamed."""
    texts = ["Name a colour.", "A long shared beginning. " * 30, "Say hello to the machine.", "One, two, three"]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda text: chat(client, text, **ALL, **KEYS), texts))
    for reply in replies:
        choice = reply.choices[0]
        assert not hasattr(choice, "attention_error"), choice.attention_error
        generated, prompt = rows(choice.attention_tokens), rows(choice.prompt_attention_tokens)
        mass = choice.attention_key_mass
        print(check(smol, reply.prompt_token_ids, choice.token_ids, generated, prompt, key_mass=mass))
    alone = chat(client, texts[0], **ALL).choices[0]  # in a batch rounding differs
    extra = {"return_token_ids": True, "ignore_eos": True, **ALL}
    chunks = client.chat.completions.create(
        model="smol", messages=message(texts[0]), max_tokens=8, temperature=0, stream=True, extra_body=extra
    )
    streamed = entries_of([chunk.choices[0] for chunk in chunks if chunk.choices])
    assert streamed == alone.attention_tokens


def test_tensor_parallel_ranks(smol: Any, smol_path: str, tmp_path: Path) -> None:
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0", "PYTHONPATH": FAULTY, "FAULTY_RANK": "2"}
    with serve(tmp_path, smol_path, "--tensor-parallel-size", "3", **environ) as server:
        client = client_of(server)
        check_crowd(client, smol)
        told = server.get("/v1/attention/capabilities")
        assert told["query_heads"] == 9
        # heads of one rank, and of two: what the other ranks see does not count
        for heads in ([4], [0, 1, 8]):
            choice = chat(client, **{**ALL, "attention_heads": heads}).choices[0]
            alone = chat(client, **{**ALL, "attention_heads": [heads[0]]}).choices[0]
            assert (choice.attention_tokens == alone.attention_tokens) == (len(heads) == 1)
            assert not hasattr(choice, "attention_error")
        # what each has of its own kv heads
        choice = chat(client, **ALL, attention_key_mass="kv_head").choices[0]
        each = KeyMass.from_list(choice.attention_key_mass)
        mean = KeyMass.from_list(chat(client, **ALL, **KEYS).choices[0].attention_key_mass)
        assert each[29].shape == (3, mean[29].shape[0]) and np.ptp(each[29], axis=0).max() > 0.1
        assert all(np.allclose(each[layer].mean(axis=0), mean[layer], atol=1e-4) for layer in range(30))
        # what each rank tells of its own heads
        reply = chat(client, **{**ALL, **OF_HEADS})
        (choice,) = reply.choices
        ids = [*reply.prompt_token_ids, *choice.token_ids][:-1]
        every = rows([*choice.prompt_attention_tokens, *choice.attention_tokens])
        oracle.check_heads(smol, ids, every, top_k=4, heads=range(9))
        # what goes wrong in one rank only is told, and no rank falls out of step
        good = chat(client, **ALL).choices[0]
        for fault in (FAULT, FAULT_WHILE_TAKING):
            broken = chat(client, **{**ALL, "top_k_attention": fault}).choices[0]
            assert broken.attention_tokens == [] and "injected" in broken.attention_error, broken.attention_error
            again = chat(client, **ALL).choices[0]
            assert again.attention_tokens == good.attention_tokens and again.token_ids == broken.token_ids


def test_pipeline_stages(smol: Any, smol_path: str, tmp_path: Path) -> None:
    # compiled by a backend that compiles nothing: vLLM's stages on the CPU do not run eagerly
    flags = ["--no-enforce-eager", "--compilation-config", '{"mode": 2, "backend": "eager"}']
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serve(tmp_path, smol_path, "--pipeline-parallel-size", "2", *flags, **environ) as server:
        client = client_of(server)
        check_crowd(client, smol)
        for layers in ([2], [28], [14, 15]):  # of the first stage, of the last, of both
            choice = chat(client, **{**ALL, "attention_layers": layers}).choices[0]
            assert [list(entry["layers"]) for entry in choice.attention_tokens] == [[str(n) for n in layers]] * 8
