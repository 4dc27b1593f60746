"""Compare captured records with eager attention's own matrices on a short prompt: the exact oracle."""

from __future__ import annotations

from dataclasses import dataclass

from attnhook import lifecycle
from attnhook.backends.transformers import runner
from attnhook.capture import capture

TOLERANCE = 2e-5  # float32 against eager float32
_PROMPT = "Why is the sky blue? Answer in one sentence."
_NEW_TOKENS = 12
_TOP_K = 8


@dataclass(frozen=True)
class Comparison:
    """What `compare_with_eager` found."""

    model: str
    rows: int
    layers: int
    worst: float  # largest difference of a probability
    same_order: float  # share of top-k lists with the oracle's positions, up to ties
    same_text: bool  # whether capture left the generated tokens as they were
    installations: dict[str, dict[str, str]]


def compare_with_eager(model: str | None = None) -> Comparison:
    """Generate with capture of every layer and row, then run eager attention on the same tokens, float32.

    Raises OptionError or UnsupportedError where the model cannot be loaded or captured.
    """
    import torch

    loaded = runner.load(model, dtype="float32")
    network = loaded.model
    ids = runner.encode(loaded, _PROMPT, chat=True, max_new_tokens=_NEW_TOKENS)
    inputs = torch.tensor([ids], device=network.device)

    def generate() -> torch.Tensor:
        output: torch.Tensor = network.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=_NEW_TOKENS, do_sample=False
        )
        return output

    plain = generate()
    with capture(model=network, top_k=_TOP_K, layers="all", prompt=True) as records:
        output = generate()
        installed = {name: found.describe() for name, found in lifecycle.installed().items()}
    used = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = network(output[:, :-1], output_attentions=True, use_cache=False).attentions
    finally:
        network.set_attn_implementation(used)

    worst, same, lists = 0.0, 0, 0
    for record in records:
        for i, layer in enumerate(record.layers):
            row = attentions[layer][0, :, record.query_position, : record.query_position + 1].mean(0).cpu()
            kept = [(p, s) for p, s in zip(record.token_positions[i], record.attention_scores[i], strict=True) if p >= 0]
            worst = max([worst, *(abs(float(row[p]) - float(s)) for p, s in kept)])
            best = torch.topk(row, len(kept)).values
            lists += 1
            same += all(abs(float(row[p]) - float(b)) <= TOLERANCE for (p, _), b in zip(kept, best, strict=True))
    return Comparison(
        model=loaded.name,
        rows=len(records),
        layers=len(records[0].layers) if records else 0,
        worst=worst,
        same_order=same / max(lists, 1),
        same_text=bool(torch.equal(plain, output)) and bool(records),
        installations=installed,
    )
