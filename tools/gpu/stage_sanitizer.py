"""compute-sanitizer's memcheck over the kernels at awkward sizes: reads and writes that miss their tensors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from tools.gpu.machine import ROOT
from tools.gpu.stage import Context, begin

#: Sizes at which a block is ragged, a page is odd, or nothing is to be read.
_AWKWARD = "triton and matches_the_oracle and (odd or everything or two or 576 or fp8 or boundary)"


def run(context: Context) -> None:
    """Run pytest under compute-sanitizer, in a rehearsal by itself."""
    tests = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "tests/kernels/test_topk.py", "-k", "triton and matches_the_oracle and mqa" if context.rehearse else _AWKWARD,
    ]  # fmt: skip
    tool = shutil.which("compute-sanitizer")
    found = context.findings
    if context.rehearse:
        found.see("compute-sanitizer", "not run in a rehearsal")
        command = tests
    elif tool is None:
        found.must("compute-sanitizer", False, "not on the path: it comes with the CUDA toolkit")
        return
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all", *tests]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout)
    found.must("tests under it", done.returncode == 0 and passed is not None,
               f"{passed[0] if passed else 'none passed'}, status {done.returncode}", "0")  # fmt: skip
    if not context.rehearse:
        found.must("errors that it saw", errors != [] and set(errors) == {"0"}, ", ".join(errors) or "no summary", "0")


if __name__ == "__main__":
    sys.exit(begin(run))
