"""The Triton kernels compile for GPUs that this machine does not have.

The interpreter runs Python: it accepts code that the compiler refuses, such as a method call on an
argument that a launch has specialised to a constant. Triton needs no GPU to compile for one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import python

SCRIPT = '''
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnhook.kernels.topk.torch.reduce import empty_result
from attnhook.kernels.topk.triton import kernel
from attnhook.kernels.topk.types import LayerRows, PagedKeys, PerHead, Selection, Softmax

backend, arch, warp_size = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))


class Driver:
    """A device that compiles and does not launch."""

    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compile:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled = self.function.warmup(*arguments, grid=grid, **options)
            shared = compiled.metadata.shared
            print(self.function.__name__, "shared", shared)
            # what a consumer GPU of compute capability 8.6 and an MI300 have to give
            assert shared <= (65536 if backend == "hip" else 101376), shared
        return launch


driver.set_active(Driver())
NAMES = ("logits", "average", "norms", "merge", "direct", "masses", "tiles", "select")
for name in NAMES:
    setattr(kernel, name + "_kernel", Compile(getattr(kernel, name + "_kernel")))


def call(
    heads, kv_heads, dim, dtype, k_type, page=16, pages=64, k_scale=None, full=False, window=-1, rows=2, lse=None,
    per_head=PerHead(),
):
    cache = torch.zeros(4, page, kv_heads, dim).to(k_type)
    table = torch.zeros(2, pages, dtype=torch.int32)
    keys = PagedKeys(cache, table, page, cache.stride(), kv_heads, k_scale)
    softmax, selection = Softmax(0.1, window=window, lse=torch.zeros(rows, heads) if lse else None), Selection(4)
    if full:
        sinks = torch.zeros(heads, dtype=torch.bfloat16)
        softmax = softmax._replace(sinks=sinks, alibi_slopes=torch.zeros(heads), softcap=30.0)
        spans, first_reported = torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
        selection = Selection(4, torch.ones(2, heads, dtype=torch.bool), spans, first_reported, per_head)
    index = torch.zeros(rows, dtype=torch.int64 if full else torch.int32)
    q = torch.zeros(rows, heads, dim, dtype=dtype)
    kernel.topk_attention(LayerRows(q, keys, index, softmax), index, selection)


# Triton has no e4m3 for MI300's variant of it, nor for GPUs before compute capability 8.9
fp8 = torch.float8_e5m2 if backend == "hip" or arch == "80" else torch.float8_e4m3fn
if backend == "cuda":
    call(4, 1, 64, torch.float32, torch.float32, page=1, pages=1, rows=1)  # strides and sizes of 1
    call(16, 1, 576, torch.bfloat16, torch.bfloat16, page=64, k_scale=0.5, window=1)
    call(128, 1, 576, torch.bfloat16, torch.bfloat16, page=64)  # recompute: a large group
    call(16, 1, 576, torch.bfloat16, torch.bfloat16, page=64, rows=40, lse=True)
call(16, 4, 128, torch.bfloat16, fp8, k_scale=torch.ones(4), full=True, window=torch.ones(2, dtype=torch.int32))
call(32, 8, 128, torch.bfloat16, torch.bfloat16, rows=300, full=True)  # tiles of prompt rows
call(32, 8, 128, torch.bfloat16, torch.bfloat16, full=True, per_head=PerHead(2, True, True, True))
call(32, 8, 128, torch.bfloat16, torch.bfloat16, rows=300, full=True, per_head=PerHead(2, True, True, True))
out = empty_result((3, 0), Selection(40), torch.device("cpu"))
place = torch.zeros(3, dtype=torch.int64)
kernel.reduce_rows(torch.zeros(3, 1000), place, place, Selection(40), out)
print("compiled")
'''


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(("cuda", "80", "32"), id="a100", marks=pytest.mark.slow),
        pytest.param(("cuda", "90", "32"), id="h100", marks=pytest.mark.slow),
        pytest.param(("cuda", "100", "32"), id="b200", marks=pytest.mark.slow),
        pytest.param(("hip", "gfx942", "64"), id="mi300", marks=pytest.mark.slow),
    ],
)
def test_compiles(target: tuple[str, str, str]) -> None:
    root = Path(__file__).parents[2]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *target], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("compiled\n")
    seen = {line.split("_kernel")[0] for line in done.stdout.splitlines() if "_kernel" in line}
    assert seen == {"logits", "average", "norms", "merge", "direct", "masses", "tiles", "select"}


@pytest.mark.slow
def test_what_the_kernels_take_of_a_gpu() -> None:
    """Nothing is spilled on an H100, but a little where every option is on; a prompt's tile of rows is in registers."""
    code = """
        import json
        from benchmarks.kernel_resources import CALLS, measure
        print(json.dumps([[call.name, *vars(taken).values()] for call in CALLS for taken in measure(call, 90)]))
    """
    done = python("-c", code, timeout=300, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    spilled: dict[str, int] = {}
    for name, kernel, registers, bytes_spilled, shared, warps in json.loads(done.stdout):
        assert 0 < registers <= 255 and shared <= 232_448 and warps in (4, 8)
        assert kernel in ("logits", "average", "norms", "merge", "direct", "masses", "select")
        spilled[name] = max(spilled.get(name, 0), bytes_spilled)
    assert len(spilled) == 6
    # 480 bytes, and 1,048 with every option, where the tiles ran on four warps
    assert all(most <= (64 if "every option" in name else 0) for name, most in spilled.items()), spilled
