"""What capture costs in Transformers, against plain sdpa and against ``output_attentions=True``.

One run of a real model: a prompt of 2,048 tokens and 32 new ones, prompt rows captured too. Time is
measured in one process with the modes in turn, memory in a fresh process per mode and round, because one
process differs from the next by a tenth. Prints a table of ratios; absolute seconds depend on the
machine and its other users.

    python -m benchmarks.transformers_capture
    python -m benchmarks.transformers_capture --measure key-mass  # sums by key, against all layers without them
    python -m benchmarks.transformers_capture --measure heads  # numbers of every head, against a run for each head
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

PLAIN, LAST, ALL, EAGER = "sdpa", "attnhook, last layer", "attnhook, all layers", "output_attentions=True"
MODES = (PLAIN, LAST, ALL, EAGER)
KEYS, GROUPS = "all layers, key mass", "all layers, key mass of kv heads"
HEADS, ONE, OF_ALL = "all layers, every head", "one layer, one head", "all layers, one head"
MEASURED = {"usual": MODES, "key-mass": (ALL, KEYS, GROUPS), "heads": (ALL, HEADS, ONE, OF_ALL)}
#: What a mode captures beside prompt rows.
CAPTURED: dict[str, dict[str, Any]] = {
    LAST: {"layers": "last"},
    ALL: {"layers": "all"},
    KEYS: {"layers": "all", "key_mass": "mean"},
    GROUPS: {"layers": "all", "key_mass": "kv_head"},
    HEADS: {"layers": "all", "per_head": ["spans", "fingerprint", "top"], "spans": {"start": (0, 64)}},
    ONE: {"layers": "last", "heads": [0], "spans": {"start": (0, 64)}},
    OF_ALL: {"layers": "all", "heads": [0], "spans": {"start": (0, 64)}},
}


def main() -> None:
    """Run every mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over all modes")
    parser.add_argument("--measure", choices=list(MEASURED), default="usual")
    parser.add_argument("--child", choices=("time", *CAPTURED, PLAIN, EAGER), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.modes = MEASURED[options.measure]
    if options.child == "time":
        print(json.dumps(measure_time(options)))
    elif options.child:
        print(json.dumps(measure_memory(options, options.child)))
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Spawn the measuring processes and print the table in Markdown."""
    times = run_child("time")
    modes, base = options.modes, options.modes[0]
    rounds = [{mode: run_child(mode) for mode in modes} for _ in range(options.repeats)]
    memory = {mode: statistics.median(found[mode] for found in rounds) for mode in modes}
    import torch
    import transformers

    print(
        f"prompt {options.prompt_tokens} tokens, {options.new_tokens} new, top_k {options.top_k}, prompt rows captured"
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} threads, {options.repeats} interleaved rounds\n")
    print(f"ratios to {base}\n")
    print("| mode | time | range over rounds | CPU time | peak memory | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for mode in modes:
        wall = [a / b for a, b in zip(times[mode]["wall"], times[base]["wall"], strict=True)]
        cpu = [a / b for a, b in zip(times[mode]["cpu"], times[base]["cpu"], strict=True)]
        print(
            f"| {mode} | {statistics.median(wall):.2f} | {min(wall):.2f} to {max(wall):.2f} "
            f"| {statistics.median(cpu):.2f} | {memory[mode] / memory[base]:.2f} | {memory[mode] / 2**30:.2f} GiB |"
        )
    if HEADS in modes:
        for mode, runs, what in ((ONE, 270, "layer and head"), (OF_ALL, 9, "head, all layers in each")):
            ratio = [runs * a / b for a, b in zip(times[mode]["wall"], times[HEADS]["wall"], strict=True)]
            print(
                f"\n{runs} runs, one for each {what}: {statistics.median(ratio):.1f} times the one run with every head"
            )


def run_child(child: str) -> Any:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.transformers_capture", *sys.argv[1:], "--child", child]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


class Workload:
    """The model and its inputs."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from attnhook.backends.transformers import runner

        self.loaded = runner.load(options.model, dtype="float32")
        text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8") * 20
        ids = self.loaded.tokenizer(text)["input_ids"][: options.prompt_tokens]
        self.inputs = torch.tensor([ids], device=self.loaded.model.device)
        self.options = options
        self.rows = options.prompt_tokens - 1 + options.new_tokens

    def run(self, mode: str) -> None:
        """Generate once in ``mode``; checks that what the mode is for was really produced."""
        import torch

        import attnhook

        model, new = self.loaded.model, self.options.new_tokens
        model.set_attn_implementation("eager" if mode == EAGER else "sdpa")
        context: AbstractContextManager[Any] = nullcontext()
        if mode not in (PLAIN, EAGER):
            context = attnhook.capture(prompt=True, top_k=self.options.top_k, **CAPTURED[mode])
        with context as records, torch.no_grad():
            output = model.generate(
                self.inputs,
                attention_mask=torch.ones_like(self.inputs),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                output_attentions=mode == EAGER,
                return_dict_in_generate=True,
            )
        if mode == EAGER:
            assert len(output.attentions) == new
        if records is not None:
            assert len(records) == self.rows, f"{len(records)} records for {self.rows} rows"
            assert [mass.rows for mass in records.key_mass.values()] == [self.rows] * (mode in (KEYS, GROUPS))


def measure_time(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of wall and process CPU time per mode and round, after one round of warm-up.

    A round begins with output_attentions, whose gigabytes slow down what follows: an untimed run takes
    that on itself. The order of the others turns from round to round.
    """
    work = Workload(options)
    found: dict[str, dict[str, list[float]]] = {mode: {"wall": [], "cpu": []} for mode in options.modes}
    others = [mode for mode in options.modes if mode != EAGER]
    first = [EAGER, None] if EAGER in options.modes else []
    for round_number in range(options.repeats + 1):
        turn = round_number % len(others)
        for mode in (*first, *others[turn:], *others[:turn]):
            wall, cpu = time.perf_counter(), time.process_time()
            work.run(mode or PLAIN)
            if round_number and mode:
                found[mode]["wall"].append(time.perf_counter() - wall)
                found[mode]["cpu"].append(time.process_time() - cpu)
    return found


def measure_memory(options: argparse.Namespace, mode: str) -> int:
    """Peak resident bytes of this process after one run."""
    import resource

    Workload(options).run(mode)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
