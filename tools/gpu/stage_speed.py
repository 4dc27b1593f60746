"""benchmarks/kernels on the device: key bytes against a copy's, rivals, extra memory, and other launch shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tools.gpu.machine import ROOT
from tools.gpu.stage import Context, begin

OURS, GRAPH = "attnhook", "attnhook, in a CUDA graph"
NAIVE = "naive torch"


def run(context: Context) -> None:
    """Run the benchmark and hold its figures to the bars."""
    out = context.scratch / "kernels"
    minutes = 0.1 if context.rehearse else max(0.3, (context.left - 50) / 60)
    command = [sys.executable, "-m", "benchmarks.kernels", "--out", str(out), "--minutes", f"{minutes:.2f}"]
    if context.rehearse:
        command += ["--device", "cpu", "--batch", "1", "--keys", "512", "--rounds", "1"]
    else:
        command += ["--batch", "8", "1", "--keys", "4096", "131072", "32768", "--rounds", "7"]
    done = subprocess.run(command, cwd=ROOT)
    found = context.findings
    data = out / "kernels.json"
    found.must("benchmarks.kernels", done.returncode == 0 and data.exists(), f"status {done.returncode}", "0")
    if not data.exists():
        return
    told = json.loads(data.read_text(encoding="utf-8"))
    found.table("Kernels", (out / "kernels.md").read_text(encoding="utf-8"))
    judge(context, told["results"])
    variants(context)


def variants(context: Context) -> None:
    """Other launch shapes, so that the next reader knows whether the chosen ones are the fastest."""
    if not context.rehearse and context.left < 12:
        return
    environ = {**os.environ, **({"TRITON_INTERPRET": "1"} if context.rehearse else {})}
    command = [sys.executable, "-m", "benchmarks.kernel_variants", "--rounds", "1" if context.rehearse else "7"]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    context.findings.must("benchmarks.kernel_variants", done.returncode == 0, f"status {done.returncode}", "0")
    context.findings.table("Other launch shapes", done.stdout)


def judge(context: Context, results: list[dict[str, Any]]) -> None:
    """The bars of the design, section 7, by size."""
    found = context.findings
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        size = result["size"]
        name = f"{size['batch']} x {size['keys']:,} keys, {size['heads']}/{size['kv_heads']} heads, D {size['dim']}"
        sizes.setdefault(name, {})[result["method"]] = result
    if not sizes:
        found.must("sizes measured", False, 0, "> 0")
    for name, methods in sizes.items():
        ours = methods[OURS]
        best = min((methods[m] for m in (OURS, GRAPH) if m in methods), key=lambda one: float(one["seconds"]))
        size = ours["size"]
        share = best["copy_share"]
        if context.rehearse:
            found.see(f"key bytes/s over a copy's: {name}", f"{share:.2f}")
            continue
        if size["batch"] >= 8 and size["keys"] >= 4096:
            found.bar(f"key bytes/s over a copy's: {name}", share >= 0.8, f"{share:.2f}", ">= 0.80")
        else:
            found.see(f"key bytes/s over a copy's: {name}", f"{share:.2f}")
        naive = next((one for method, one in methods.items() if method.startswith(NAIVE)), None)
        if naive and size["keys"] >= 131_072:
            times = naive["seconds"] / best["seconds"]
            found.bar(f"times as fast as naive torch: {name}", times >= 10, f"{times:.1f}", ">= 10")
        if ours["extra_bytes"] is not None:
            part = ours["extra_bytes"] / ours["key_bytes"]
            found.bar(
                f"extra memory of the key bytes: {name}", part <= 1 / 16, f"1/{1 / max(part, 1e-9):.1f}", "<= 1/16"
            )


if __name__ == "__main__":
    sys.exit(begin(run))
