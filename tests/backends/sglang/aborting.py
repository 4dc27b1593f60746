"""Aborts requests of one SGLang engine, looks for what stays: `python -m tests.backends.sglang.aborting JOB OUT`.

JOB is JSON: ``engine`` (arguments of Engine), ``requests`` (how many), ``at_once``, ``warm_up`` (requests before the
first look). OUT gets the resident bytes of all processes at each look, what the requests got before they ended, the
requests that the front end still knows when all are gone, and how many entries one more request gets.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.backends.vllm.aborting import asking

LOOKS = 4  # after the warm-up's
SAMPLING = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}


def main(job: dict[str, Any]) -> dict[str, Any]:
    import sglang

    engine = sglang.Engine(**job["engine"])
    try:
        return engine.loop.run_until_complete(all_of(engine, job))
    finally:
        engine.shutdown()


async def all_of(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    draw, seen = random.Random(0), Counter[str]()
    total, warm_up = job["requests"], job["warm_up"]
    room = asyncio.Semaphore(job["at_once"])
    resident: list[int] = []

    async def one(n: int) -> None:
        async with room:
            await leave(engine, draw, n, seen)

    bounds = [0, warm_up, *(warm_up + (total - warm_up) * look // LOOKS for look in range(1, LOOKS + 1))]
    for start, end in itertools.pairwise(bounds):
        await asyncio.gather(*(one(n) for n in range(start, end)))
        resident.append(footprint())
    until = asyncio.get_running_loop().time() + 60
    while engine.tokenizer_manager.rid_to_state and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.1)
    last = await engine.async_generate(input_ids=[5, 6, 7], sampling_params={**SAMPLING, "custom_params": asking(2)})
    kept = sorted(engine.tokenizer_manager.rid_to_state)
    after = len(last["meta_info"]["attention_tokens"])
    return {"resident": resident, "seen": dict(seen), "kept": kept, "after": after}


async def leave(engine: Any, draw: random.Random, n: int, seen: Counter[str]) -> None:
    """Ask, and abort after none, one or two of the eight tokens."""
    rid, stay = f"load-{n}", draw.choice((0, 1, 1, 2))
    ids = [draw.randrange(3, 90) for _ in range(40 if n % 4 == 0 else draw.randrange(1, 12))]
    params = {**SAMPLING, "custom_params": asking(n)}
    stream = await engine.async_generate(input_ids=ids, sampling_params=params, rid=rid, stream=True)
    if stay == 0:
        # as soon as it is on its way
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.002 * draw.random())
        engine.tokenizer_manager.abort_request(rid)
        results = [await first, *[result async for result in stream]]
    else:
        results = []
        async for result in stream:
            results.append(result)
            if len(results) == stay:
                engine.tokenizer_manager.abort_request(rid)
    meta = results[-1]["meta_info"]
    seen["without a token" if not results[-1]["output_ids"] else "after a token"] += 1
    seen["records"] += len(meta.get("attention_tokens", ()))
    seen["errors"] += "attention_error" in meta
    seen["aborted"] += (meta["finish_reason"] or {}).get("type") == "abort"


def footprint() -> int:
    process = psutil.Process()
    total: int = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    return total


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
