"""Import everything that the servers import on a GPU, from the parts, on a machine without one.

    python -m tools.gpu.imports sglang|vllm

Run by ``tools/gpu_pack.sh --try`` in an environment of what packages/machine.txt names. The libraries are the real ones
for CUDA. The driver's library is a stand-in whose functions all answer "no device", NVML's one that knows an H100, and
torch is told the same, since engines ask both before they import what they run there. Then each engine builds the
configuration of the check's own servers. Prints where every module came from, and fails where one cannot be imported.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tools.gpu import machine
from tools.gpu.model import make

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NVML = r"""
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *) 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *) 1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) {
  strncpy(name, "NVIDIA H100 80GB HBM3", size); return 0;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) { strncpy(uuid, "GPU-0", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *told) {
  told[0] = 80ULL << 30; told[1] = 79ULL << 30; told[2] = 1ULL << 30; return 0;
}
"""
MODULES = {
    "sglang": (
        "sglang", "sgl_kernel", "sglang.launch_server", "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.scheduler", "sglang.srt.managers.tokenizer_manager",
        "sglang.srt.managers.detokenizer_manager", "sglang.srt.model_executor.model_runner",
        "sglang.srt.layers.attention.triton_backend", "sglang.srt.models.llama",
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
    ),
    "vllm": (
        "vllm", "vllm.platforms", "vllm.entrypoints.llm", "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.engine.async_llm",
        "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner",
        "vllm.v1.executor.uniproc_executor", "vllm.v1.executor.multiproc_executor",
        "vllm.v1.attention.backends.triton_attn", "vllm.v1.attention.backends.flash_attn",
        "vllm.model_executor.models.llama", "vllm.compilation.backends", "vllm._C_stable_libtorch",
    ),
}  # fmt: skip


def main(engine: str) -> None:
    """Import, configure, tell."""
    paths = machine.paths((engine, "base"))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        stand_in_driver(Path(folder), [Path(path) for path in paths])
        stand_in_device()
        model = make(Path(folder) / "model", device="cpu", rehearse=True)
        for name in MODULES[engine]:
            import_module(name)
            print(f"imported {name}", flush=True)
        configure(engine, str(model))
    where = {name: origin(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
    listing = machine.home() / f"modules-{engine}.txt"
    listing.write_text("".join(f"{name}\t{place}\n" for name, place in sorted(where.items())), encoding="utf-8")
    print(f"{engine}: modules by where they lie: {dict(Counter(where.values()))}; all of them in {listing.name}")
    strange = [name for name, place in where.items() if place == "elsewhere"]
    if strange:
        raise SystemExit(f"neither in the parts nor on the machine: {', '.join(strange)}")


def origin(file: str | None) -> str:
    """Where a module lies: in which archive, in the checkout, on the machine, or elsewhere."""
    if file is None or not os.path.isabs(file):
        return "built in"  # or made by torch
    path, home = Path(file), machine.home()
    if path.is_relative_to(home):
        return path.relative_to(home).parts[0]
    if path.is_relative_to(sys.prefix):
        return "machine"
    if path.is_relative_to(machine.ROOT):
        return "checkout"
    return "python" if path.is_relative_to(sys.base_prefix) else "elsewhere"


def stand_in_driver(folder: Path, roots: list[Path]) -> None:
    """Build and load a libcuda.so.1 with every function of the driver that the libraries name, and an NVML."""
    names: set[str] = set()
    for root in roots:
        for library in root.rglob("*.so*"):
            told = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
            names |= set(re.findall(r" U (cu[A-Z]\w+)", told.stdout))
    driver = "\n".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}" for name in sorted(names))
    for name, code in (("libcuda.so.1", driver), ("libnvidia-ml.so.1", _NVML)):
        source, built = folder / f"{name}.c", folder / name
        source.write_text(code + "\n", encoding="utf-8")
        subprocess.run(
            ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(built), str(source)], check=True
        )
        ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


def stand_in_device() -> None:
    """torch says that it has an H100, and computes nothing there."""
    import torch

    properties = SimpleNamespace(
        major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 << 30, warp_size=32,
        shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472, L2_cache_size=50 << 20,
        regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, uuid="GPU-0", is_integrated=False,
        gcnArchName="",
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_name": properties.name, "get_device_properties": properties, "is_bf16_supported": True,
        "mem_get_info": (79 << 30, 80 << 30), "_is_compiled": True, "is_initialized": True, "set_device": None,
        "get_arch_list": ["sm_90"], "init": None, "_lazy_init": None, "synchronize": None, "empty_cache": None,
    }  # fmt: skip
    cuda: Any = torch.cuda
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)


def configure(engine: str, model: str) -> None:
    """The configurations of the check's servers and jobs, as the engine itself makes them."""
    from benchmarks.overhead import ON_GPU

    arguments = list(ON_GPU[engine].arguments)
    if engine == "sglang":
        import argparse

        from sglang.srt.server_args import ServerArgs

        from tools.gpu import stage_sglang

        plain = argparse.ArgumentParser()
        ServerArgs.add_cli_args(plain)
        made = {"the server": ServerArgs.from_cli_args(plain.parse_args(["--model-path", model, *arguments]))}
        made |= {job.name: ServerArgs(**job.engine) for job in stage_sglang.jobs(model)}
        for name, args in made.items():
            print(f"configured {name}: attention {args.attention_backend}, {args.max_total_tokens} tokens")
        return
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tools.gpu import stage_vllm

    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    wanted: dict[str, Any] = {
        "the server": AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))
    }
    environs: dict[str, dict[str, str]] = {}
    for job in stage_vllm.jobs(model):
        wanted[job.name], environs[job.name] = EngineArgs(**job.engine), job.environ
    for name, engine_args in wanted.items():
        os.environ.update(environs.get(name, {}))
        config = engine_args.create_engine_config()
        print(
            f"configured {name}: {current_platform.device_name}, {config.parallel_config.worker_cls}, "
            f"V2 runner {config.use_v2_model_runner}, {config.compilation_config.cudagraph_mode}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
