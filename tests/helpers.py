"""A tiny model without weights, and real Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS, PROMPT, NEW = 3, 7, 5  # layers of the tiny model; tokens of its prompt and of its answer


def tiny_model(**config: Any) -> Any:
    """A random LlamaForCausalLM, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def byte_tokenizer() -> Any:
    """A tokenizer with one token per UTF-8 byte and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def generate(model: Any, new: int = NEW) -> list[int]:
    """Token ids of a prompt of PROMPT tokens and its greedy answer."""
    import torch

    ids = torch.arange(2, 2 + PROMPT)[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0].tolist()


def environment(**environ: str) -> dict[str, str]:
    """This process's environment with the repository on the path and one thread per process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environ}


def python(*arguments: str, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments``; code after ``-c`` may be indented."""
    return subprocess.run(
        [sys.executable, *(textwrap.dedent(argument) for argument in arguments)],
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
