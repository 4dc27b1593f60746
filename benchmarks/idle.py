"""What attnhook's hooks cost a vLLM engine in which nobody asks: the time inside them, clocked in the engine.

Two runs of one server differ by more than the 1% that is allowed here (`benchmarks.overhead` shows by how much), so
each hooked function is clocked from without and from within, where the engine's own begins. What lies between is
attnhook's, the clocks included, so the figure is an upper bound. Runs the engine in this process.

    python -m benchmarks.idle
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module, metadata
from typing import Any

# read when vLLM is imported
os.environ.update(
    {
        "ATTNHOOK": "0",  # its hooks come when everything is clocked from within
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
)

PER_STEP = (
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.output_processor",
    "vllm.outputs",
)
ONCE = ("initialize_kv_cache", "load_model", "__init__")


class Clock:
    """Seconds and calls of the functions that it was put around."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, clocked."""

        @wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return clocked


def main() -> None:
    """Run rounds of decoding with nobody asking and print the share of the hooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=513)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.model is None:
        from attnhook.backends.transformers.default_model import default_model_path

        options.model = str(default_model_path())
    within, without = Clock(), Clock()
    llm = hooked(options.model, within, without)
    print(
        f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new; vllm {metadata.version('vllm')}, "
        f"{os.cpu_count()} cores; {options.rounds} rounds\n"
    )
    print("| batch | hooked calls per token | microseconds per step, at most | share of the engine's time, at most |")
    print("| --- | --- | --- | --- |")
    for batch in options.batch:
        shares, costs, calls = [], [], 0.0
        for turn in range(options.rounds + 1):
            whole, ours, calls = generate(llm, options, batch, within, without)
            if turn:  # the first fills the prefix cache
                shares.append(ours / whole)
                costs.append(ours / options.new_tokens * 1e6)
        print(
            f"| {batch} | {calls / options.new_tokens / batch:.0f} | {statistics.median(costs):.0f} | "
            f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}) |"
        )


def hooked(model: str, within: Clock, without: Clock) -> Any:
    """An engine with attnhook's hooks between two clocks."""
    from vllm import LLM
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    import attnhook
    from attnhook.backends.vllm import _HOOKS

    places = {
        (getattr(import_module(module), owner), name)
        for module in PER_STEP
        for owner, name, _ in _HOOKS[module]
        if name not in ONCE
    }
    for owner, name in (*places, (CPUAttentionBackendImpl, "forward")):
        setattr(owner, name, within.around(getattr(owner, name)))
    attnhook.install()
    for owner, name in places:
        setattr(owner, name, without.around(getattr(owner, name)))
    llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=2048, seed=0)
    worker = llm.llm_engine.model_executor.driver_worker.worker.model_runner.__dict__["_attnhook"]
    for _, layer in worker.layers.values():
        layer.impl.forward = without.around(layer.impl.forward)
    return llm


def generate(
    llm: Any, options: argparse.Namespace, batch: int, within: Clock, without: Clock
) -> tuple[float, float, int]:
    """Seconds of a round, those that are attnhook's, and hooked calls."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * n + i) % 1000 + 5 for i in range(options.prompt_tokens)]} for n in range(batch)
    ]
    params = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True, temperature=0.0)
    within.seconds = without.seconds = 0.0
    within.calls = without.calls = 0
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    whole = time.perf_counter() - start
    if within.calls != without.calls:
        raise SystemExit(f"{without.calls} hooked calls reached the engine {within.calls} times: a hook is not clocked")
    return whole, without.seconds - within.seconds, without.calls


if __name__ == "__main__":
    main()
