"""What attnhook costs a server: decode tokens per second and CPU time, idle and while capturing.

Two real servers with the same model, one without attnhook, only one of them busy at a time. Every prompt is in
the prefix cache before anything is measured, so that a measurement is decoding and nothing else. Each round
measures all modes in turn, and both servers are started anew now and then, because one process differs from the
next. Prints ratios to the server without attnhook in the same round. Trust the engine's CPU time per token: it
counts what the processes that run the model have computed, other users of the machine left out.

    python -m benchmarks.overhead [--engine sglang]

With ``--device cuda`` the engines run in bfloat16 with CUDA graphs, and the decode time is what counts. There a third
server, whose graphs keep every layer's queries, answers what asks for all layers; all servers start together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WITHOUT, IDLE = "no plugin", "idle"
MODES: dict[str, dict[str, Any]] = {  # mode -> fields of the request
    WITHOUT: {},
    IDLE: {},
    "last layer": {"return_attention_tokens": True, "attention_layers": "last"},
    "4 layers": {"return_attention_tokens": True, "attention_layers": "auto"},
    "all layers": {"return_attention_tokens": True, "attention_layers": "all"},
}
NAME = "model"
PATIENCE = 300.0  # seconds until a server must be up
PAUSE = 2.5  # seconds after which an idle server really is: vLLM's processes poll for a second after a step

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Engine:
    """How to start a server of one engine, and which of its processes run the model."""

    command: tuple[str, ...]  # before the model and the common arguments
    arguments: tuple[str, ...]
    distributions: tuple[str, ...]  # whose versions are told
    workers: tuple[str, ...]  # parts of the titles of the processes that run the model, the most exact first
    environ: dict[str, str] = field(default_factory=dict)


_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
_SGLANG = (sys.executable, "-m", "sglang.launch_server", "--model-path")
ENGINES = {
    "vllm": Engine(
        _VLLM,
        ("--served-model-name", NAME, "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"),
        ("vllm", "torch"),
        ("VLLM::Worker", "VLLM::EngineCore"),
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
    ),
    # on a CPU, with the kernel package's stand-in of the tests, whose code no token passes through
    "sglang": Engine(
        _SGLANG,
        (
            "--served-model-name", NAME, "--context-length", "2048", "--dtype", "float32", "--device", "cpu",
            "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none",
            "--max-total-tokens", "8192", "--max-running-requests", "8", "--sleep-on-idle",
        ),
        ("sglang", "torch"),
        ("sglang::scheduler",),
        {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(_ROOT / "tests/backends/sglang/standin"), str(Path(sys.prefix) / "sglang-extra")]
            ),
        },
    ),
}  # fmt: skip
# attention in Triton, so that both engines' servers fit beside each other; graphs of decoding passes, no compilation
ON_GPU = {
    "vllm": Engine(
        _VLLM,
        (
            "--served-model-name", NAME, "--max-model-len", "4096", "--dtype", "bfloat16", "--max-num-seqs", "64",
            "--attention-backend", "TRITON_ATTN", "--kv-cache-memory-bytes", str(8 << 30),
            "--gpu-memory-utilization", "0.25",
            "--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
        ),
        ("vllm", "torch"),
        ("VLLM::Worker", "VLLM::EngineCore"),
        {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
    ),
    "sglang": Engine(
        _SGLANG,
        (
            "--served-model-name", NAME, "--context-length", "4096", "--dtype", "bfloat16",
            "--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none",
            "--max-total-tokens", "100000", "--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64",
        ),
        ("sglang", "torch"),
        ("sglang::scheduler",),
    ),
}  # fmt: skip


class Sample(NamedTuple):
    """One measurement, per generated token."""

    wall: float
    engine: float  # CPU seconds of the processes that run the model
    server: float  # CPU seconds of all of the server's processes


class Ratio(NamedTuple):
    """A quantity over that of the server without attnhook, over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} | {self.low:.3f} to {self.high:.3f}"


def main() -> None:
    """Start the servers, measure, print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=513, help="one more than whole blocks of the cache")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--starts", type=int, default=2, help="times that both servers are started")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all modes per start")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no new round is begun")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds before each measurement")
    parser.add_argument("--json", type=Path, help="also write the ratios to this file, after each round")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to both servers")
    options = parser.parse_args()
    if options.model is None:
        from attnhook.backends.transformers.default_model import default_model_path

        options.model = str(default_model_path())
    options.end = time.monotonic() + 60 * options.minutes
    rounds: list[dict[tuple[str, int], Sample]] = []
    for _ in range(options.starts):
        measure(options, rounds)
    print(table(options, rounds))


def measure(options: argparse.Namespace, rounds: list[dict[tuple[str, int], Sample]]) -> None:
    """Add the rounds of one start of all servers; the order of the modes turns from round to round."""
    prompts = prompt_ids(options)
    modes = list(MODES)
    with contextlib.ExitStack() as stack:
        servers = start(options, stack)

        def run(mode: str, batch: int, new: int) -> Sample:
            name = mode if mode in servers else IDLE
            return servers[name].run(mode, prompts[:batch], new, options.top_k)

        for mode in modes:  # fills the prefix cache, compiles what compiles late
            for batch in options.batch:
                run(mode, batch, 4)
        for _ in range(options.rounds):
            if rounds and time.monotonic() > options.end:
                return
            samples = {}
            turn = len(rounds) % len(modes)
            for mode in modes[turn:] + modes[:turn]:
                for batch in options.batch:
                    time.sleep(options.pause)
                    samples[mode, batch] = run(mode, batch, options.new_tokens)
            rounds.append(samples)
            print(f"round {len(rounds)} of {options.starts * options.rounds}", file=sys.stderr, flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(figures(options, rounds), indent=1) + "\n", encoding="utf-8")


def start(options: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Server]:
    """The servers by the mode that is theirs; `IDLE` answers every other."""
    kinds: dict[str, dict[str, str]] = {WITHOUT: {"ATTNHOOK": "0"}, IDLE: {"ATTNHOOK": "1"}}
    if options.device == "cpu":
        return {name: stack.enter_context(launched(options, environ))() for name, environ in kinds.items()}
    kinds["all layers"] = {"ATTNHOOK": "1", "ATTNHOOK_GRAPH_LAYERS": "all"}
    waits = {name: stack.enter_context(launched(options, environ)) for name, environ in kinds.items()}
    return {name: wait() for name, wait in waits.items()}


def prompt_ids(options: argparse.Namespace) -> list[list[int]]:
    """Token ids of as many different prompts as the largest batch has."""
    from transformers import AutoTokenizer

    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(options.model)(text * (1 + options.prompt_tokens // 1000))["input_ids"]
    return [ids[n * 7 : n * 7 + options.prompt_tokens] for n in range(max(options.batch))]


class Server:
    """A running server and its processes."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], engine: Engine) -> None:
        self.url, self._engine = url, engine
        self._root = psutil.Process(process.pid)

    def run(self, mode: str, prompts: list[list[int]], new: int, top_k: int) -> Sample:
        """Answer the prompts at the same time; checks that what the mode is for was really produced."""
        bodies = []
        for ids in prompts:
            body = {"model": NAME, "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            fields = {**MODES[mode], "top_k_attention": top_k} if MODES[mode] else {}
            bodies.append(json.dumps({**body, **fields}).encode())
        with ThreadPoolExecutor(len(bodies)) as pool:
            engine, server = self._seconds()
            wall = time.perf_counter()
            raw = list(pool.map(self._post, bodies))  # taken apart later: that is the client's work
            wall = time.perf_counter() - wall
            engine, server = (b - a for a, b in zip((engine, server), self._seconds(), strict=True))
        tokens = 0
        for reply in map(json.loads, raw):
            count, captured = reply["usage"]["completion_tokens"], reply["choices"][0].get("attention_tokens", [])
            assert count == new, f"{count} tokens instead of {new}"
            assert len(captured) == (count if MODES[mode] else 0), f"{mode}: {len(captured)} records for {count} tokens"
            tokens += count
        return Sample(wall / tokens, engine / tokens, server / tokens)

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url + "/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            data: bytes = reply.read()
        return data

    def _seconds(self) -> tuple[float, float]:
        """CPU seconds so far of the processes that run the model, and of all."""
        used: dict[str, float] = {}
        for process in (self._root, *self._root.children(recursive=True)):
            times = process.cpu_times()
            title = " ".join(process.cmdline())
            used[title] = used.get(title, 0.0) + times.user + times.system
        for name in self._engine.workers:
            workers = [seconds for title, seconds in used.items() if name in title]
            if workers:
                return sum(workers), sum(used.values())
        raise RuntimeError(f"no process named {' or '.join(self._engine.workers)} among {sorted(used)}")


def figures(options: argparse.Namespace, rounds: list[dict[tuple[str, int], Sample]]) -> dict[str, Any]:
    """The table's numbers, and tokens per second of the server without attnhook."""
    told: dict[str, Any] = {"engine": options.engine, "rounds": len(rounds), "ratios": []}
    for batch in options.batch:
        wall = statistics.median(samples[WITHOUT, batch].wall for samples in rounds)
        for mode in MODES:
            one = ratio(rounds, mode, batch, "wall")
            told["ratios"].append(
                {"batch": batch, "mode": mode, "tokens_per_second_without": 1 / wall, **one._asdict()}
            )
    return told


@contextlib.contextmanager
def launched(options: argparse.Namespace, own: dict[str, str]) -> Iterator[Callable[[], Server]]:
    """A server on a free port of the loopback interface, ended with everything that it started.

    What it yields waits until the server is up.
    """
    engine = (ENGINES if options.device == "cpu" else ON_GPU)[options.engine]
    port = 65_535
    while port > 55_000:  # older releases of SGLang take the port that is higher by 10,000 too
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    command = [
        *engine.command, options.model, "--host", "127.0.0.1", "--port", str(port), *engine.arguments,
        *options.arguments,
    ]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ATTNHOOK")}
    environ = {"HF_HUB_OFFLINE": "1", **engine.environ, **plain, **own}
    if "PYTHONPATH" in engine.environ:  # comes before what is there
        environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [engine.environ["PYTHONPATH"], plain.get("PYTHONPATH", "")])
        )
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)

        def wait() -> Server:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError("the server did not start:\n" + log.read().decode(errors="replace")[-4000:])
                time.sleep(0.5)
            return Server(url, process, engine)

        try:
            yield wait
        finally:
            stop(process)


def is_up(url: str) -> bool:
    """Whether the server takes requests."""
    try:
        with urllib.request.urlopen(url + "/health", timeout=10):
            return True
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server; it ends what it has started, or the whole group is ended."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def ratio(rounds: list[dict[tuple[str, int], Sample]], mode: str, batch: int, quantity: str) -> Ratio:
    """A mode's quantity over that of the server without attnhook, round by round."""
    values = [
        getattr(samples[mode, batch], quantity) / getattr(samples[WITHOUT, batch], quantity) for samples in rounds
    ]
    return Ratio(statistics.median(values), min(values), max(values))


def table(options: argparse.Namespace, rounds: list[dict[tuple[str, int], Sample]]) -> str:
    """The figures in Markdown, under the versions and parameters that they belong to."""
    versions = []
    for name in ENGINES[options.engine].distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    lines = [
        f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new, top_k {options.top_k}; "
        f"{', '.join(versions)}, {platform.machine()}, {os.cpu_count()} cores; "
        f"{len(rounds)} interleaved rounds over {options.starts} starts",
        "",
        "Per token, over the server without attnhook in the same round: median and range over the rounds.",
        "",
        "| mode | batch | decode time | range | engine CPU | range | server CPU | range |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in options.batch:
        for mode in MODES:
            cells = [str(ratio(rounds, mode, batch, quantity)) for quantity in Sample._fields]
            lines.append(f"| {mode} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
