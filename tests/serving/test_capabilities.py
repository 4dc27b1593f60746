"""Which layers a server says that it can capture, from the model's own configuration."""

from __future__ import annotations

from transformers import Gemma3TextConfig, GraniteMoeHybridConfig, LlamaConfig, Qwen3NextConfig

from attnhook.serving.capabilities import attention_layers


def test_layers_by_configuration() -> None:
    assert attention_layers(LlamaConfig(num_hidden_layers=3)) == [0, 1, 2]
    assert attention_layers(Gemma3TextConfig(num_hidden_layers=4)) == [0, 1, 2, 3]
    kinds = ["mamba", "attention", "mamba", "attention"]
    assert attention_layers(GraniteMoeHybridConfig(num_hidden_layers=4, layer_types=kinds)) == [1, 3]
    assert attention_layers(Qwen3NextConfig(num_hidden_layers=8)) == [3, 7]
    assert attention_layers(None) is None
