"""Runs vLLM offline in this process and writes what it captured: `python -m tests.backends.vllm.offline JOB OUT`.

JOB is JSON: ``engine`` (arguments of LLM), ``batches`` of requests (``ids``, ``sampling``, ``fields``, and the folder
of a LoRA ``adapter``), a generate call each; with ``uninstall``, what is left of attnhook afterwards. OUT gets JSON:
token ids, and records in hexadecimal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from attnhook import OptionError

    llm = LLM(**job["engine"])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    whole = scheduler._preempt_request

    def preempt(request: Any, *arguments: Any, **options: Any) -> Any:
        preempted.append(request.request_id)
        return whole(request, *arguments, **options)

    scheduler._preempt_request = preempt
    replies: list[dict[str, Any]] = []
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": request["ids"]} for request in batch]
        params = [
            SamplingParams(**{"temperature": 0.0, **request["sampling"]}, extra_args=request["fields"] or None)
            for request in batch
        ]
        adapters = [adapter(request) for request in batch]
        try:
            results = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        except OptionError as error:
            replies.append({"refused": str(error)})
            continue
        for result in results:
            replies.append(
                {
                    "cached": result.num_cached_tokens,
                    "choices": [choice(output) for output in result.outputs],
                }
            )
    result: dict[str, Any] = {"replies": replies, "preempted": preempted}
    if job.get("uninstall"):
        result["left"] = left_after_uninstall()
        output = llm.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)[0].outputs[0]
        result["afterwards"] = {"ids": list(output.token_ids), "asked": hasattr(output, "attention_tokens")}
    return result


def left_after_uninstall() -> list[str]:
    """Places in vLLM's modules, classes and live objects where something of attnhook's is after its uninstall()."""
    import gc
    import types

    import attnhook

    attnhook.uninstall()
    gc.unfreeze()  # vLLM freezes what it starts with, and get_objects() leaves that out
    gc.collect()

    def ours(value: Any) -> bool:
        if isinstance(value, classmethod | staticmethod | types.MethodType):
            value = value.__func__
        return isinstance(value, types.FunctionType) and folder in value.__code__.co_filename

    folder = f"{Path(attnhook.__file__).parent}/"
    found = []
    for thing in gc.get_objects():
        if str(getattr(type(thing), "__module__", "")).startswith("attnhook"):
            continue
        owner = getattr(thing, "__module__", None) if isinstance(thing, type) else type(thing).__module__
        if not str(owner).startswith("vllm") and not isinstance(thing, type(gc)):
            continue
        try:
            values = dict(vars(thing))
        except TypeError:
            continue
        if str(values.get("__name__", "")).startswith("attnhook"):
            continue
        found += [
            f"{thing!r:.80}.{name}" for name, value in values.items() if name.startswith("_attnhook") or ours(value)
        ]
    return found


def adapter(request: dict[str, Any]) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, request["adapter"]) if "adapter" in request else None


def choice(output: Any) -> dict[str, Any]:
    mass = getattr(output, "attention_key_mass", None)
    return {
        "ids": list(output.token_ids),
        "logprobs": None if output.logprobs is None else [
            {str(token): value.logprob for token, value in step.items()} for step in output.logprobs
        ],
        "asked": hasattr(output, "attention_tokens"),
        "generated": [record.to_bytes().hex() for record in getattr(output, "attention_tokens", [])],
        "prompt": [record.to_bytes().hex() for record in getattr(output, "prompt_attention_tokens", [])],
        "error": getattr(output, "attention_error", None),
        "check": getattr(output, "attention_self_check", None),
        "key_mass": None if mass is None else mass.to_list(),
    }  # fmt: skip


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
