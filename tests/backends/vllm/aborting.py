"""Aborts many requests inside one vLLM and looks for what stays: `python -m tests.backends.vllm.aborting JOB OUT`.

JOB is JSON: ``engine`` (arguments of EngineArgs), ``requests`` (how many), ``wave`` (how many at a time),
``warm_up`` (requests before the first look). OUT gets the resident bytes at each look, what the requests got
before they ended, and whatever still names one of them when all are gone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

PREFIX = "load-"  # of the request ids, so that what keeps one can be found
LOOKS = 4  # after the warm-up's
LONG = 40  # prompt tokens that take several chunks, and so can be aborted between two
STEPS = 20  # in which every request of a wave gets its tokens
SAMPLING = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "detokenize": False}


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**job["engine"]))

    def add(request: str, ids: list[int], n: int) -> None:
        params = SamplingParams(**SAMPLING, extra_args=asking(n))  # type: ignore[arg-type]
        engine.add_request(request, {"prompt_token_ids": ids}, params)

    draw = random.Random(0)
    seen: Counter[str] = Counter()
    resident: list[int] = []
    total, started = job["requests"], 0
    looks = [job["warm_up"] + (total - job["warm_up"]) * n // LOOKS for n in range(LOOKS + 1)]
    while started < total:
        wave = range(started, min(started + job["wave"], total))
        for n in wave:
            add(f"{PREFIX}{n}", prompt(draw, n), n)
        run(engine, {f"{PREFIX}{n}": draw.choice((0, 1, 1, 2)) for n in wave}, seen)
        started = wave.stop
        if looks and started >= looks[0]:
            resident.append(footprint())
            looks.pop(0)
    add("after", [5, 6, 7], 0)
    after = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            after = len(getattr(output.outputs[0], "attention_tokens", ()))
    return {"resident": resident, "seen": dict(seen), "kept": sorted(kept()), "after": after}


def asking(n: int) -> dict[str, Any]:
    return {
        "return_attention_tokens": True,
        "attention_layers": ("all", "auto", "last")[n % 3],
        "attention_prompt": n % 2 == 0,
        "top_k_attention": 8,
    }


def prompt(draw: random.Random, n: int) -> list[int]:
    return [draw.randrange(3, 90) for _ in range(LONG if n % 4 == 0 else draw.randrange(1, 12))]


def run(engine: Any, ends: dict[str, int], seen: Counter[str]) -> None:
    """Abort each request after its number of tokens; those of none before or in the middle of their prompt."""

    def abort(requests: list[str], when: str) -> None:
        engine.abort_request(requests)
        seen[when] += len(requests)
        for request in requests:
            del ends[request]

    abort([request for i, request in enumerate(ends) if i % 16 == 15], "before its first step")
    scheduler = engine.engine_core.engine_core.scheduler
    for _ in range(STEPS):
        for output in engine.step():
            choice = output.outputs[0]
            if output.request_id in ends and len(choice.token_ids) >= ends[output.request_id] > 0:
                got = [*getattr(choice, "attention_tokens", ()), *getattr(choice, "prompt_attention_tokens", ())]
                seen["records"] += len(got)
                seen["errors"] += getattr(choice, "attention_error", None) is not None
                abort([output.request_id], "after a token")
        inside = [r for r in scheduler.running if 0 < r.num_computed_tokens < r.num_prompt_tokens]
        names = {request.request_id.rsplit("-", 1)[0] for request in inside}  # without vLLM's suffix
        abort(sorted(name for name in names if ends.get(name) == 0), "in the middle of its prompt")
        if not any(ends.values()):
            break
    abort(list(ends), "without a token")
    assert not engine.has_unfinished_requests()
    engine.step()  # the worker is told of the last ones in a step that computes nothing


def footprint() -> int:
    """Resident bytes of this process, without what Python and the allocator merely have not given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident: int = psutil.Process().memory_info().rss
    return resident


def kept() -> Iterator[str]:
    """Every object of this process, ours or the engine's, in which a request's id is still to be found."""
    gc.unfreeze()  # vLLM hides what it made at start from the collector
    gc.collect()
    for holder in gc.get_objects():
        untracked = [r for r in gc.get_referents(holder) if type(r) in (dict, tuple) and not gc.is_tracked(r)]
        for container in (holder, *untracked):  # a dict of str to int, for one, is not tracked
            texts = gc.get_referents(container)
            if issubclass(type(container), dict):
                texts += dict.keys(container)  # which are not told where all are str
            names = [text for text in texts if type(text) is str and text.startswith(PREFIX) and text != PREFIX]
            if names:
                yield f"{len(names)} in {type(container).__name__} in {type(holder).__name__}: {names[:3]}"


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
