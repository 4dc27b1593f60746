"""Checks attnhook on a machine with a GPU and no network, in stages, the most telling ones first.

    tools/gpu_check.sh [STAGE ...] [--minutes N] [--out DIR]
    tools/gpu_check.sh --rehearse       every line of every stage on this machine's CPU, at a small size

Unpacks the parts that tools/gpu_pack.sh made, where they are; packages that no part has are the machine's own. Each
stage is a process with a time limit; a stage that fails or is stopped does not stop the next. Writes report.md,
report.json and a log for each stage to --out ($OUT, or gpu-report), and repeats the verdict in its last lines. Exits
with 0 where every stage that was asked for is right, else with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.gpu import machine, parts, report
from tools.gpu.findings import Findings
from tools.gpu.report import Outcome
from tools.gpu.stages import NAMES, STAGES, Stage

LEAST = 20.0  # seconds under which no stage is begun
_LOG_BYTES = 4 << 20


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(NAMES)}; default: all, in this order"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at a small size")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="for all stages together; later ones get what is left"
    )
    parser.add_argument("--parts", type=Path, default=parts.FOLDER, help="folder of the parts")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-report"))
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in NAMES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if not options.rehearse and not machine.has_gpu():
        parser.error("torch sees no CUDA device here; --rehearse runs every stage on the CPU")
    chosen = [stage for stage in STAGES if not options.stages or stage.name in options.stages]
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    notes = [] if options.rehearse else prepare(chosen, options.parts)
    facts = machine.facts()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), *notes, sep="\n", flush=True)
    outcomes: list[Outcome] = []
    for stage in chosen:
        outcomes.append(run(stage, options.out, end - time.monotonic(), rehearse=options.rehearse))
        report.write(options.out, facts, notes, outcomes, rehearsal=options.rehearse)
    print("\n" + "\n".join(report.verdict(outcomes)), flush=True)
    return 0 if all(one.good for one in outcomes) else 1


def prepare(chosen: list[Stage], folder: Path) -> list[str]:
    """Unpack the parts of the stages; what a reader of the report should know."""
    began = time.monotonic()
    archives = dict.fromkeys(name for stage in chosen for name in stage.archives)
    notes = machine.unpack(tuple(archives), folder)
    notes += [f"the machine: {line}" for line in machine.missing()]
    sys.path[:0] = machine.paths(("base",))  # psutil, which ends what a stage has started
    print(f"unpacked in {time.monotonic() - began:.0f} s", flush=True)
    return notes


def run(stage: Stage, out: Path, left: float, *, rehearse: bool) -> Outcome:
    """One stage in a process of its own, ended with everything that it started when its time is over."""
    limit = min(stage.rehearsal_seconds if rehearse else stage.seconds, left)
    if limit < LEAST:
        return Outcome(stage, f"not begun: {max(left, 0):.0f} s were left", 0.0, Findings())
    print(f"\n== {stage.name}: {stage.about}; at most {limit:.0f} s", flush=True)
    found, log = out / f"{stage.name}.findings.json", out / f"{stage.name}.log"
    found.unlink(missing_ok=True)
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*paths(stage, rehearse), os.environ.get("PYTHONPATH", "")])),
        "PATH": search_path(),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "GPU_CHECK_SECONDS": str(limit),
    }
    command = [sys.executable, "-m", stage.module, "--findings", str(found), *(["--rehearse"] if rehearse else [])]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch, log.open("wb") as file:
        environ["GPU_CHECK_SCRATCH"] = scratch
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=environ, stdout=file, stderr=file, start_new_session=True
        )
        try:
            how = "done" if process.wait(limit) == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            how = "stopped at its limit"
        finally:
            end_all(process, scratch)
        seconds = time.monotonic() - began
    _shorten(log)
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome = Outcome(stage, how, seconds, Findings.read(found), text)
    found.unlink(missing_ok=True)  # the report has it all, and the files that come back are few
    print("\n".join(line for line in text.splitlines() if line.startswith("[")), flush=True)
    if not outcome.good:
        print("\n".join(text.splitlines()[-25:]), flush=True)
    print(report.verdict([outcome])[0], flush=True)
    return outcome


def search_path() -> str:
    """PATH with the interpreter's own tools (ninja) and CUDA's (nvcc, compute-sanitizer) in front."""
    tools = [Path(sys.executable).parent, Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    return os.pathsep.join([*(str(path) for path in tools if path.is_dir()), os.environ.get("PATH", "")])


def paths(stage: Stage, rehearse: bool) -> list[str]:
    """A rehearsal runs from the environment that it is started in."""
    return [str(machine.ROOT)] if rehearse else machine.paths(stage.archives)


def end_all(process: subprocess.Popen[bytes], scratch: str) -> None:
    """End a stage and whatever it has started, in sessions of their own too: they have its scratch folder's name."""
    import psutil

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if other.environ().get("GPU_CHECK_SCRATCH") == scratch:
                other.kill()


def _shorten(log: Path) -> None:
    """Keep a log's ends: what comes back is limited."""
    size = log.stat().st_size
    if size > _LOG_BYTES:
        data = log.read_bytes()
        half = _LOG_BYTES // 2
        log.write_bytes(data[:half] + b"\n... %d bytes left out ...\n" % (size - 2 * half) + data[-half:])


if __name__ == "__main__":
    sys.exit(main())
