"""vLLM under load: thousands of aborts, a thousand requests at once, clients that go away, two data-parallel ranks."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import torch

from attnhook.sinks.jsonl import read_jsonl
from tests import oracle
from tests.backends.vllm.engine import Server, engine_environment, from_entry, needs_vllm, serve
from tests.helpers import ROOT, tiny_model

pytestmark = [pytest.mark.slow, needs_vllm]

T = TypeVar("T")
MB = 2**20
GROWTH = 20 * MB

ABORTED = 10_000
LIMIT = 8  # captures at once
NEW = 6  # tokens of an answer
LAYERS = [3, 20]
ASK = {"return_attention_tokens": True, "attention_layers": LAYERS, "top_k_attention": 8}
LARGE = {**ASK, "attention_layers": "all", "top_k_attention": 32, "attention_prompt": True}  # 10 kB per row
TEXTS = [f"{start} Write {n} words about {thing}." for n, (start, thing) in enumerate([
    ("Please.", "rain"), ("Listen:", "the old harbour and its ships"), ("So", "bread"), ("Dear friend,", "a long walk"),
])]  # fmt: skip


@pytest.mark.long
def test_ten_thousand_aborts_leave_nothing(tmp_path: Path) -> None:
    model = tiny_model(hidden_size=128, num_hidden_layers=4)  # heads of 32, the least that vLLM's CPU kernels take
    model.save_pretrained(tmp_path / "model")
    job = {
        "engine": {
            "model": str(tmp_path / "model"), "dtype": "float32", "enforce_eager": True, "max_model_len": 64,
            "skip_tokenizer_init": True, "disable_log_stats": True, "seed": 0, "max_num_seqs": 64,
            # prompts in chunks; so few blocks that the warm-up touches each, and the cache grows no more
            "max_num_batched_tokens": 64, "long_prefill_token_threshold": 16, "block_size": 32,
            "num_gpu_blocks_override": 200,
        },
        "requests": ABORTED, "wave": 64, "warm_up": 4000,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "tests.backends.vllm.aborting", str(tmp_path / "job.json"), str(tmp_path / "out")]
    environ = engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    seen, resident = result["seen"], result["resident"]
    print(seen, [f"{size / MB:.1f}" for size in resident])
    aborts = ("before its first step", "in the middle of its prompt", "without a token", "after a token")
    assert all(seen[when] > ABORTED // 50 for when in aborts) and sum(seen[when] for when in aborts) == ABORTED
    assert seen["records"] > ABORTED and seen["errors"] == 0 and result["after"] == 8
    assert result["kept"] == []
    # 6,000 requests, whose records alone were more than 40 MB: half of it is for the allocator
    assert len(resident) == 5 and max(resident[1:]) - resident[0] < GROWTH, resident


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    reply = await client.post("/v1/completions", json=body)
    return reply.status_code, reply.json()


def together(server: Server, bodies: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Status and JSON of as many requests at once."""

    async def run(client: httpx.AsyncClient) -> list[tuple[int, dict[str, Any]]]:
        return await asyncio.gather(*(post(client, body) for body in bodies))

    return talk(server, run)


def talk(server: Server, run: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def main() -> T:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False) as client:
            return await run(client)

    return asyncio.run(main())


def completion(text: str, new: int = NEW, **fields: Any) -> dict[str, Any]:
    settings = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "smol", "prompt": text, **settings, **fields}


def check_all(smol: Any, replies: Sequence[dict[str, Any]], new: int = NEW) -> None:
    """Every record of every reply against eager attention; equal token ids share the oracle's pass."""
    rows: dict[tuple[int, ...], list[Any]] = defaultdict(list)
    for reply in replies:
        choice = reply["choices"][0]
        assert "attention_error" not in choice, choice["attention_error"]
        prompt, output = choice["prompt_token_ids"], choice["token_ids"]
        entries = choice["attention_tokens"]
        assert [entry["decode_step"] for entry in entries] == list(range(new))
        assert [entry["query_position"] for entry in entries] == list(range(len(prompt) - 1, len(prompt) + new - 1))
        assert all(list(entry["layers"]) == [str(layer) for layer in LAYERS] for entry in entries)
        rows[tuple([*prompt, *output][:-1])] += [from_entry(entry) for entry in entries]
    for ids, records in rows.items():
        worst = oracle.compare(records, oracle.eager_attention(smol, torch.tensor([ids])), top_k=8)
        print(len(ids), worst)
        oracle.check(worst)


def resident(server: Server) -> int:
    """Bytes of the server's processes together."""
    process = psutil.Process(server.process.pid)
    total: int = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    return total


@pytest.mark.long
@pytest.mark.model
def test_two_data_parallel_ranks(smol: Any, smol_path: str, tmp_path: Path) -> None:
    """Without a limit: every request gets its records, from the rank that served it; sinks get each record once."""
    count, sink = 200, tmp_path / "sink.jsonl"
    flags = ["--data-parallel-size", "2", "--api-server-count", "1", "--max-num-seqs", "8"]
    with serve(tmp_path, smol_path, *flags, OMP_NUM_THREADS="1", ATTNHOOK_SINKS=f"jsonl:{sink}") as running:
        found = together(running, [completion(TEXTS[n % 4], **ASK) for n in range(count)])
        assert [status for status, _ in found] == [200] * count
        replies = [reply for _, reply in found]
        check_all(smol, replies)
        metrics = httpx.get(running.url + "/metrics", trust_env=False).text
        served = re.findall(r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\d+)', metrics)
        print(served)
        assert sorted(rank for rank, _ in served) == ["0", "1"]
        assert all(int(number) > count // 10 for _, number in served)
        lines: list[tuple[str, int]] = []
        until = time.monotonic() + 20
        while len(lines) < count * NEW and time.monotonic() < until:
            read = read_jsonl(sink, tolerate_torn_tail=True)
            lines = [(line["request_id"], line["query_position"]) for line in read]
            time.sleep(0.2)
    assert len(lines) == count * NEW
    wanted = Counter(
        (reply["id"], e["query_position"]) for reply in replies for e in reply["choices"][0]["attention_tokens"]
    )
    ids = {name: next(reply["id"] for reply in replies if reply["id"] in name) for name in {name for name, _ in lines}}
    assert Counter((ids[name], position) for name, position in lines) == wanted


@pytest.fixture(scope="module")
def limited(smol_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # so few blocks that each has been used, and the cache grows no more, when memory is looked at
    flags = ["--attention-tokens-max-concurrent", str(LIMIT), "--num-gpu-blocks-override", "32"]
    with serve(tmp_path_factory.mktemp("limited"), smol_path, *flags) as running:
        yield running


def all_places_are_free(server: Server) -> None:
    """As many captures as there are places are let in at once; they are long enough to overlap."""
    until = time.monotonic() + 20
    while True:
        statuses = [status for status, _ in together(server, [completion("hi", 40, **ASK)] * LIMIT)]
        if statuses == [200] * LIMIT:
            return
        assert time.monotonic() < until, f"not all places are free again: {statuses}"
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.model
def test_a_thousand_at_once(limited: Server, smol: Any) -> None:
    asking = [completion(TEXTS[n % 4], **ASK) for n in range(1000)]
    plain = [completion(TEXTS[n % 4]) for n in range(40)]
    alone = [limited.post("/v1/completions", body)[1]["choices"][0] for body in plain[:4]]
    mixed = [body for n, body in enumerate(asking) for body in ([body, plain[n // 25]] if n % 25 == 24 else [body])]
    found = together(limited, mixed)
    assert Counter("return_attention_tokens" in body for body in mixed) == {True: 1000, False: 40}
    replies = []
    for body, (status, reply) in zip(mixed, found, strict=True):
        if "return_attention_tokens" not in body:
            before = alone[TEXTS.index(body["prompt"])]
            assert status == 200 and "attention_tokens" not in reply["choices"][0], reply
            assert reply["choices"][0]["text"] == before["text"]
        elif status == 200:
            replies.append(reply)
        else:
            error = reply["error"]
            assert status == 429 and error["param"] == "return_attention_tokens", reply
            assert f"return_attention_tokens=true: {LIMIT} requests" in error["message"], error
    print(f"{len(replies)} of 1000 were let in")
    assert LIMIT <= len(replies) < 1000
    check_all(smol, replies)
    all_places_are_free(limited)


@pytest.mark.long
@pytest.mark.model
def test_clients_that_go_away(limited: Server) -> None:
    """Streams closed after their first chunk, or before it."""

    async def leave(client: httpx.AsyncClient, n: int, seen: Counter[str]) -> int:
        body = completion(TEXTS[n % 4], 400, stream=True, **LARGE)
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            seen[str(reply.status_code)] += 1
            if reply.status_code == 200 and n % 3:
                async for line in reply.aiter_lines():
                    seen["with records"] += '"attention_tokens":[{' in line
                    break
            return reply.status_code

    def many(count: int) -> Counter[str]:
        seen: Counter[str] = Counter()

        async def run(client: httpx.AsyncClient) -> None:
            busy = asyncio.Semaphore(LIMIT - 2)  # the server notices a closed stream a little later

            async def one(n: int) -> None:
                until = time.monotonic() + 60
                while time.monotonic() < until:
                    async with busy:
                        status = await leave(client, n, seen)
                    if status != 429:
                        return
                    await asyncio.sleep(0.05)

            await asyncio.gather(*(one(n) for n in range(count)))

        talk(limited, run)
        all_places_are_free(limited)
        return seen

    many(60)
    # The allocator takes a few rounds to have its fill (16, 11, 0, 18, 4, 3, 3, 0 MB were seen); a leak would show
    # in each: the records of a round's prompts alone are more than 25 MB.
    grown: list[float] = []
    while not grown or (min(grown) > 6 and len(grown) < 8):
        before = resident(limited)
        seen = many(200)
        assert seen["200"] == 200 and seen["with records"] > 100
        grown.append((resident(limited) - before) / MB)
        print(seen, f"{grown[-1]:+.1f} MB")
    assert min(grown) <= 6, grown
