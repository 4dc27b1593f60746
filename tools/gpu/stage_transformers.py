"""Transformers on the device: exact with sdpa and flex attention, and what a long context costs in time and memory."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

from tools.gpu.engines import BOUNDS, TOP_K, prompts
from tools.gpu.model import REHEARSED, SIZE, make
from tools.gpu.stage import Context, begin

LONG = 32_768


def run(context: Context) -> None:
    """Exactness first, then the long context."""
    import torch
    from transformers import AutoModelForCausalLM

    long = 512 if context.rehearse else LONG
    folder = make(context.scratch / "model", device=context.device, rehearse=context.rehearse, positions=long + 64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(context.device).eval()
    size = REHEARSED if context.rehearse else SIZE
    ids = prompts(size["vocab_size"], 90 if context.rehearse else 1500)[3]
    for attention in ("sdpa", "flex_attention"):
        exact(context, model, ids, attention)
    model = model.to(torch.bfloat16)
    expensive(context, model, size["vocab_size"], long)


def exact(context: Context, model: Any, ids: list[int], attention: str) -> None:
    """Every row of every layer against eager attention, float32."""
    import torch

    import attnhook
    from tests import oracle

    found, tokens = context.findings, torch.tensor([ids], device=context.device)
    model.set_attn_implementation(attention)
    try:
        with attnhook.capture(layers="all", prompt=True, top_k=TOP_K) as records, torch.no_grad():
            output = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
    except Exception as error:
        if context.rehearse and type(error).__name__ == "InductorError":
            found.see(f"{attention}: not rehearsed, torch {torch.__version__} cannot compile it for this CPU", "")
            return
        found.must(f"{attention}: runs", False, f"{type(error).__name__}: {error}"[:300])
        return
    matrices = oracle.eager_attention(model, output[:, :-1])
    rows = sorted(records, key=lambda record: record.query_position)
    whole = [record.query_position for record in rows] == list(range(len(ids) + 5))
    found.must(f"{attention}: every row is there, once", whole, len(rows), str(len(ids) + 5))
    worst = oracle.compare(rows, {layer: matrix.cpu() for layer, matrix in matrices.items()}, top_k=TOP_K)
    most, features = BOUNDS["float32"]
    found.must(
        f"{attention}: probabilities against eager float32",
        0 < worst.probability <= most,
        f"{worst.probability:.1e}",
        f"<= {most:g}",
    )
    found.must(
        f"{attention}: fingerprints against eager float32",
        0 < worst.feature <= features,
        f"{worst.feature:.1e}",
        f"<= {features:g}",
    )


def expensive(context: Context, model: Any, vocabulary: int, long: int) -> None:
    """Time and peak memory of a long prompt and some tokens, by what is captured, in turn."""
    import torch

    import attnhook

    found, cuda = context.findings, context.device == "cuda"
    tokens = torch.tensor([[(7919 * n) % (vocabulary - 3) + 3 for n in range(long)]], device=context.device)
    model.set_attn_implementation("sdpa")
    modes: dict[str, dict[str, Any] | None] = {
        "sdpa": None,
        "last layer": {"layers": "last"},
        "all layers": {"layers": "all"},
        "last layer, prompt rows": {"layers": "last", "prompt": True},
        "all layers, prompt rows": {"layers": "all", "prompt": True},
    }
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    memory: dict[str, int] = {}
    for turn in range(3):  # the first compiles
        for mode, options in modes.items():
            if turn and context.left < 12:
                break
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            capture: Any = nullcontext([]) if options is None else attnhook.capture(top_k=32, **options)
            with capture as records, torch.no_grad():
                model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, min_new_tokens=8, do_sample=False
                )
            if cuda:
                torch.cuda.synchronize()
                memory[mode] = torch.cuda.max_memory_allocated()
            if turn:
                times[mode].append(time.perf_counter() - began)
            if options is not None and not turn:
                rows = 8 + (long - 1 if options.get("prompt") else 0)
                found.must(f"{long:,} tokens, {mode}: rows", len(records) == rows, len(records), str(rows))
    lines = ["| captured | time / sdpa | peak memory / sdpa |", "| --- | --- | --- |"]
    for mode in modes:
        if not times[mode] or not times["sdpa"]:
            continue
        ratio = statistics.median(times[mode]) / statistics.median(times["sdpa"])
        held = f"{memory[mode] / memory['sdpa']:.2f}" if cuda else "not counted on a CPU"
        lines.append(f"| {mode} | {ratio:.2f} | {held} |")
    found.table(f"{long:,} tokens and 8 new ones, bfloat16, top k 32", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(begin(run))
