"""tests/kernels on the device: every awkward size against the float64 definition, CUDA graphs replayed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from tools.gpu.machine import ROOT
from tools.gpu.stage import Context, begin

_RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b (tests/\S+?\.py::[^\n]+)")
#: What the CPU has shown is not repeated: only the Triton kernels run on the device, and not the properties, each of
#: whose many sizes would be compiled.
_GPU = (
    "(triton or static or reduction or rank or padding or launches or lse or split) and not compile and not properties"
)
_REHEARSED = "static_buffers or (matches and triton and mqa)"


def run(context: Context) -> None:
    """Run pytest and count its results as they come."""
    found = context.findings
    what = _REHEARSED if context.rehearse else _GPU
    workers = "2" if context.rehearse else "14"
    command = [
        sys.executable, "-m", "pytest", "-v", "-n", workers, "--no-header", "-p", "no:cacheprovider",
        "--timeout", "100", "tests/kernels", "-k", what,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    results: dict[str, str] = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        match = _RESULT.search(line)
        if match:
            results[match[2].strip()] = match[1]
            if match[1] in ("FAILED", "ERROR"):
                found.must(match[2].strip(), False, match[1])
            elif len(results) % 50 == 0:
                found.fact("tests so far", str(dict(Counter(results.values()))))
    status = process.wait()
    counts = Counter(results.values())
    found.fact("tests so far", str(dict(counts)))
    found.must("tests/kernels", status == 0 and counts["PASSED"] > 0, f"{dict(counts)}, pytest's status {status}", "0")
    replayed = [name for name, how in results.items() if "CUDA graph" in name and how == "PASSED"]
    if context.rehearse:
        found.see("CUDA graphs", "none on a CPU")
    else:
        found.must("CUDA graphs replayed with other lengths, tables and keys", len(replayed) > 0, len(replayed), "> 0")


if __name__ == "__main__":
    sys.exit(begin(run))
