"""Other launch shapes of the Triton kernels that read keys, timed in turn: which one is fastest on this GPU.

    python -m benchmarks.kernel_variants [--rounds 7] [--json FILE]

Decoding and a tile of prompt rows, bfloat16, cold caches. Each variant changes what `launch_shape` chose; its result
must be the chosen one's. Needs a GPU; with TRITON_INTERPRET=1 it runs on a CPU at a size that shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import benchmarks.bare  # noqa: F401 - before attnhook

# isort: split
from attnhook.kernels.topk import LayerRows, Selection, Softmax, TopK
from attnhook.kernels.topk.triton import kernel, plan
from benchmarks.kernel_rivals import Inputs, Size, make_inputs
from benchmarks.kernels import clock, name_of

#: What a number of a launch shape is called in the table.
NAMES = {"num_warps": "{} warps", "num_stages": "{} stages", "BLOCK_N": "blocks of {} keys"}
#: What is changed of `launch_shape`'s choice; the first is the choice itself.
DECODING: tuple[dict[str, int], ...] = (
    {}, {"num_warps": 2}, {"num_warps": 8}, {"num_stages": 2}, {"num_stages": 4}, {"BLOCK_N": 32}, {"BLOCK_N": 128},
    {"BLOCK_N": 128, "num_warps": 8}, {"BLOCK_N": 128, "num_stages": 4, "num_warps": 8},
)  # fmt: skip
PROMPT: tuple[dict[str, int], ...] = (
    {}, {"num_warps": 4}, {"BLOCK_N": 32}, {"num_warps": 4, "BLOCK_N": 32}, {"num_stages": 2}, {"num_stages": 4},
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    sizes = [Size(8, 4096, 32, 8, 128), Size(8, 32_768, 32, 8, 128)] if gpu else [Size(2, 64, 4, 2, 16)]
    found: list[dict[str, Any]] = []
    for size in sizes:
        found += measure(str(size), make_inputs(size, device), DECODING, options.rounds)
    size, rows = (Size(1, 8192, 32, 8, 128), 512) if gpu else (Size(1, 64, 4, 2, 16), 8)
    found += measure(f"{rows} prompt rows, {size}", prompt(make_inputs(size, device), rows), PROMPT, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found, name_of(device)))


def prompt(inputs: Inputs, rows: int) -> Inputs:
    """The last rows of one request, as a prompt is computed."""
    generator = torch.Generator(inputs.q.device).manual_seed(1)
    shape = rows, inputs.size.heads, inputs.size.dim
    q = 3 * torch.randn(*shape, generator=generator, device=inputs.q.device)
    positions = torch.arange(inputs.size.keys - rows, inputs.size.keys, dtype=torch.int32, device=q.device)
    return replace(inputs, q=q.to(torch.bfloat16), rows=torch.zeros_like(positions), positions=positions)


def measure(what: str, inputs: Inputs, variants: tuple[dict[str, int], ...], rounds: int) -> list[dict[str, Any]]:
    """Every variant in turn, round by round; one that does not compile is told."""
    flush = torch.zeros(64 << 20 if inputs.q.is_cuda else 8 << 20, device=inputs.q.device)
    chosen = inputs.ours(32) if inputs.q.is_cuda else call(inputs)
    methods: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        name = ", ".join(NAMES[key].format(value) for key, value in variant.items()) or "as chosen"
        method = shaped(inputs, variant)
        try:
            check(method(), chosen)
        except Exception as error:  # too much shared memory, or not for this shape
            failed[name] = f"{type(error).__name__}: {error}"[:120]
            continue
        methods[name] = method
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(1e3 * clock(method, inputs.q.device, flush))
    told = [{"what": what, "variant": name, "ms": taken} for name, taken in times.items()]
    return told + [{"what": what, "variant": name, "ms": [], "error": error} for name, error in failed.items()]


def call(inputs: Inputs) -> TopK:
    """The Triton kernel, whatever the device."""
    layer = LayerRows(inputs.q, inputs.paged, inputs.positions, Softmax(inputs.size.dim**-0.5))
    return kernel.topk_attention(layer, inputs.rows, Selection(32))


def shaped(inputs: Inputs, variant: dict[str, int]) -> Callable[[], TopK]:
    """The same call with another launch shape."""
    original = plan.launch_shape

    def launch_shape(*arguments: Any) -> dict[str, Any]:
        return {**original(*arguments), **variant}

    def method() -> TopK:
        with mock.patch.object(kernel, "launch_shape", launch_shape):
            return call(inputs)

    return method


def check(got: TopK, chosen: TopK) -> None:
    """Raise ArithmeticError where a variant computes something else."""
    far = float((got.scores - chosen.scores).abs().max())
    if not far < 1e-5:
        raise ArithmeticError(f"scores differ by {far:.1e}")


def table(found: list[dict[str, Any]], device: str) -> str:
    """Markdown: milliseconds by variant, and over the choice's."""
    lines = [device, "", "| size | variant | ms, median (range) | over the choice |", "| --- | --- | --- | --- |"]
    for one in found:
        if not one["ms"]:
            lines.append(f"| {one['what']} | {one['variant']} | {one['error']} | |")
            continue
        base = next(x["ms"] for x in found if x["what"] == one["what"] and x["ms"])
        median = statistics.median(one["ms"])
        lines.append(
            f"| {one['what']} | {one['variant']} | {median:.3g} ({min(one['ms']):.3g} to {max(one['ms']):.3g}) | "
            f"{median / statistics.median(base):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
