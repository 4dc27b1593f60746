"""How fast the top-k attention kernel of this device reads keys, beside other ways to the same answer.

    python -m benchmarks.kernels [--out DIR]

Needs torch and numpy, and on a GPU triton; with matplotlib it draws plots. Every round runs all methods of a size in
turn and copies memory in between: the bar is key bytes per second over the copy's bytes (read and written) per second.
On a GPU the caches are overwritten before each run and the kernel is timed by itself and in a CUDA graph. On a CPU with
--threads 1 the clock is the thread's CPU time, which other users of the machine lengthen least. Stops taking new sizes
when --minutes are over. Writes kernels.json, kernels.md and the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import benchmarks.bare  # noqa: F401 - before attnhook

# isort: split
from attnhook.kernels import topk
from benchmarks.kernel_rivals import Inputs, Method, Size, log_sum_exp, make_inputs, rivals

HEADS = ((32, 8, 128), (8, 8, 128), (32, 8, 64), (8, 8, 64))
MLA = ((16, 1, 576), (128, 1, 576))  # a rank's part of the heads, and all
OURS, GRAPH, LSE = "attnhook", "attnhook, in a CUDA graph", "attnhook with the engine's lse"
NAIVE = "naive torch: softmax(QK^T), topk"


@dataclass
class Result:
    """One method at one size."""

    size: Size
    method: str
    seconds: float  # median over the rounds
    fastest: float
    slowest: float
    copy_share: float  # key bytes/s over copied bytes/s of the same rounds
    extra_bytes: int | None  # peak memory beside the inputs
    key_bytes: int


def main() -> None:
    """Measure, print the table in Markdown, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU kernel; default: torch's")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no new size is begun")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1, 64])
    parser.add_argument("--keys", type=int, nargs="+", help="per request; default: 512 to 131072")
    parser.add_argument("--out", type=Path, default=Path("bench-kernels"), help="folder for the results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)

    curves = draw(device, options.out, options.rounds)
    results: list[Result] = []
    left: list[str] = []
    for size in sizes(device, options.batch, options.keys):
        if time.monotonic() > end:
            left.append(f"{size}: no time left")
        elif 3 * size.key_bytes > free_bytes(device):
            left.append(f"{size}: {size.key_bytes >> 20} MiB of keys do not fit")
        else:
            results += measure(size, device, options.top_k, options.rounds)
            print(f"{size}: {results[-1].seconds * 1e3:.3g} ms for the last method", flush=True)
    told = {"device": name_of(device), "threads": torch.get_num_threads(), **versions()}
    text = table(results, told, left, options.top_k)
    data = {**told, "top_k": options.top_k, "results": [asdict(x) for x in results], "left": left, "curves": curves}
    (options.out / "kernels.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (options.out / "kernels.md").write_text(text, encoding="utf-8")
    print("\n" + text)


def sizes(device: torch.device, batches: list[int], lengths: list[int] | None) -> list[Size]:
    """What the bars are about first."""
    if lengths is None:
        lengths = [4096, 131_072, 512, 32_768] if device.type != "cpu" else [4096, 512, 32_768, 131_072]
    return [
        Size(batch, length, *heads) for length in lengths for batch in batches for heads in (*HEADS[:1], *MLA[:1])
    ] + [Size(batch, length, *heads) for length in lengths for batch in batches for heads in (*HEADS[1:], *MLA[1:])]


def measure(size: Size, device: torch.device, top_k: int, rounds: int) -> list[Result]:
    """All methods at one size, in turn."""
    inputs = make_inputs(size, device)
    gpu = device.type != "cpu"
    # float32 logits and probabilities of every head
    fits = 16 * size.batch * size.heads * size.keys < free_bytes(device) // 2
    methods: dict[str, Method] = {OURS: lambda: inputs.ours(top_k)}
    if gpu:
        lse = log_sum_exp(inputs)
        methods[LSE] = lambda: inputs.ours(top_k, lse=lse)
    methods |= rivals(inputs, top_k, materialised=fits)
    check(inputs, methods, top_k)
    extra = {name: peak(method, device) for name, method in methods.items()}
    if device.type == "cuda":
        methods[GRAPH] = graph(methods[OURS])
    elements = (256 << 20 if gpu else 64 << 20) // 4
    source, target = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    copies: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        copies.append(clock(lambda: target.copy_(source), device, target))
        for name, method in methods.items():
            times[name].append(clock(method, device, target))
    speed = 2 * source.nbytes / statistics.median(copies)
    return [
        Result(
            size, name, statistics.median(taken), min(taken), max(taken),
            size.key_bytes / statistics.median(taken) / speed, extra.get(name), size.key_bytes,
        )
        for name, taken in times.items()
    ]  # fmt: skip


def check(inputs: Inputs, methods: dict[str, Method], top_k: int) -> None:
    """What is timed gives answers: whole distributions, and scores as the naive method's up to bfloat16 logits."""
    ours = inputs.ours(top_k)
    assert bool((ours.histogram.sum(1) - 1).abs().max() < 1e-3), "mass is missing"
    if LSE in methods:
        assert bool((methods[LSE]().scores - ours.scores).abs().max() < 1e-4), "another normaliser"
    assert bool((ours.scores.diff(dim=1) <= 0).all()) and bool((ours.positions >= 0).all())
    if NAIVE in methods:
        # the same keys in other pages: compare what does not depend on the order
        same = in_order(inputs).ours(top_k)
        expected = methods[NAIVE]().values
        assert bool(((same.scores - expected).abs() <= 0.05 * expected + 1e-4).all()), "not the naive answer"


def in_order(inputs: Inputs) -> Inputs:
    """The inputs with the pages in the order in which the dense view has them."""
    table = inputs.paged.page_table
    ordered = torch.arange(table.numel(), device=table.device, dtype=torch.int32).view_as(table)
    return replace(inputs, paged=replace(inputs.paged, page_table=ordered))


def clock(method: Method, device: torch.device, flush: torch.Tensor) -> float:
    """Seconds of one call with cold caches."""
    if device.type == "cpu":
        flush[: 8 << 20].add_(0)  # 32 MiB, about the last cache
        now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        method()
        return now() - start
    begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flush.zero_()
    begin.record()
    method()
    done.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(done)) / 1e3


def graph(method: Method) -> Method:
    """The same call as an engine replays it."""
    method()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        method()
    return captured.replay


def peak(method: Method, device: torch.device) -> int | None:
    """Bytes that a call holds at most beside what is there, with its results; None on a CPU, where nobody counts."""
    method()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        method()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    return None


def free_bytes(device: torch.device) -> int:
    """Memory to plan with; on the CPU little, because others work there too."""
    if device.type != "cuda":
        return 2 << 30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def draw(device: torch.device, out: Path, rounds: int) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds over captured layers, over context and over k, as numbers and, with matplotlib, as a picture."""
    base = Size(8, 4096, 32, 8, 128) if device.type != "cpu" else Size(4, 2048, 32, 8, 128)
    inputs = make_inputs(base, device)
    long = make_inputs(Size(1, 8 * base.keys * base.batch, *HEADS[0]), device)
    flush = torch.zeros(64 << 20 if device.type != "cpu" else 8 << 20, device=device)

    def layers(count: int) -> Method:
        def call() -> None:
            step = topk.TopKStep(inputs.rows, topk.Selection(32))
            softmax = topk.Softmax(inputs.size.dim**-0.5)
            layer = topk.LayerRows(inputs.q, inputs.paged, inputs.positions, softmax)
            step([layer] * count)

        return call

    def context(keys: int) -> Method:
        shorter = Inputs(
            long.size, long.q, long.paged, long.dense, long.rows, torch.full_like(long.positions, keys - 1)
        )
        return lambda: shorter.ours(32)

    def keep(top_k: int) -> Method:
        return lambda: inputs.ours(top_k)

    axes: dict[str, tuple[Callable[[int], Method], list[int]]] = {
        "captured layers": (layers, [1, 2, 4, 6, 8]),
        "keys": (context, [long.size.keys * n // 8 for n in (1, 2, 4, 6, 8)]),
        "k": (keep, [1, 8, 16, 32, 64, 128, 256]),
    }
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, (make, values) in axes.items():
        methods = [make(value) for value in values]
        for method in methods:
            method()
        times: list[list[float]] = [[] for _ in values]
        for _ in range(rounds):
            for method, taken in zip(methods, times, strict=True):
                taken.append(1e3 * clock(method, device, flush))
        curves[name] = [(value, statistics.median(taken)) for value, taken in zip(values, times, strict=True)]
    plot(curves, f"{base}; {name_of(device)}", out)
    return curves


def plot(curves: dict[str, list[tuple[int, float]]], title: str, out: Path) -> None:
    """kernels.svg, if matplotlib is installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set(xlabel=name, ylabel="milliseconds", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(f"Cost of the capture kernel: {title}", fontsize=10)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kernels"}):
        figure.savefig(out / "kernels.svg", metadata={"Date": None})


def name_of(device: torch.device) -> str:
    """Of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {model}"


def versions() -> dict[str, str]:
    """Of what the kernels are compiled and run by."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numba", "flashinfer-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(results: list[Result], told: dict[str, Any], left: list[str], top_k: int) -> str:
    """Markdown: one line per size and method."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in told.items()) + f"; k = {top_k}, bfloat16 keys", "",
        "| size | method | ms, median (range) | key bytes/s over copy | peak extra memory | of the key bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for x in results:
        memory = "" if x.extra_bytes is None else f"{x.extra_bytes / 2**20:.1f} MiB"
        share = "" if x.extra_bytes is None else f"1/{x.key_bytes / max(x.extra_bytes, 1):.1f}"
        alone = "alone" in x.method  # reads no keys
        lines.append(
            f"| {x.size} | {x.method} | {1e3 * x.seconds:.3g} ({1e3 * x.fastest:.3g} to {1e3 * x.slowest:.3g}) | "
            f"{'' if alone else f'{x.copy_share:.2f}'} | {memory} | {share} |"
        )
    return "\n".join([*lines, *(f"\nNot measured: {line}" for line in left)]) + "\n"


if __name__ == "__main__":
    main()
