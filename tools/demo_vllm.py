"""Start ``vllm serve`` with attnhook, ask it with ``attnhook run --url``, stop it: ``make demo-vllm``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PATIENCE = 300  # seconds until the server must be up
LOG_LINES = 40  # of a server that fails
# defaults; what the user has set counts
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(folder: Path) -> int:
    """Exit status of the demo, whose files go to ``folder``."""
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: `make venv` installs it where there is a wheel for this machine", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    folder.mkdir(parents=True, exist_ok=True)
    command = str(Path(sys.executable).with_name("attnhook"))
    model = subprocess.run([command, "model-path"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", NAME, "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip
    log = folder / "vllm-server.log"
    print(f"starting ATTNHOOK=1 vllm serve {NAME} on 127.0.0.1:{port}, its log is {log}", flush=True)
    with log.open("wb") as out:
        server = subprocess.Popen(
            serve, env={**SETTINGS, **os.environ, "ATTNHOOK": "1"}, stdout=out, stderr=out, start_new_session=True
        )
    status = 1
    try:
        if not started(server, port):
            return status
        report, records = folder / "vllm-report.html", folder / "vllm-records.jsonl"
        run = [command, "run", "--url", f"http://127.0.0.1:{port}/v1", "--layers", "auto", "--top-k", "16"]
        run += ["--prompt-rows", "--html", str(report), "--out", str(records)]
        print(" ".join(["attnhook", *run[1:]]), flush=True)
        status = subprocess.run(run).returncode
        if status == 0:
            print(f"Open {report} in a browser.")
        return status
    finally:
        stop(server)
        if status:
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join([f"-- the end of {log}", *lines]), file=sys.stderr)


def started(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server is up, after waiting for it."""
    begin = time.monotonic()
    said = 0.0
    while (waited := time.monotonic() - begin) < PATIENCE:
        if server.poll() is not None:
            print(f"the server ended with status {server.returncode}", file=sys.stderr)
            return False
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            print(f"the server is up after {waited:.0f} s", flush=True)
            return True
        if waited - said >= 5:
            said = waited
            print(f"  waiting for the server, {waited:.0f} s", flush=True)
        time.sleep(0.5)
    print(f"the server is not up after {PATIENCE} s", file=sys.stderr)
    return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it has started, which is its own process group."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
