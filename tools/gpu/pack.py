"""Makes the parts that a GPU machine without a network needs, on a machine that reaches PyPI.

    tools/gpu_pack.sh [--architecture 90] [--out .gpu-parts] [ARCHIVE ...]

Takes the wheels that packages/*.txt name, for Python 3.12 on x86-64 Linux, leaves out what no check runs, takes other
architectures' code out of the CUDA libraries, and writes archives in files of at most 60 MiB with checksums.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from tools.gpu import parts
from tools.gpu.fatbin import slim

PACKAGES = Path(__file__).with_name("packages")
ARCHIVES = ("base", "sglang", "vllm", "flash3")
PYTHON = "3.12"
_GLIBC = (17, 24, 27, 28, 31, 34, 35)  # manylinux_2_N: pip takes only the platforms that it is told

#: What no check runs, by distribution; patterns of paths in the wheel. "{arch}" is the architecture.
_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "*": ("*/tests/*", "*/test/*", "*.pyc", "*.pyi", "*/licenses/sbom/*", "*.pdb"),
    "vllm": (
        "vllm/vllm_flash_attn/_vllm_fa?_C*", "vllm/_moe_C*", "vllm/_flashmla*", "vllm/_qutlass*", "vllm/vllm-rs",
        "vllm/_rust_tool_parser*", "vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*",
        "vllm/third_party/*.cu*", "*.jpg", "*.png", "*/static/*",
    ),
    "sglang": ("sglang/multimodal_gen/*", "sglang/test/*", "sglang/benchmark/*", "sglang/srt/grpc/*.so", "*.png"),
    "sglang_kernel": ("sgl_kernel/flash_ops*", "sgl_kernel/flashmla_ops*", "sgl_kernel/spatial_ops*"),
    "flashinfer_python": ("flashinfer/data/*",),
    "transformers": ("transformers/kernels/*",),
    "openai": ("openai/helpers/*",),
}  # fmt: skip
#: The only paths of a wheel that an archive takes.
_ONLY = {"flash3": "vllm/vllm_flash_attn/_vllm_fa3_C*"}
_OTHER_ARCHITECTURES = re.compile(r"sgl_kernel/sm(\d+)/")


def main() -> None:
    """Pack the archives that are named, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="*", metavar="ARCHIVE", help=f"of {', '.join(ARCHIVES)}; default: all")
    parser.add_argument(
        "--architecture", type=int, default=90, help="of the GPU: 80 (A100), 90 (H100, H200), 100 (B200)"
    )
    parser.add_argument("--out", type=Path, default=parts.FOLDER, help="folder for the parts; ignored by git")
    parser.add_argument("--try", action="store_true", dest="tried", help="do not pack: try what is packed (tryout.py)")
    options = parser.parse_args()
    if options.tried:
        from tools.gpu import tryout

        raise SystemExit(tryout.main(options.out))
    unknown = set(options.archives) - set(ARCHIVES)
    if unknown:
        parser.error(f"no archive {', '.join(sorted(unknown))}: there are {', '.join(ARCHIVES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    known = parts.read_manifest(options.out)
    for name in options.archives or ARCHIVES:
        with tempfile.TemporaryDirectory() as folder:
            wheels, root = Path(folder) / "wheels", Path(folder) / "root"
            print(f"{name}: downloading", flush=True)
            download(PACKAGES / f"{name}.txt", wheels)
            versions = {}
            for wheel in sorted(wheels.glob("*.whl")):
                distribution, version = wheel.name.split("-")[:2]
                versions[distribution] = version
                take(wheel, distribution, root, options.architecture, _ONLY.get(name))
            print(f"{name}: packing {len(versions)} packages", flush=True)
            known[name] = parts.pack(name, root, options.out, versions)
        parts.write_manifest(known.values(), options.out)
        sizes = ", ".join(f"{file} {(options.out / file).stat().st_size / 2**20:.1f} MiB" for file in known[name].files)
        print(f"{name}: {sizes}; {known[name].bytes / 2**20:.0f} MiB unpacked", flush=True)


def download(requirements: Path, target: Path) -> None:
    """The wheels of a list of packages, without what they declare to need: the list is whole."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps",
        "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "-d", str(target),
        *(f"--platform={platform}" for platform in platforms), "-r", str(requirements),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def take(wheel: Path, distribution: str, root: Path, architecture: int, only: str | None = None) -> None:
    """Unpack what is needed of one wheel into ``root``; with ``only``, the files of that pattern."""
    left_out = (*_LEFT_OUT["*"], *_LEFT_OUT.get(distribution.lower(), ())) if only is None else ()
    with zipfile.ZipFile(wheel) as data:
        for info in data.infolist():
            place = _place(info.filename)
            if info.is_dir() or place is None or any(fnmatch.fnmatch(place, pattern) for pattern in left_out):
                continue
            if only is not None and not fnmatch.fnmatch(place, only):
                continue
            of = _OTHER_ARCHITECTURES.match(place)
            if of and int(of[1]) != architecture:
                continue
            target = root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with data.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
            if ".so" in target.name and info.file_size > 4 << 20:
                _slim(target, architecture)


def _place(name: str) -> str | None:
    """Where a wheel's file belongs in a folder of packages; None for scripts and headers."""
    first, *rest = PurePosixPath(name).parts
    if not first.endswith(".data"):
        return name
    return "/".join(rest[1:]) if rest and rest[0] in ("purelib", "platlib") else None


def _slim(path: Path, architecture: int) -> None:
    try:
        told = slim(path, architecture)
    except ValueError:
        return  # no CUDA library
    print(f"  {path.name}: {told.dropped_bytes >> 20} MiB of other architectures left out", flush=True)


if __name__ == "__main__":
    main()
