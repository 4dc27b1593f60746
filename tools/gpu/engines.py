"""Real engines in the check: jobs that run beside each other, and every row that they give against Transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.gpu.machine import ROOT
from tools.gpu.model import make, oracle
from tools.gpu.stage import KEPT, RECORDED, Context

#: Bounds of docs/numerics.md: max |dP| and features against eager attention in float32.
#: "tf32": an engine in float32 whose products are TF32, which has the mantissa of float16.
BOUNDS = {"float32": (2e-5, 1e-4), "tf32": (1e-2, 1e-2), "bfloat16": (6e-2, 6e-2)}
#: The engine's own attention rebuilt from our probabilities.
REBUILT = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 4e-2}
TOP_K = 8
EVERY_ROW = {
    "return_attention_tokens": True, "attention_layers": "all", "top_k_attention": TOP_K, "attention_prompt": True,
}  # fmt: skip
DECODING = {"return_attention_tokens": True, "attention_layers": "all", "top_k_attention": TOP_K}
SOME_LAYERS = {**DECODING, "attention_layers": "auto"}


@dataclass
class Ask:
    """One request: its tokens, how many it wants, the fields of its capture (none: it does not ask)."""

    ids: list[int]
    new: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What came back for one request."""

    ids: list[int]
    generated: list[Any]  # TokenRecords
    prompt: list[Any]
    error: str | None
    check: float | None
    asked: bool
    cached: int | None = None


@dataclass
class Job:
    """One engine in one mode: batches of requests, one after the other."""

    name: str
    numbers: str  # key of BOUNDS and REBUILT
    engine: dict[str, Any]
    batches: list[list[Ask]]
    environ: dict[str, str] = field(default_factory=dict)
    graphs: bool = False  # whether rows must come out of graphs
    cached: bool = False  # whether the last request must find its prefix in the cache


def prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Eight prompts of awkward lengths, one of a single token; different tokens all over the vocabulary."""
    lengths = [37, 63, 1, longest, 3 * longest // 7, 120, 17, 5]
    return [[(7919 * n + 104_729 * i + 31 * i * i) % (vocabulary - 3) + 3 for i in range(size)]
            for n, size in enumerate(lengths)]  # fmt: skip


def mixed(ids: list[list[int]], fields: dict[str, Any], *, self_check: bool = False) -> list[Ask]:
    """A batch of eight: two do not ask, two ask for some layers; every row checks itself in the engine if wanted."""
    new = [12, 9, 20, 8, 16, 12, 10, 6]
    asks: list[dict[str, Any]] = [fields] * len(ids)
    asks[1] = asks[5] = SOME_LAYERS
    asks[4] = asks[6] = {}
    if self_check:
        asks = [{**ask, "attention_self_check": True} if ask else ask for ask in asks]
    return [Ask(*each) for each in zip(ids, new, asks, strict=True)]


def run_stage(
    context: Context,
    engine: str,
    plan: Callable[[str], list[Job]],
    start: Callable[[Job, Path], list[str]],
    answers: Callable[[Job, Any], list[list[Answer]]],
    environ: dict[str, str],
    *,
    at_once: int,
) -> None:
    """One engine's stage: make the model, run the jobs (some at once on a GPU), judge them, measure its server."""
    for package in (engine, "transformers"):
        context.findings.fact(package, metadata.version(package))
    model = make(context.scratch / "model", device=context.device, rehearse=context.rehearse)
    jobs = plan(str(model))
    done = run_jobs(context, jobs, start, 1 if context.rehearse else at_once, environ)
    judge = Judge(context, oracle(model, context.device), context.device)
    for job in jobs:
        if job.name in done:
            found = json.loads((done[job.name] / "out.json").read_text(encoding="utf-8"))
            judge.judge(job, answers(job, found), done[job.name])
    del judge  # the servers need its memory
    if not context.rehearse:
        import torch

        torch.cuda.empty_cache()
    overhead(context, engine, model)


def run_jobs(
    context: Context,
    jobs: Sequence[Job],
    start: Callable[[Job, Path], list[str]],
    at_once: int,
    environ: dict[str, str],
) -> dict[str, Path]:
    """Run every job in a process of its own, some at once; the outputs by job. What fails is told and left out."""
    waiting, done = list(jobs), {}
    running: dict[str, tuple[subprocess.Popen[bytes], Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            folder = context.scratch / job.name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            own = {**environ, **job.environ, "GPU_CHECK_NOTES": str(folder / "notes")}
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(start(job, folder), cwd=ROOT, env=own, stdout=log, stderr=log)
            running[job.name] = process, folder, time.monotonic()
        time.sleep(0.2)
        for name, (process, folder, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"{name}: status {process.returncode} after {time.monotonic() - began:.0f} s", flush=True)
            if process.returncode == 0:
                done[name] = folder
            else:
                text = (folder / "log").read_text(encoding="utf-8", errors="replace")
                print(text[-6000:], flush=True)
                context.findings.must(f"{name}: runs", False, cause(text, process.returncode))
    return done


def cause(text: str, status: int) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line and "site-packages" not in line]
    return lines[-1][-200:] if lines else f"status {status}"


class Judge:
    """Compares a job's rows with the oracle's and says so."""

    def __init__(self, context: Context, model: Any, device: str) -> None:
        self._context, self._model, self._device = context, model, device
        self._known: dict[tuple[int, ...], Any] = {}
        self._control = 0.0  # of the job: how far the rows are from their neighbours'

    def judge(self, job: Job, answers: list[list[Answer]], folder: Path) -> None:
        """Every row of every request that asked; nothing for those that did not."""
        found, name = self._context.findings, job.name
        self._control = 0.0
        probability, feature, rows, checks, wrong = 0.0, 0.0, 0, [], []
        for batch, results in zip(job.batches, answers, strict=True):
            for n, (ask, answer) in enumerate(zip(batch, results, strict=True)):
                where = f"request {n} of {len(ask.ids)} tokens"
                if not ask.fields:
                    if answer.asked or answer.generated:
                        wrong.append(f"{where} did not ask and got records")
                    continue
                try:
                    worst = self._compare(ask, answer)
                except AssertionError as error:
                    wrong.append(f"{where}: {str(error).splitlines()[0] if str(error) else 'rows differ'}")
                    continue
                probability, feature = max(probability, worst.probability), max(feature, worst.feature)
                rows += worst.rows
                if ask.fields.get("attention_self_check"):
                    if answer.check is None:
                        wrong.append(f"{where}: no self-check came")
                    else:
                        checks.append(answer.check)
        most, features = BOUNDS[job.numbers]
        found.must(f"{name}: every row is there, once, and none for who did not ask", not wrong and rows > 0,
                   "; ".join(wrong)[:600] or f"{rows} rows x layers", "all")  # fmt: skip
        found.must(
            f"{name}: probabilities against eager float32",
            0 < probability <= most,
            f"{probability:.1e}",
            f"<= {most:g}",
        )
        found.must(
            f"{name}: fingerprints against eager float32", 0 < feature <= features, f"{feature:.1e}", f"<= {features:g}"
        )
        found.must(
            f"{name}: control, the same against each row's neighbour",
            self._control > most,
            f"{self._control:.1e}",
            f"> {most:g}",
        )
        if checks:
            bound = REBUILT[job.numbers]
            found.must(
                f"{name}: the engine's output rebuilt (self-check)",
                max(checks) <= bound,
                f"{max(checks):.1e}",
                f"<= {bound:g}",
            )
        if job.graphs:
            notes = folder / "notes"
            lines = notes.read_text(encoding="utf-8").split() if notes.exists() else []
            kept, recorded = lines.count(KEPT), lines.count(RECORDED)
            found.must(f"{name}: rows came out of graphs", kept > 0 and recorded > 0,
                       f"{recorded} layers recorded, {kept} read after replays", "> 0")  # fmt: skip
        if job.cached:
            cached = answers[-1][-1].cached or 0
            found.must(f"{name}: the last prompt was in the prefix cache", cached > 0, f"{cached} tokens", "> 0")

    def _compare(self, ask: Ask, answer: Answer) -> Any:
        from tests.oracle import compare

        assert answer.error is None, f"attention_error: {answer.error}"
        assert len(answer.ids) == ask.new, f"{len(answer.ids)} tokens instead of {ask.new}"
        first = len(ask.ids) - 1
        places = [record.query_position for record in answer.generated]
        assert places == list(range(first, first + ask.new)), f"rows at {places}"
        steps = [record.decode_step for record in answer.generated]
        assert steps == list(range(ask.new)), f"decode steps {steps}"
        before = [record.query_position for record in answer.prompt]
        wanted = list(range(first)) if ask.fields.get("attention_prompt") else []
        assert before == wanted, f"{len(before)} prompt rows instead of {len(wanted)}"
        attention = self._attention([*ask.ids, *answer.ids])
        for record in answer.generated[1:]:  # that the bound tells rows apart
            neighbour = attention[record.layers[0]][0, record.query_position - 1]
            for place, score in record.top(layer=record.layers[0]):
                self._control = max(self._control, abs(float(neighbour[place]) - score))
        return compare([*answer.prompt, *answer.generated], attention, top_k=TOP_K)

    def _attention(self, ids: list[int]) -> Any:
        """[1, n, n] by layer, on the CPU."""
        import torch

        from tests.oracle import eager_attention

        key = tuple(ids)
        if key not in self._known:
            tokens = torch.tensor([ids[:-1]], device=self._device)
            found = eager_attention(self._model, tokens)
            self._known[key] = {layer: matrix.cpu() for layer, matrix in found.items()}
        return self._known[key]


def overhead(context: Context, engine: str, model: Path) -> None:
    """benchmarks.overhead, its ratios held to the bars."""
    found = context.findings
    target = context.scratch / "overhead.json"
    command = [
        sys.executable, "-m", "benchmarks.overhead", "--engine", engine, "--model", str(model), "--starts", "1",
        "--json", str(target), "--minutes",
    ]  # fmt: skip
    if context.rehearse:
        command += ["3", "--batch", "1", "2", "--new-tokens", "4", "--prompt-tokens", "129", "--rounds", "1"]
    else:
        command += [f"{max(context.left - 30, 20) / 60:.2f}", "--device", "cuda", "--batch", "1", "8", "64",
                    "--new-tokens", "128", "--rounds", "6", "--pause", "0.3"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    found.must("tokens per second: measured", target.exists(), f"status {done.returncode}", "0")
    if not target.exists():
        return
    told = json.loads(target.read_text(encoding="utf-8"))
    bars = {"idle": 0.01, "last layer": 0.02, "4 layers": 0.05}
    lines = [
        "| batch | mode | tokens per second lost, median | range | without attnhook, tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in told["ratios"]:
        median, low, high = (1 - 1 / one[name] for name in ("median", "low", "high"))
        plain = one["tokens_per_second_without"]
        lines.append(f"| {one['batch']} | {one['mode']} | {median:.1%} | {low:.1%} to {high:.1%} | {plain:.0f} |")
        what = f"tokens per second lost, batch {one['batch']}, {one['mode']}"
        if one["mode"] in bars and not context.rehearse:
            found.bar(
                what,
                median <= bars[one["mode"]],
                f"{median:.1%} ({low:.1%} to {high:.1%})",
                f"<= {bars[one['mode']]:.0%}",
            )
        elif one["mode"] != "no plugin":
            found.see(what, f"{median:.1%} ({low:.1%} to {high:.1%})")
    found.table(f"Tokens per second, {told['rounds']} interleaved rounds", "\n".join(lines))
