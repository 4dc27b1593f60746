"""How long others wait while a server answers the largest request for attention that it allows.

One client sends small requests one after the other, another the largest one of each shape that passes the default byte
budget. Told is the slowest small request with and without the fields that ask, in turns, on one server. Exits with
status 1 where a shape's median ratio exceeds ``--bar``.

    python -m benchmarks.worst_request --engine vllm MODEL
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
import urllib.request
from typing import Any, NamedTuple

from attnhook.options import RequestOptions, resolve_layers
from attnhook.serving.budget import reply_bytes
from benchmarks.overhead import ENGINES, NAME, launched

CONTEXT = 2048
SMALL = {"model": NAME, "prompt": "Hi there", "max_tokens": 4, "ignore_eos": True}
#: Shape -> fields and new tokens, to a prompt as long as the budget allows; None: an answer as long as that.
SHAPES: dict[str, tuple[dict[str, Any], int | None]] = {
    "rows of a prompt, all layers, k = 256": (
        {"attention_layers": "all", "top_k_attention": 256, "attention_prompt": True},
        2,
    ),
    "rows of a prompt, all layers, fingerprints": (
        {"attention_layers": "all", "attention_mode": "fingerprint", "attention_prompt": True},
        2,
    ),
    "an answer, all layers, k = 256": ({"attention_layers": "all", "top_k_attention": 256}, None),
}


class Waited(NamedTuple):
    """One large request beside small ones."""

    slowest: float  # seconds of a small request
    large: float  # seconds of the large one
    size: int  # bytes of its reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bar", type=float, default=2.0, help="largest median ratio that passes (default: 2)")
    options = parser.parse_args()
    options.device, options.arguments = "cpu", []
    failed = False
    with launched(options, {"ATTNHOOK": "1"}) as ready:
        url = ready().url
        told = json.loads(_get(url + "/v1/attention/capabilities"))
        print(f"{options.engine} {told['engine']['version']}, at most {told['limits']['max_bytes']} bytes a request\n")
        print("shape | prompt + new tokens | reply, MiB | slowest small request, s | without asking, s | ratio")
        print("--- | --- | --- | --- | --- | ---")
        _measure(url, {**SMALL, "max_tokens": 2})  # the first of all compiles something
        for shape, (fields, new) in SHAPES.items():
            prompt, new = largest(fields, new, told)
            pairs = []
            for n in range(options.rounds):
                body = {"model": NAME, "max_tokens": new, "ignore_eos": True}
                # prompts of their own: none finds its beginning in the engine's cache
                one, other = ([504 + (start + at) % 4000 for at in range(prompt)] for start in (97 * n, 97 * n + 2000))
                asking = {**body, "prompt": one, "return_attention_tokens": True, **fields}
                pairs.append((_measure(url, asking), _measure(url, {**body, "prompt": other})))
            ratio = statistics.median(one.slowest / other.slowest for one, other in pairs)
            failed |= ratio > options.bar
            with_, without = (statistics.median(pair[n].slowest for pair in pairs) for n in (0, 1))
            size = pairs[0][0].size / 2**20
            print(f"{shape} | {prompt} + {new} | {size:.1f} | {with_:.2f} | {without:.2f} | {ratio:.2f}", flush=True)
    sys.exit(int(failed))


def largest(fields: dict[str, Any], new: int | None, told: dict[str, Any]) -> tuple[int, int]:
    """Prompt and new tokens of the largest request of a shape that the server allows."""
    options = RequestOptions.resolve(request=fields)
    layers, most = len(resolve_layers(options.layers, told["layers"])), told["limits"]["max_bytes"]

    def fits(n: int) -> bool:
        prompt, answer = (100, n) if new is None else (n, new)
        return prompt + answer < CONTEXT - 8 and reply_bytes(options, layers, prompt, answer) <= most

    low, high = 1, CONTEXT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return (100, low) if new is None else (low, new)


def _measure(url: str, body: dict[str, Any]) -> Waited:
    waits: list[float] = []
    over = threading.Event()

    def small() -> None:
        while not over.is_set():
            began = time.perf_counter()
            _post(url, SMALL)
            waits.append(time.perf_counter() - began)

    other = threading.Thread(target=small)
    other.start()
    try:
        time.sleep(1)
        began = time.perf_counter()
        reply = _post(url, body)
        took = time.perf_counter() - began
    finally:
        over.set()
        other.join()
    if "return_attention_tokens" in body and b'"attention_tokens":[{' not in reply:
        raise RuntimeError(f"no records came: {reply[:500]!r}")
    return Waited(max(waits), took, len(reply))


def _post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with contextlib.closing(urllib.request.urlopen(request, timeout=300)) as reply:
        data: bytes = reply.read()
    return data


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        data: bytes = reply.read()
    return data


if __name__ == "__main__":
    main()
