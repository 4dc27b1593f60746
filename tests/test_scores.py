"""The code of docs/scores.md on SmolLM2, against the same formulas on eager attention matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import ROOT

pytestmark = [pytest.mark.model, pytest.mark.slow]

WINDOW, NEW = 16, 12


@pytest.fixture(scope="module")
def page() -> dict[str, Callable[..., Any]]:
    """What the page's blocks define, in their order."""
    text = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/scores.md", "exec"), names)
    return names


class Prompt:
    """A question about two documents, with the places of its parts, and its greedy answer's attention."""

    def __init__(self, model: Any, tokenizer: Any, question: str) -> None:
        self.parts: dict[str, tuple[int, int]] = {}
        ids: list[int] = []
        for name, text in {
            "instruction": "Answer from the documents, word for word.\n",
            "first": "The brig Halcyon brought 212 barrels of olive oil from Lisbon.\n",
            "second": "The schooner Marigold took salted cod to Bergen, and came back with timber in May.\n",
            "query": question,
            "end": "\nThe brig Halcyon brought 212 barrels of",
        }.items():
            new = tokenizer(text)["input_ids"]
            self.parts[name] = len(ids), len(ids) + len(new)
            ids += new
        self.n = len(ids)
        tokens = torch.tensor([ids])
        self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.settings = {"max_new_tokens": NEW, "do_sample": False}
        self.tokens = model.generate(**self.inputs, **self.settings)[0].tolist()
        self.attention = matrices(model, self.tokens[:-1])


def matrices(model: Any, ids: list[int]) -> np.ndarray:
    """Eager attention [L, H, q, kv] in float64."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
    return torch.stack([layer[0] for layer in found]).double().numpy()


@pytest.fixture(scope="module")
def asked(smol: Any, tokenizer: Any) -> Prompt:
    return Prompt(smol, tokenizer, "What did the Halcyon bring from Lisbon?")


@pytest.fixture(scope="module")
def empty(smol: Any, tokenizer: Any) -> Prompt:
    return Prompt(smol, tokenizer, "N/A")


def close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    assert np.shape(found) == np.shape(wanted)
    assert np.isfinite(wanted).all() and np.ptp(wanted) > 0
    assert np.allclose(found, wanted, atol=tolerance), np.abs(np.asarray(found) - wanted).max()


def test_lookback_ratio(page: dict[str, Any], smol: Any, asked: Prompt) -> None:
    found = page["lookback_ratios"](smol, asked.inputs, asked.n, **asked.settings)
    n, wanted = asked.n, []
    for row in range(n, n + NEW - 1):
        a = asked.attention[:, :, row]
        context, new = a[..., :n].mean(-1), a[..., n : row + 1].mean(-1)
        wanted.append(context / (context + new))
    close(found, np.stack(wanted), 1e-4)


def test_focus_score(page: dict[str, Any], smol: Any, asked: Prompt) -> None:
    heads = [(3, 0), (11, 7), (20, 4), (29, 8)]
    found = page["focus_score"](smol, asked.inputs, asked.parts["instruction"], heads)
    start, end = asked.parts["instruction"]
    mass = asked.attention[:, :, asked.n - 1, start:end].sum(-1)
    wanted = np.mean([mass[layer, head] for layer, head in heads])
    assert found == pytest.approx(wanted, abs=2e-5) and 0 < wanted < 1


def test_retrieval_score(page: dict[str, Any], smol: Any, asked: Prompt) -> None:
    start, end = asked.parts["first"]
    found = page["retrieval_scores"](smol, asked.inputs, (start, end), **asked.settings)
    needle = asked.tokens[start:end]
    layers, heads = asked.attention.shape[:2]
    wanted = np.zeros((layers, heads))
    for layer in range(layers):
        for head in range(heads):
            copied = set()
            for step in range(NEW):
                row, token = asked.n - 1 + step, asked.tokens[asked.n + step]
                best = int(asked.attention[layer, head, row, : row + 1].argmax())
                if start <= best < end and asked.tokens[best] == token:
                    copied.add(token)
            wanted[layer, head] = len(copied & set(needle)) / len(set(needle))
    close(found, wanted)
    assert wanted.max() > 0.1  # some head does copy


def test_document_scores(page: dict[str, Any], smol: Any, asked: Prompt, empty: Prompt) -> None:
    documents = [asked.parts["first"], asked.parts["second"]]
    scores, wanted = [], []
    for prompt in (asked, empty):
        start, end = prompt.parts["query"]
        scores.append(page["token_scores"](smol, prompt.inputs, (start, end), 9))
        wanted.append(prompt.attention[:, :, start:end].sum((0, 1)).mean(0)[:end])
        close(scores[-1], wanted[-1], 1e-3)  # a sum over 270 heads
    found = page["document_scores"](*scores, documents)
    close(found, page["document_scores"](*wanted, documents), 1e-2)
    assert found[0] > found[1]  # the question is about the first


def test_window_score(page: dict[str, Any], smol: Any, asked: Prompt) -> None:
    found = page["window_scores"](smol, asked.inputs, asked.n, WINDOW)
    n = asked.n
    by_group = asked.attention.reshape(30, 3, 3, *asked.attention.shape[2:]).mean(2)
    votes = torch.from_numpy(by_group[:, :, n - WINDOW : n, : n - WINDOW].sum(2))
    pooled = torch.nn.functional.avg_pool1d(votes, 5, stride=1, padding=2).numpy()
    assert list(found) == list(range(30))
    close(np.stack(list(found.values())), pooled)


def test_accumulated_score(page: dict[str, Any], smol: Any, asked: Prompt) -> None:
    found = page["accumulated_scores"](smol, asked.inputs, **asked.settings)
    by_group = asked.attention.reshape(30, 3, 3, *asked.attention.shape[2:]).mean(2)
    close(np.stack(list(found.values())), by_group.sum(2), 1e-4)
