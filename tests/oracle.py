"""The oracle: Transformers eager attention on the same token ids, and the exact comparison with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from attnhook import TokenRecord
from attnhook.record.fingerprint import BIN_STARTS, BINS, ENTROPY, HISTOGRAM, LOCAL, LONG, MID
from attnhook.record.key_mass import KeyMass

PROBABILITY = 2e-5  # max |dP| against eager at float32 (DESIGN section 3)
FEATURE = 1e-4  # histogram, masses, entropy


@contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """Run the model with eager attention inside the block."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(used)


Heads = tuple[int, ...] | None


def eager_attention(
    model: torch.nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Head-averaged eager attention ``[B, q, kv]`` float32 (summed in float64) by layer."""
    return eager_attention_of(model, ids, attention_mask, selections=(None,))[None]


def eager_attention_of(
    model: torch.nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    selections: Sequence[Heads],
) -> dict[Heads, dict[int, torch.Tensor]]:
    """`eager_attention` for several selections of heads, from one forward pass.

    Taken from the attention modules as they run, because ``output_attentions=True`` would hold every head's
    matrix of every layer at once (4 GiB for 2,000 tokens here). `test_oracle_is_output_attentions` shows
    that they are the same tensors.
    """
    found: dict[Heads, dict[int, torch.Tensor]] = {heads: {} for heads in selections}

    def keep(module: torch.nn.Module, _: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        for heads in selections:
            weights = output[1] if heads is None else output[1][:, list(heads)]
            found[heads][module.layer_idx] = weights.mean(1, dtype=torch.float64).float()

    handles = [m.register_forward_hook(keep) for m in model.modules() if getattr(m, "is_causal", False)]
    try:
        with eager(model), torch.no_grad():
            positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
            model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass
class Worst:
    """Largest errors seen by `compare`."""

    probability: float = 0.0
    feature: float = 0.0
    span: float = 0.0
    rows: int = 0
    sinks: int = 0  # of these, rows whose sink mass was compared
    order: int = 0  # top-k lists whose positions differ by more than ties


SPANS = {"head": (0, 5), "middle": (4, 30), "beyond": (10_000, 20_000)}


def compare(
    records: Sequence[TokenRecord],
    attention: dict[int, torch.Tensor],
    *,
    sequence: int = 0,
    pad: int = 0,
    top_k: int,
    windows: dict[int, int] | None = None,
    sinks: bool = False,
) -> Worst:
    """Largest differences between records of one sequence and the oracle's ``[B, q, kv]`` matrices.

    ``pad`` is the number of padding tokens on the left; ``windows`` gives sliding-window sizes by layer.
    """
    worst = Worst()
    p = torch.tensor([record.query_position for record in records])
    for i, layer in enumerate(records[0].layers):
        assert all(record.layers[i] == layer for record in records)
        first = (p + 1 - (windows or {}).get(layer, 10**9)).clamp(min=0)
        rows = attention[layer][sequence, pad + p, pad : pad + int(p.max()) + 1].double()  # [R, n]
        s = torch.arange(rows.shape[1])
        visible = (s <= p[:, None]) & (s >= first[:, None])
        assert float(rows[~visible].abs().sum()) == 0, "the oracle attends to a key that is said to be invisible"
        worst.rows += len(records)
        positions = torch.from_numpy(np.stack([record.token_positions[i] for record in records])).long()
        scores = torch.from_numpy(np.stack([record.attention_scores[i] for record in records])).double()
        _compare_top(worst, positions, scores, rows, visible, top_k)
        fingerprints = torch.from_numpy(np.stack([record.fingerprints[i] for record in records])).double()
        _compare_features(worst, fingerprints, rows, p, p - first + 1, sinks)
        kept = [float(record.sink_mass[i]) for record in records if record.sink_mass is not None]
        assert len(kept) in (0, len(records)), "some rows have the sink's mass and some have not"
        worst.sinks += len(kept)
        if kept:
            worst.span = max(worst.span, float((torch.tensor(kept) - rows[:, 0]).abs().max()))
        for n, name in enumerate(records[0].span_names):
            start, end = SPANS[name]
            mass = torch.tensor([float(record.span_mass[i, n]) for record in records])
            worst.span = max(worst.span, float((mass - rows[:, start:end].sum(-1)).abs().max()))
    return worst


def _compare_top(
    worst: Worst,
    positions: torch.Tensor,
    scores: torch.Tensor,
    rows: torch.Tensor,
    visible: torch.Tensor,
    top_k: int,
) -> None:
    kept = positions >= 0
    assert torch.equal(kept.sum(-1), visible.sum(-1).clamp(max=top_k)), "wrong number of positions"
    assert bool((scores[:, :-1] >= scores[:, 1:]).all()) and bool((scores[~kept] == 0).all())
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in positions), "a position twice"
    assert bool(visible.gather(1, positions.clamp(min=0))[kept].all()), "an invisible position"
    k = min(top_k, rows.shape[1])
    assert not bool(kept[:, k:].any())
    best = torch.topk(rows.masked_fill(~visible, -1.0), k).values
    truth = rows.gather(1, positions.clamp(min=0))[:, :k]
    kept, scores = kept[:, :k], scores[:, :k]
    error = torch.maximum((truth - scores).abs(), (best - scores).abs())
    worst.probability = max(worst.probability, float(error[kept].max()))
    # the position at each rank must be one whose true score ties with the true score of that rank
    worst.order += int((((truth - best).abs() > PROBABILITY) & kept).any(-1).sum())


def _compare_features(
    worst: Worst, fingerprints: torch.Tensor, rows: torch.Tensor, p: torch.Tensor, seen: torch.Tensor, sinks: bool
) -> None:
    before = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))  # mass in front of each position

    def mass(start: int, end: int) -> torch.Tensor:  # of distances start <= d < end
        low, high = (p - end + 1).clamp(min=0), (p - start + 1).clamp(min=0)
        return (before.gather(1, high[:, None]) - before.gather(1, low[:, None]))[:, 0]

    ends = [*BIN_STARTS[1:], 1 << 40]
    expected = {HISTOGRAM.start + i: mass(BIN_STARTS[i], ends[i]) for i in range(BINS)}
    expected |= {LOCAL: mass(0, 8), MID: mass(8, 256), LONG: mass(256, 1 << 40)}
    a = rows / rows.sum(-1, keepdim=True) if sinks else rows
    expected[ENTROPY] = torch.special.entr(a).sum(-1) / seen.double().log().clamp(min=1e-9)
    assert sorted(expected) == list(range(20))
    for index, value in expected.items():
        worst.feature = max(worst.feature, float((fingerprints[:, index] - value).abs().max()))


def of_head(records: Sequence[TokenRecord], head: int) -> list[TokenRecord]:
    """Records that tell of one head what these tell of it."""
    found = []
    for record in records:
        told = [getattr(record, f"head_{name}") for name in ("positions", "scores", "fingerprints", "sink_mass")]
        positions, scores, prints, sink = (array[:, head] for array in told)
        mass = np.zeros((len(record.layers), 0)) if record.head_span_mass is None else record.head_span_mass[:, head]
        changes = {"token_positions": positions, "attention_scores": scores, "fingerprints": prints, "sink_mass": sink}
        found.append(replace(record, span_mass=mass, **changes))
    return found


def check_heads(
    model: torch.nn.Module, ids: Sequence[int], records: Sequence[TokenRecord], *, top_k: int, heads: Sequence[int]
) -> None:
    """Each of these heads of a sequence's records against its own eager attention, within the numerics contract."""
    attention = eager_attention_of(model, torch.tensor([[*ids]]), selections=[(head,) for head in heads])
    for head in heads:
        check(compare(of_head(records, head), attention[(head,)], top_k=top_k))
    assert all(np.isfinite(record.head_lse).all() for record in records)


def check_heads_by_layer(
    model: torch.nn.Module,
    ids: Sequence[int],
    records: Sequence[TokenRecord],
    heads: Mapping[int, Sequence[int]],
    *,
    top_k: int,
) -> None:
    """A sequence's records, whose mean is over these heads of each layer (others: all), against eager attention."""
    chosen = {layer: tuple(some) for layer, some in heads.items()}
    found = eager_attention_of(model, torch.tensor([[*ids]]), selections=[None, *set(chosen.values())])
    attention = {layer: found[chosen.get(layer)][layer] for layer in records[0].layers}
    check(compare(records, attention, top_k=top_k))


def check_key_mass(attention: dict[int, torch.Tensor], mass: KeyMass, rows: Sequence[TokenRecord]) -> None:
    """The key mass of one sequence's records against the columns of ``attention`` [1, q, kv] by layer."""
    positions = torch.tensor([record.query_position for record in rows])
    assert mass.rows == len(rows) > 0 and tuple(mass) == rows[0].layers
    for layer, own in mass.items():
        wanted = attention[layer][0, positions, : int(positions.max()) + 1].double().sum(0)
        error = (torch.from_numpy(own.copy()) - wanted).abs()
        # rows may err alike; one that is missing, or there twice, shows as at least a hundredth
        assert own.shape == wanted.shape and float(error.max()) <= min(PROBABILITY * len(rows), 5e-3), error.max()


def check(worst: Worst, *, probability: float = PROBABILITY) -> None:
    """Assert that every error is within the numerics contract."""
    assert worst.rows > 0, "nothing was compared"
    assert worst.probability <= probability, worst
    assert worst.feature <= FEATURE, worst
    assert worst.span <= FEATURE, worst
    assert worst.sinks == worst.rows, "a row tells no sink mass"
    assert worst.order == 0, worst
