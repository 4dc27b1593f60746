"""How far the records of a bfloat16 model lie from float32 eager attention on the same token ids.

One prompt, every row and layer. The first line is the float32 model, the second the same model in
bfloat16: the difference is the engine's rounding of weights and activations. The third line shows how little
of it is ours: the bfloat16 model's records against the float64 kernel on the same queries and keys.

    python -m benchmarks.numerics_bf16
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Errors(NamedTuple):
    """Differences over all rows and layers."""

    largest: float  # of a probability, at the reported positions
    mean: float
    overlap: float  # share of the reported positions that the reference reports too


def main() -> None:
    """Measure and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--device", help="default: a GPU if there is one")
    options = parser.parse_args()

    import torch
    import transformers

    from attnhook.backends.transformers import runner

    loaded = runner.load(options.model, "float32", options.device)
    model = loaded.model
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][: options.tokens]], device=model.device)

    reference = eager(model, ids)
    found = {"float32, against eager float32": compare(captured(model, ids, options.top_k), reference)}
    model.to(torch.bfloat16)
    records = captured(model, ids, options.top_k)
    found["bfloat16, against eager float32"] = compare(records, reference)
    os.environ["ATTNHOOK_KERNEL"] = "naive"  # the definition, in float64
    exact = captured(model, ids, options.top_k)
    found["bfloat16, against the float64 kernel"] = compare(records, {i: dense(exact, i) for i in reference})

    print(f"{loaded.name}, {ids.shape[1]} rows x {len(reference)} layers, top_k {options.top_k}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"{platform.machine()} {model.device.type}\n")
    print(f"| records | max abs dP | mean abs dP | top-{options.top_k} overlap |")
    print("| --- | --- | --- | --- |")
    for name, errors in found.items():
        print(f"| {name} | {errors.largest:.1e} | {errors.mean:.1e} | {errors.overlap:.4f} |")


def captured(model: Any, ids: Any, top_k: int) -> list[Any]:
    """Records of every row and layer of one forward pass with sdpa attention."""
    import torch

    import attnhook

    model.set_attn_implementation("sdpa")
    with torch.no_grad(), attnhook.capture(layers="all", prompt=True, top_k=top_k) as records:
        model(ids, use_cache=False)
    assert len(records) == ids.shape[1], f"{len(records)} records for {ids.shape[1]} rows"
    return records


def eager(model: Any, ids: Any) -> dict[int, np.ndarray]:
    """Head-averaged attention float32 ``[rows, keys]`` by layer."""
    import torch

    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    return {i: weights[0].mean(0, dtype=torch.float64).float().cpu().numpy() for i, weights in enumerate(attentions)}


def dense(records: list[Any], layer: int) -> np.ndarray:
    """The records' scores as ``[rows, keys]``, 0 where nothing was reported."""
    scores = np.zeros((len(records), len(records)), np.float32)
    for record in records:
        for position, score in record.top(layer):
            scores[record.query_position, position] = score
    return scores


def compare(records: list[Any], reference: dict[int, np.ndarray]) -> Errors:
    """Differences at the positions that the records report."""
    differences: list[float] = []
    shared = total = 0
    for record in records:
        for layer in record.layers:
            row = reference[layer][record.query_position, : record.query_position + 1]
            top = record.top(layer)
            best = set(np.argsort(-row, kind="stable")[: len(top)].tolist())
            differences += [abs(float(row[position]) - score) for position, score in top]
            shared += sum(position in best for position, _ in top)
            total += len(top)
    return Errors(max(differences), float(np.mean(differences)), shared / total)


if __name__ == "__main__":
    main()
