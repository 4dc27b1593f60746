"""Compare captured records with eager attention's own matrices on a short prompt: the exact oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnhook.backends.transformers import runner
from attnhook.options import RequestOptions
from attnhook.plugins.contracts import SelfCheck
from attnhook.process.capturing import capture
from attnhook.record import fingerprint

TOLERANCE = 2e-5  # of a probability, float32 against eager float32
BIN_TOLERANCE = 1e-4  # of a histogram bin, the sum of many
_PROMPT = "Why is the sky blue? Answer in one sentence."
_NEW_TOKENS = 12
_TOP_K = 8
_OPTIONS = RequestOptions(top_k=_TOP_K, layers="all", prompt=True)  # in full: ATTNHOOK_* must not change the check


@dataclass(frozen=True)
class Comparison:
    """What `compare_with_eager` found."""

    model: str
    rows: int
    expected_rows: int
    layers: int
    worst: float  # largest difference of a probability; NaN if a record holds one
    worst_bin: float  # largest difference of a histogram bin
    same_order: float  # share of top-k lists with the oracle's positions, up to ties
    same_text: bool  # whether capture left the generated tokens as they were


def run(model: str | None = None) -> SelfCheck:
    """`compare_with_eager` as ``attnhook verify`` reports it. Raises as it does."""
    result = compare_with_eager(model)
    found = {
        "model": result.model,
        "rows x layers compared": f"{result.rows} x {result.layers}",
        "largest |dP|": f"{result.worst:.1e} (allowed {TOLERANCE:.0e})",
        "largest |d histogram bin|": f"{result.worst_bin:.1e} (allowed {BIN_TOLERANCE:.0e})",
        "top-k lists equal up to ties": f"{result.same_order:.2%}",
        "answer with capture = without": "yes" if result.same_text else "NO",
    }
    problems = []
    if result.rows != result.expected_rows:
        problems.append(f"{result.rows} of {result.expected_rows} rows were captured")
    if not result.worst <= TOLERANCE:  # NaN is one too
        problems.append(f"probabilities differ from eager attention by {result.worst:.1e}")
    if not result.worst_bin <= BIN_TOLERANCE:
        problems.append(f"fingerprints differ from eager attention by {result.worst_bin:.1e}")
    if result.same_order < 1:
        problems.append(f"only {result.same_order:.2%} of the top-k lists equal those of eager attention")
    if not result.same_text:
        problems.append("the model's answer changes when capture is on")
    return SelfCheck("self-check against eager attention", found, problems)


def compare_with_eager(model: str | None = None) -> Comparison:
    """Generate with capture of every layer and row, then run eager attention on the same tokens, float32.

    Raises OptionError or UnsupportedError where the model cannot be loaded or captured.
    """
    import torch

    loaded = runner.load(model, dtype="float32")
    network = loaded.model
    if getattr(network.config.get_text_config(), "attn_logit_softcapping", None):
        network.set_attn_implementation("eager")  # sdpa leaves the cap out, so it is no match for the oracle
    ids = runner.encode(loaded, _PROMPT, chat=True, max_new_tokens=_NEW_TOKENS)
    plain = runner.generate(loaded, ids, _NEW_TOKENS)
    with capture(model=network, **vars(_OPTIONS)) as records:
        output = runner.generate(loaded, ids, _NEW_TOKENS)
    used = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = network(output[:, :-1], output_attentions=True, use_cache=False).attentions
    finally:
        network.set_attn_implementation(used)

    differences, bin_differences, same = [0.0], [0.0], []
    for record in records:
        keys = record.query_position + 1
        bins = [fingerprint.bin_of(keys - 1 - position) for position in range(keys)]
        for i, layer in enumerate(record.layers):
            row = attentions[layer][0, :, keys - 1, :keys].mean(0).cpu().numpy()
            histogram = np.bincount(bins, weights=row, minlength=fingerprint.BINS)
            bin_differences.append(np.abs(record.fingerprints[i][fingerprint.HISTOGRAM] - histogram).max())
            kept = record.token_positions[i] >= 0
            found = row[record.token_positions[i][kept]]
            differences += np.abs(found - record.attention_scores[i][kept]).tolist()
            best = np.sort(row)[::-1][:_TOP_K]
            best = best[: max(len(found), np.count_nonzero(best))]  # what a window hides is exactly 0
            same.append(len(found) == len(best) and bool((np.abs(found - best) <= TOLERANCE).all()))
    return Comparison(
        model=loaded.name,
        rows=len(records),
        expected_rows=output.shape[1] - 1,  # nothing is computed from the last token
        layers=len(records[0].layers) if records else 0,
        worst=float(np.max(differences)),
        worst_bin=float(np.max(bin_differences)),
        same_order=sum(same) / max(len(same), 1),
        same_text=bool(torch.equal(plain, output)),
    )
