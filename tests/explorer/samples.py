"""Reports to test with: small and exact, hostile, and large."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from attnhook.explorer.report import Report
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord

LEGEND = {
    "near": ("#0072b2", "Looks at its neighbours."),
    "far": ("#009e73", "Looks far back."),
    "unseen": ("#6b7785", "No row of these tests is here."),
}
PROMPT, ANSWER, LAYERS, K = 12, 20, (3, 7, 11), 6


def make_records(tokens: int, prompt: int, layers: tuple[int, ...], k: int, *, prompt_rows: bool) -> list[TokenRecord]:
    """Records with a heavy sink at position 0, scores that are true probabilities and exact histograms."""
    rng = np.random.default_rng(7)
    records = []
    for position in range(0 if prompt_rows else prompt - 1, tokens - 1):
        logits = rng.normal(0, 1.5, (len(layers), position + 1))
        logits[:, 0] = 6
        a = np.exp(logits)
        a /= a.sum(1, keepdims=True)
        width = min(k, position + 1)
        best = np.argsort(-a, axis=1, kind="stable")[:, :width]
        positions = np.full((len(layers), k), -1, np.int32)
        scores = np.zeros((len(layers), k), np.float32)
        positions[:, :width] = best
        scores[:, :width] = np.take_along_axis(a, best, 1)
        histogram = np.zeros((len(layers), fp.BINS))
        for key in range(position + 1):
            histogram[:, fp.bin_of(position - key)] += a[:, key]
        entropy = -(a * np.log(a)).sum(1) / np.log(max(position + 1, 2))
        records.append(
            TokenRecord(
                request_id="r",
                query_position=position,
                layers=layers,
                token_positions=positions,
                attention_scores=scores,
                fingerprints=fp.assemble(histogram, entropy),
                decode_step=position - prompt + 1 if position >= prompt - 1 else None,
            )
        )
    return records


def make_report(records: list[TokenRecord] | None = None, **changes: Any) -> Report:
    if records is None:
        records = make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=True)
    report = Report(
        title="A model",
        subtitle="an engine, today",
        tokens=[f" w{i}" for i in range(PROMPT + ANSWER)],
        prompt_length=PROMPT,
        records=records,
        zones=["near" if r.query_position % 3 else "far" for r in records],
        zone_confidence=[0.5 + r.query_position % 50 / 100 for r in records],
        zone_legend=LEGEND,
    )
    return dataclasses.replace(report, **changes)


HOSTILE = [
    "</script><img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "\"'&amp;",
    "\u2028\ud800",
    "\ufffd",
    "👩‍🔬",
    "",
    "\x00\x1b",
]


def hostile_report() -> Report:
    tokens = [HOSTILE[i % len(HOSTILE)] for i in range(PROMPT + ANSWER)]
    legend = {
        "near</script><b>": ("red;background:url(https://example.org)", "<i>'\"&</i>"),
        "far": ("#009e73", "</dl><script>window.hacked=1</script>"),
    }
    report = make_report(tokens=tokens, title="<script>window.hacked=1</script>\ud800", subtitle='"><img src=x>')
    zones = ["near</script><b>" if zone == "near" else zone for zone in report.zones]
    return dataclasses.replace(report, zones=zones, zone_legend=legend)


def large_report(tokens: int = 4000, layers: int = 30, k: int = 32) -> Report:
    rng = np.random.default_rng(1)
    records = []
    for position in range(tokens - 1):
        width = min(k, position + 1)
        positions = np.full((layers, k), -1, np.int32)
        positions[:, :width] = np.sort(rng.integers(0, position + 1, (layers, width)))
        positions[:, 0] = 0
        scores = np.sort(rng.dirichlet(np.full(k, 0.3), layers).astype(np.float32), axis=1)[:, ::-1]
        numbers = rng.random((layers, fp.SIZE), np.float32)
        records.append(
            TokenRecord("r", position, tuple(range(layers)), positions, scores * (positions >= 0), numbers, position)
        )
    texts = ["\n" if i % 60 == 59 else f" word{i % 97}" for i in range(tokens)]
    zones, sure = ["near"] * len(records), [0.9] * len(records)
    return Report("Large", "", texts, tokens * 3 // 4, records, zones, sure, LEGEND)
