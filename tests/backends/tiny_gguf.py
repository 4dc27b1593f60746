"""A Gemma 3 of a few thousand random numbers in a GGUF file that Transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

BOS = 2
_WIDTH, _HEADS, _SIZE, _HIDDEN, _LAYERS = 32, 2, 16, 64, 2
_WORDS = ("▁the", "▁cat", "▁sat", "the", "cat", "sat", "hello", "▁hello")
_LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()[]{}<>_-+*/='\"#\n"


def write(path: Path, **metadata: Any) -> Path:
    """Write the file; ``metadata`` is of the tokenizer: ``add_bos_token``, ``bos_token_id``, ``chat_template``."""
    import gguf

    out = gguf.GGUFWriter(path, "gemma3")
    out.add_context_length(512)
    out.add_embedding_length(_WIDTH)
    out.add_block_count(_LAYERS)
    out.add_feed_forward_length(_HIDDEN)
    out.add_head_count(_HEADS)
    out.add_head_count_kv(1)
    out.add_key_length(_SIZE)
    out.add_value_length(_SIZE)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_sliding_window(64)
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*dict.fromkeys([*_LETTERS, *_WORDS])]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *raw, *pieces]
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * len(special + raw) + [-float(i) for i in range(len(pieces))])
    kinds = gguf.TokenType
    out.add_token_types([kinds.CONTROL] * 4 + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(pieces))
    out.add_eos_token_id(1)
    out.add_unk_token_id(3)
    out.add_pad_token_id(0)
    out.add_bos_token_id(metadata.get("bos_token_id", BOS))
    if "add_bos_token" in metadata:
        out.add_add_bos_token(metadata["add_bos_token"])
    if "chat_template" in metadata:
        out.add_chat_template(metadata["chat_template"])
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), _WIDTH), "output_norm": (_WIDTH,)}
    for layer in range(_LAYERS):
        own = {
            **dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (_WIDTH,)),
            **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (_SIZE,)),
            "attn_q": (_HEADS * _SIZE, _WIDTH),
            **dict.fromkeys(("attn_k", "attn_v"), (_SIZE, _WIDTH)),
            "attn_output": (_WIDTH, _HEADS * _SIZE),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (_HIDDEN, _WIDTH)),
            "ffn_down": (_WIDTH, _HIDDEN),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
