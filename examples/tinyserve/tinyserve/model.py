"""Llama in float32: its weights as Transformers reads them, a forward pass and a paged key cache of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import AutoConfig

PAGE = 16  # tokens
_BY_ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


@dataclass
class Part:
    """Some tokens of one request, which one pass computes."""

    request: str
    tokens: list[int]
    first: int  # position of the first one
    prompt: int  # tokens of the request's prompt
    pages: list[int]
    extra: dict[str, Any]  # what came with the request, as it came

    @property
    def samples(self) -> bool:
        """Whether a token is sampled from the last row: not in the middle of a prompt."""
        return self.first + len(self.tokens) >= self.prompt


@dataclass
class Batch:
    """One pass: some tokens of each of several requests."""

    parts: list[Part]
    ended: list[str] = field(default_factory=list)  # requests that ended since the last pass


def check(path: str, size: int) -> Any:
    """The configuration of a model that tinyserve can run in ``size`` equal parts. Raises ValueError for any other."""
    config = AutoConfig.from_pretrained(path)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias or rope not in ("default", "llama3"):
        raise ValueError(f"{path} is a {config.model_type} with rope {rope!r}: tinyserve runs plain Llama models")
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, what) % size:
            raise ValueError(f"{what}={getattr(config, what)} does not divide by --tensor-parallel {size}: use another")
    return config


class Model:
    """One rank's part of a model that is served as ``name``: part ``rank`` of ``size`` of its heads and MLP columns.

    Raises ValueError as `check` does.
    """

    def __init__(self, path: str, name: str, pages: int, rank: int = 0, size: int = 1) -> None:
        config = check(path, size)
        from transformers import LlamaForCausalLM  # takes seconds: what is refused is refused before

        self.name, self.config, self.size = name, config, size
        self.layers, self.dim = config.num_hidden_layers, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads // size, config.num_key_value_heads // size
        llama = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._weights = {name: _part(name, tensor, rank, size) for name, tensor in llama.state_dict().items()}
        self._rotary = llama.model.rotary_emb
        self.keys, self.values = torch.zeros(2, self.layers, pages, PAGE, self.kv_heads, self.dim)

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [parts, vocabulary] of each part's last row."""
        parts = batch.parts
        tokens = torch.tensor([token for part in parts for token in part.tokens])
        at = torch.cat([torch.arange(part.first, part.first + len(part.tokens)) for part in parts])
        pages = torch.cat(
            [torch.tensor(part.pages)[p // PAGE] for part, p in zip(parts, _each(at, parts), strict=True)]
        )
        angles = at[:, None] * self._rotary.inv_freq.tile(2)
        cos, sin = (f(angles)[:, None] * self._rotary.attention_scaling for f in (torch.cos, torch.sin))
        x = self._weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.layers):
            w = {name: self._weights[f"model.layers.{layer}.{name}.weight"] for name in _NAMES}
            h = self._norm(x, w["input_layernorm"])
            q, k, v = (linear(h, w[f"self_attn.{n}_proj"]).unflatten(-1, (-1, self.dim)) for n in "qkv")
            self.keys[layer, pages, at % PAGE], self.values[layer, pages, at % PAGE] = _turn(k, cos, sin), v
            looked = self.attend(layer, _turn(q, cos, sin), batch)
            x = x + self._total(linear(looked.flatten(1), w["self_attn.o_proj"]))
            h = self._norm(x, w["post_attention_layernorm"])
            h = silu(linear(h, w["mlp.gate_proj"])) * linear(h, w["mlp.up_proj"])
            x = x + self._total(linear(h, w["mlp.down_proj"]))
        last = torch.tensor([len(part.tokens) for part in parts]).cumsum(0) - 1
        return linear(self._norm(x[last], self._weights["model.norm.weight"]), self._weights["lm_head.weight"])

    def attend(self, layer: int, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, heads, dim]: what the queries of all tokens take from the keys in their requests' pages."""
        looked = []
        for part, rows in zip(batch.parts, _each(q, batch.parts), strict=True):
            end = part.first + len(part.tokens)
            k, v = (cache[layer, part.pages].flatten(0, 1)[:end] for cache in (self.keys, self.values))
            visible = torch.arange(end) <= torch.arange(part.first, end)[:, None]
            q, k, v = (x.transpose(0, 1) for x in (rows, k, v))
            looked.append(scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(0, 1))
        return torch.cat(looked)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x


_NAMES = (
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)


def _part(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if name.endswith(_BY_ROWS):
        return tensor.chunk(size, 0)[rank]
    return tensor.chunk(size, 1)[rank] if name.endswith(_BY_COLUMNS) else tensor


def _each(rows: torch.Tensor, parts: list[Part]) -> tuple[torch.Tensor, ...]:
    return rows.split([len(part.tokens) for part in parts])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in [N, heads, dim]."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin
