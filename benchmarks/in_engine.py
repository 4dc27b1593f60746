"""What attnhook costs an engine: the time inside its hooks, clocked in the engine, idle and while capturing.

Two runs of one server differ by more than the 1% that is allowed to idle hooks (`benchmarks.overhead` shows by how
much), so each hooked function is clocked from without and from within, where the engine's own begins. What lies
between is attnhook's and the clocks'. A third clock, right within the second, tells in the same calls what a clock
itself costs, which is taken off. So it is the share of tokens per second that is lost, but for what capture does to
the processor's caches. Hooks of the process where the model runs (vLLM's
engine core, SGLang's scheduler) hold a step up; a server's front end is another process, on another core, and has its
own column (vLLM only).

    python -m benchmarks.in_engine [--engine sglang]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.clock import Clock

CORE = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.core.sched.scheduler")
FRONT_END = ("vllm.v1.engine.input_processor", "vllm.v1.engine.output_processor", "vllm.outputs")
ONCE = ("initialize_kv_cache", "load_model", "__init__")
HEADS = {"attention_per_head": ["spans", "top"], "attention_spans": {"start": [0, 64], "middle": [64, 400]}}
#: mode -> what a request asks for
MODES: dict[str, dict[str, Any]] = {
    "idle": {},
    "last layer": {"attention_layers": "last"},
    "4 layers": {"attention_layers": "auto"},
    "all layers": {"attention_layers": "all"},
    "last layer, heads": {"attention_layers": "last", **HEADS},
    "all layers, heads": {"attention_layers": "all", **HEADS},
    "all layers, key mass": {"attention_layers": "all", "attention_key_mass": "mean"},
}
USUAL = list(MODES)[:4]


class Reading(NamedTuple):
    """Sums of the clocks: seconds in the engine's own functions and in a clock, in the hooked ones, calls of both."""

    within: float
    without: float
    calls_within: float
    calls: float
    front_end: float = 0.0  # seconds of ours there


class Vllm:
    """An engine of vLLM in this process, with attnhook's hooks between two clocks."""

    def __init__(self, model: str) -> None:
        os.environ.update(  # read when vLLM is imported
            {
                "ATTNHOOK": "0",  # its hooks come when everything is clocked from within
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
            }
        )
        from vllm import LLM
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        import attnhook
        from attnhook.backends.vllm import HOOKS as table

        self._within, self._without = within, without = Clock(), Clock()
        self._front = Clock(), Clock()

        def places(modules: tuple[str, ...]) -> set[tuple[Any, str]]:
            split = (place.partition(":") for hook in table.hooks for place in hook.places)
            hooked = ((module, *path.split(".")) for module, _, path in split if module in modules)
            return {(getattr(import_module(module), owner), name) for module, owner, name in hooked if name not in ONCE}

        core, front_end = places(CORE), places(FRONT_END)
        self._innermost = Clock()
        engine_own = {*core, (CPUAttentionBackendImpl, "forward")}
        for clock, some in ((self._innermost, engine_own), (within, engine_own), (self._front[0], front_end)):
            for owner, name in some:
                setattr(owner, name, clock.around(getattr(owner, name)))
        attnhook.install()
        for clock, some in ((without, core), (self._front[1], front_end)):
            for owner, name in some:
                setattr(owner, name, clock.around(getattr(owner, name)))
        self._llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=2048, seed=0)
        worker = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.__dict__["_attnhook"]
        for _, layer in worker.adapter.layers.values():
            layer.impl.forward = without.around(layer.impl.forward)

    def generate(self, prompts: list[list[int]], new: int, fields: dict[str, Any]) -> int:
        """Answer the prompts at once; how many tokens came with their attention."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, extra_args=fields or None)
        found = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(getattr(result.outputs[0], "attention_tokens", ())) for result in found)

    def read(self) -> Reading:
        """The clocks so far."""
        inner, outer = self._front
        return Reading(
            self._within.seconds + (self._within.seconds - self._innermost.seconds),
            self._without.seconds,
            self._within.calls + inner.calls,
            self._without.calls + outer.calls,
            outer.seconds - inner.seconds,
        )

    def close(self) -> None:
        """Nothing is to be ended: the engine lives in this process."""


class Sglang:
    """An engine of SGLang, whose scheduler, a process of its own, has the clocks (`benchmarks.sglang_clocks`)."""

    def __init__(self, model: str) -> None:
        import sglang

        self._engine = sglang.Engine(
            model_path=model, device="cpu", attention_backend="torch_native", sampling_backend="pytorch",
            grammar_backend="none", dtype="float32", context_length=2048, max_total_tokens=8192,
            max_running_requests=8, sleep_on_idle=True, log_level="warning",
        )  # fmt: skip
        self._shared = np.memmap(os.environ["IDLE_CLOCKS"], dtype=np.float64, mode="r", shape=(5,))

    def generate(self, prompts: list[list[int]], new: int, fields: dict[str, Any]) -> int:
        """Answer the prompts at once; how many tokens came with their attention."""
        params = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0.0, "custom_params": fields or None}
        found = self._engine.generate(input_ids=prompts, sampling_params=params)
        return sum(len(result["meta_info"].get("attention_tokens", ())) for result in found)

    def read(self) -> Reading:
        """The clocks after the last pass."""
        within, without, calls_within, calls, innermost = (float(value) for value in self._shared)
        return Reading(within + (within - innermost), without, calls_within, calls)

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()


def again_for_sglang() -> int:
    """Run this benchmark in a process that finds the kernel package's stand-in, as its own processes do then too."""
    from benchmarks.overhead import ENGINES

    with tempfile.TemporaryDirectory() as folder:
        clocks = Path(folder) / "clocks"
        np.zeros(5).tofile(clocks)
        environ = {**os.environ, **ENGINES["sglang"].environ}
        environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(Path(__file__).parents[1])])
        environ.update(ATTNHOOK="1", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore", IDLE_CLOCKS=str(clocks))
        environ["IDLE_IMPORT"] = "benchmarks.sglang_clocks"
        return subprocess.run([sys.executable, "-m", "benchmarks.in_engine", *sys.argv[1:]], env=environ).returncode


def main() -> None:
    """Run rounds of decoding in every mode and print the share of the hooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=513)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=USUAL)
    options = parser.parse_args()
    if options.model is None:
        from attnhook.backends.transformers.default_model import default_model_path

        options.model = str(default_model_path())
    if options.engine == "sglang" and "IDLE_CLOCKS" not in os.environ:
        raise SystemExit(again_for_sglang())
    engine: Vllm | Sglang = Vllm(options.model) if options.engine == "vllm" else Sglang(options.model)
    try:
        measure(engine, options)
    finally:
        engine.close()


def measure(engine: Vllm | Sglang, options: argparse.Namespace) -> None:
    """Run the rounds and print the table in Markdown."""
    print(
        f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new; {options.engine} "
        f"{metadata.version(options.engine)}, torch {metadata.version('torch')}, {os.cpu_count()} cores, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads; {options.rounds} interleaved rounds, "
        f"top_k {options.top_k}\n"
    )
    found: dict[tuple[int, str], list[tuple[float, float, float, float]]] = {}
    for turn in range(options.rounds + 1):
        for batch in options.batch:
            prompts = [[(7 * n + i) % 1000 + 5 for i in range(options.prompt_tokens)] for n in range(batch)]
            for mode in options.modes:
                one = clocked(engine, prompts, options.new_tokens, mode, options.top_k)
                if turn:  # the first fills the prefix cache
                    found.setdefault((batch, mode), []).append(one)
    print("| mode | batch | hooked calls a token | µs a step | share of the time | front end, µs |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (batch, mode), taken in found.items():
        calls, costs, shares, fronts = zip(*taken, strict=True)
        print(
            f"| {mode} | {batch} | {statistics.median(calls):.0f} | {statistics.median(costs):.0f} | "
            f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}) | "
            f"{statistics.median(fronts):.0f} |"
        )


def clocked(
    engine: Vllm | Sglang, prompts: list[list[int]], new: int, mode: str, top_k: int
) -> tuple[float, float, float, float]:
    """One measurement: hooked calls per token, microseconds per step, share of the time, front end's microseconds."""
    asks = {"return_attention_tokens": True, **MODES[mode], "top_k_attention": top_k}
    before, start = engine.read(), time.perf_counter()
    count = engine.generate(prompts, new, asks if MODES[mode] else {})
    whole, after = time.perf_counter() - start, engine.read()
    expected = new * len(prompts) if MODES[mode] else 0
    if count != expected:
        raise SystemExit(f"{mode}: {count} tokens came with their attention instead of {expected}")
    within, without, calls_within, calls, front_end = (b - a for a, b in zip(before, after, strict=True))
    if calls_within != calls or not calls:
        raise SystemExit(f"{calls:.0f} hooked calls reached the engine {calls_within:.0f} times: a hook is not clocked")
    cost = without - within
    return calls / new / len(prompts), cost / new * 1e6, cost / (whole - front_end), front_end / new * 1e6


if __name__ == "__main__":
    main()
