"""What the Triton kernels take of a GPU that need not be there: registers, spills and shared memory, by architecture.

    python -m benchmarks.kernel_resources [--architecture 80 90 100]

Triton compiles for any architecture without one. Registers and spills are what ptxas, which comes with Triton, says of
the machine code; each kernel is compiled as the calls below launch it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import benchmarks.bare  # noqa: F401 - before attnhook

# isort: split
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnhook.kernels.topk.triton import kernel as kernels
from attnhook.kernels.topk.types import LayerRows, PagedKeys, Selection, Softmax

NAMES = ("logits", "average", "norms", "merge", "direct", "masses", "select")
BF16 = torch.bfloat16


class Call(NamedTuple):
    """A call of `topk_attention`, as an engine makes it."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    rows: int
    full: bool = False  # every option of the softmax and of the report


CALLS = (
    Call("decoding, 32/8 heads, D 128", 32, 8, 128, 2),
    Call("decoding, 16/1 heads, D 576 (MLA)", 16, 1, 576, 2),
    Call("prompt, 32/8 heads, D 128", 32, 8, 128, 300),
    Call("prompt, 32/8 heads, D 128, every option", 32, 8, 128, 300, full=True),
    Call("prompt, 16/1 heads, D 576 (MLA)", 16, 1, 576, 300),
    Call("128/1 heads, D 576 (MLA)", 128, 1, 576, 2),
)


@dataclass(frozen=True)
class Taken:
    """Of one compiled kernel."""

    kernel: str
    registers: int  # per thread
    spilled: int  # bytes per thread, stores and loads
    shared: int  # bytes per program
    warps: int


class _Driver:
    """A device that compiles and does not launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """One for each architecture: Triton keeps what it compiled, and for what, by device."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        """It is never used."""
        return 0


class _Compile:
    """Stands where a kernel is: a launch compiles, and notes what ptxas says."""

    def __init__(self, function: Any, architecture: int, found: list[Taken]) -> None:
        self.function, self._architecture, self._found = function, architecture, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.function.warmup(*arguments, grid=grid, **options)
            registers, spilled = assemble(compiled.asm["ptx"], self._architecture)
            name = self.function.__name__.removesuffix("_kernel")
            self._found.append(Taken(name, registers, spilled, compiled.metadata.shared, compiled.metadata.num_warps))

        return launch


def assemble(ptx: str, architecture: int) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads) of PTX with one kernel."""
    from triton import knobs

    tool = (
        knobs.nvidia.ptxas.path
        if architecture < 100
        else getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas).path
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        suffix = "a" if architecture >= 90 else ""
        command = [
            tool,
            "-v",
            f"--gpu-name=sm_{architecture}{suffix}",
            str(source),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stderr + done.stdout
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas did not tell registers and spills:\n{said}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def measure(call: Call, architecture: int) -> list[Taken]:
    """Every kernel that a call launches, once."""
    driver.set_active(_Driver(GPUTarget("cuda", architecture, 32)))
    found: list[Taken] = []
    originals = {name: getattr(kernels, f"{name}_kernel") for name in NAMES}
    try:
        for name, function in originals.items():
            setattr(kernels, f"{name}_kernel", _Compile(function, architecture, found))
        cache = torch.zeros(4, 16, call.kv_heads, call.dim, dtype=BF16)
        keys = PagedKeys(cache, torch.zeros(2, 64, dtype=torch.int32), 16, cache.stride(), call.kv_heads)  # type: ignore[arg-type]
        index = torch.zeros(call.rows, dtype=torch.int32)
        softmax, selection = Softmax(0.1), Selection(32)
        if call.full:
            sinks, slopes = torch.zeros(call.heads, dtype=BF16), torch.zeros(call.heads)
            softmax = Softmax(0.1, softcap=30.0, sinks=sinks, alibi_slopes=slopes)
            spans, first_reported = torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
            selection = Selection(32, torch.ones(2, call.heads, dtype=torch.bool), spans, first_reported)
        q = torch.zeros(call.rows, call.heads, call.dim, dtype=BF16)
        kernels.topk_attention(LayerRows(q, keys, index, softmax), index, selection)
    finally:
        for name, function in originals.items():
            setattr(kernels, f"{name}_kernel", function)
    return list(dict.fromkeys(found))


def table(architectures: list[int]) -> str:
    """Markdown: a line per call and kernel, a column per architecture."""
    import triton

    cells: dict[tuple[str, str], dict[int, str]] = {}
    for architecture in architectures:
        for call in CALLS:
            for taken in measure(call, architecture):
                text = f"{taken.registers}, {taken.spilled or 'none'}, {taken.shared / 1024:.1f} KiB"
                cells.setdefault((call.name, f"{taken.kernel} ({taken.warps} warps)"), {})[architecture] = text
    lines = [
        f"Triton {triton.__version__}; registers a thread, bytes spilled, shared memory a program", "",
        "| call | kernel | " + " | ".join(f"sm_{n}" for n in architectures) + " |",
        "| --- | --- |" + " --- |" * len(architectures),
    ]  # fmt: skip
    for (call_name, kernel), by in cells.items():
        lines.append(f"| {call_name} | {kernel} | " + " | ".join(by.get(n, "") for n in architectures) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, nargs="+", default=[80, 90, 100])
    print(table(parser.parse_args().architecture))


if __name__ == "__main__":
    main()
