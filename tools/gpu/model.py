"""A model made on the spot from a config: random weights, so nothing is carried, but the size of a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: About 0.85 billion parameters, four query heads to a key head, as current models have.
SIZE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
REHEARSED = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(folder: Path, *, device: str, rehearse: bool = False, positions: int = 4096) -> Path:
    """Write a Llama in bfloat16 with a tokenizer to ``folder``, the same weights each time on one kind of device.

    Queries and keys are drawn twice as wide as usual, so that attention has peaks.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **(REHEARSED if rehearse else SIZE), max_position_embeddings=positions, tie_word_embeddings=False
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(2)
    model.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def tokenizer(vocabulary: int) -> Any:
    """One token per byte; the rest of the vocabulary has names, so that whatever the model says can be decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<{n}>" for n in range(len(alphabet), vocabulary))]
    found = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def oracle(folder: Path, device: str) -> Any:
    """The same weights in float32 with eager attention, in Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.to(device).eval()
