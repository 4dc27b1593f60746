"""The size of a reply, estimated before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attnhook import OptionError, TokenRecord
from attnhook.capture.rows import prompt_rows
from attnhook.options import RequestOptions
from attnhook.record import fingerprint as fp
from attnhook.serving.budget import REPEATED, check_repeating, check_reply, reply_bytes
from attnhook.serving.replies import Attention


def reply(options: RequestOptions, layers: int, prompt: int, new: int) -> int:
    """Bytes of JSON of random records."""
    random = np.random.default_rng(0)

    def record(step: int | None, position: int) -> TokenRecord:
        k = min(options.top_k, position + 1)
        scores = np.sort(random.dirichlet(np.ones(k), layers).astype(np.float32))[:, ::-1]
        positions = np.stack([random.permutation(position + 1)[:k] for _ in range(layers)]).astype(np.int32)
        numbers = np.concatenate([random.random((layers, 4)), random.dirichlet(np.ones(16), layers)], axis=1).astype(
            np.float32
        )
        numbers[:, :3] = np.stack([numbers[:, 4:7].sum(1), numbers[:, 7:12].sum(1), numbers[:, 12:].sum(1)], 1)
        names = tuple(options.spans)
        one = TokenRecord("r", position, tuple(range(layers)), positions, scores, numbers, mode=options.mode)
        mass = random.random((layers, len(names))).astype(np.float32)

        def each(*shape: int) -> np.ndarray:
            return random.random((layers, HEADS, *shape)).astype(np.float32)

        shapes = {"fingerprint": (20,), "spans": (len(names),), "sink": (), "lse": ()}
        fields = {"fingerprint": "fingerprints", "spans": "span_mass", "sink": "sink_mass", "lse": "lse"}
        told: dict[str, Any] = {f"head_{fields[n]}": each(*shapes[n]) for n in shapes if n in options.per_head}
        if "top" in options.per_head:
            told["head_scores"] = each(options.top_k_per_head)
            told["head_positions"] = random.integers(0, position + 1, told["head_scores"].shape).astype(np.int32)
        sink = numbers[:, 4:][:, [fp.bin_of(position)]].ravel() / 2
        return replace(one, decode_step=step, span_names=names, span_mass=mass, sink_mass=sink, **told)

    rows = Attention(
        [record(step, prompt - 1 + step) for step in range(0, new, options.stride)][: options.max_tokens],
        [record(None, position) for position in prompt_rows(options, 0, prompt - 1)],
    )
    rows.encoding_format = options.encoding_format
    return len(json.dumps(rows.fields(), ensure_ascii=False, separators=(",", ":")))


HEADS = 9
SPANS = {"x" * 200: (0, 9), "\u00e9" * 100: (9, 20)}
CASES: list[tuple[dict[str, Any], int, int, int]] = [
    ({}, 1, 300, 20),
    ({"top_k": 256, "prompt": True}, 6, 300, 4),
    ({"top_k": 8, "mode": "sketch"}, 30, 50, 12),
    ({"mode": "fingerprint", "spans": SPANS}, 30, 50, 12),
    ({"spans": SPANS, "stride": 3, "max_tokens": 4}, 5, 90, 30),
    ({"top_k": 1}, 1, 2, 1),
    ({"spans": SPANS, "per_head": ("spans", "fingerprint", "sink", "top", "lse"), "top_k_per_head": 16}, 5, 90, 30),
    ({"per_head": ("top",)}, 5, 90, 30),
    ({"per_head": ("lse",), "top_k": 1}, 5, 90, 30),
    ({"rows": ((2, 5), (7, 60), (80, 90)), "top_k": 16}, 2, 90, 3),
    ({"per_head": ("spans",), "spans": {"a": (0, 4)}, "top_k": 1}, 5, 90, 3),
]


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(("options", "layers", "prompt", "new"), CASES)
def test_it_is_never_too_small_and_not_far_too_large(
    options: Any, layers: int, prompt: int, new: int, encoding: str
) -> None:
    asked = RequestOptions(**options, encoding_format=encoding)
    true, estimate = reply(asked, layers, prompt, new), reply_bytes(asked, layers, prompt, new, HEADS)
    assert true <= estimate <= 2 * true + 400, (true, estimate)


def test_too_much_is_refused_with_the_numbers_and_the_remedies() -> None:
    options = RequestOptions(top_k=256, prompt=True)
    size = reply_bytes(options, 30, 500, 4)
    assert check_reply(options, 30, 500, 4, 2, 2 * size) == 2 * size
    with pytest.raises(OptionError) as caught:
        check_reply(options, 30, 500, 4, 2, 2 * size - 1)
    for part in (str(2 * size), str(2 * size - 1), "8 generated rows and 998 of the prompt", "no attention_prompt"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match=f"and {size} of the request's other prompts"):
        check_reply(options, 30, 500, 4, 1, 2 * size - 1, already=size)


@pytest.mark.parametrize("options", [RequestOptions(), RequestOptions(prompt=True, layers="all", top_k=8)])
def test_a_stream_that_repeats_is_measured_by_all_of_its_events(options: RequestOptions) -> None:
    prompt, new = 60, 12
    total = sum(reply(options, 3, prompt, tokens) for tokens in range(1, new + 1))
    most = next(limit for limit in range(1000, 10**7, 500) if _allowed(options, prompt, new, limit))
    assert total <= most * REPEATED <= 2.5 * total
    with pytest.raises(OptionError, match="each event repeats all before it"):
        check_repeating(options, 3, prompt, new, 1, most - 500)


def _allowed(options: RequestOptions, prompt: int, new: int, limit: int) -> bool:
    try:
        check_repeating(options, 3, prompt, new, 1, limit)
    except OptionError:
        return False
    return True
