"""What differs between vLLM's releases: each place is looked for where the release at hand has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnhook.backends.vllm import cache, worker
from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import LayerRows, Selection, Softmax, naive
from tests.backends.servers import run
from tests.backends.vllm.engine import engine_environment, needs_vllm, ready_for

BLOCKS, HEADS, SLOTS, DIM = 6, 2, 16, 8


class TritonAttentionImpl:
    """As much of vLLM's class as says what its softmax is."""

    scale, sliding_window, logits_soft_cap, alibi_slopes, sinks = 0.3, None, None, None, None


def keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, kv heads, slots, dim]."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, BLOCKS, HEADS, SLOTS, DIM, generator=generator)
    return k, v


def caches() -> dict[str, torch.Tensor]:
    """The same keys and values as the releases and layouts of vLLM have them."""
    k, v = keys_and_values()
    slots_first = [part.transpose(1, 2) for part in (k, v)]
    return {
        "0.29 and later": torch.cat([k, v], dim=-1),
        "0.29 and later, NHD": torch.cat(slots_first, dim=-1).contiguous().transpose(1, 2),
        "up to 0.28, NHD": torch.stack(slots_first, dim=1).contiguous(),
        "up to 0.28, HND": torch.stack([k, v], dim=1).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", list(caches()))
def test_keys_and_values_of_gpu_caches(layout: str) -> None:
    k, v = keys_and_values()
    stored = caches()[layout]
    if "up to" in layout:
        assert stored.shape == (BLOCKS, 2, SLOTS, HEADS, DIM)
    table = torch.tensor([[4, 1, 5]], dtype=torch.int32)
    found = cache.view(SimpleNamespace(impl=TritonAttentionImpl()), stored, table)
    q = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(1))
    request, position = torch.zeros(1, dtype=torch.int32), torch.tensor([40])
    for paged, true in ((found.keys, k), (found.values, v)):
        softmax = Softmax(**found.softmax)._replace(window=-1)
        got = naive.topk_attention(LayerRows(q, paged, position, softmax), request, Selection(41))
        dense = true[[4, 1, 5]].transpose(0, 1).reshape(HEADS, -1, DIM)[:, :41]
        z = 0.3 * torch.einsum("gad,gnd->gan", q.view(HEADS, 2, DIM).double(), dense.double())
        expected = z.softmax(-1).mean((0, 1)).sort(descending=True)
        assert torch.allclose(got.scores[0], expected.values, atol=1e-9)
        assert got.positions[0].tolist() == expected.indices.tolist()


def test_a_gpu_cache_of_another_shape_is_refused() -> None:
    layer = SimpleNamespace(impl=TritonAttentionImpl())
    with pytest.raises(UnsupportedError, match=r"shape \[6, 3, 16, 2, 8\]"):
        cache.view(layer, torch.zeros(BLOCKS, 3, SLOTS, HEADS, DIM), torch.zeros(1, 1, dtype=torch.int32))


def test_the_packing_of_the_cpu_cache_is_named_by_layer_or_implementation() -> None:
    none = SimpleNamespace()
    assert cache._isa(SimpleNamespace(isa="vec"), none) == "vec"
    assert cache._isa(none, SimpleNamespace(isa="amx")) == "amx"
    with pytest.raises(UnsupportedError, match="isa"):
        cache._isa(none, none)


@pytest.mark.parametrize(
    ("new", "length"),
    [
        (SimpleNamespace(prompt_len=7, prompt_token_ids=[1]), 7),
        (SimpleNamespace(prompt_token_ids=[1, 2, 3], prompt_embeds=None), 3),
        (SimpleNamespace(prompt_token_ids=None, prompt_embeds=torch.zeros(5, 4)), 5),
    ],
)
def test_the_length_of_a_prompt(new: Any, length: int) -> None:
    assert worker.prompt_length(new) == length


@pytest.mark.parametrize("given", [((), {}), ((True,), {}), ((), {"is_profiling": True})])
def test_the_cache_is_initialised_with_what_the_release_takes(given: Any) -> None:
    """V2's method takes no ``is_profiling`` up to 0.28; a profiling run is hooked by none."""
    arguments, keywords = given
    seen: list[Any] = []

    def newer(self: Any, config: Any, is_profiling: bool = False) -> str:
        seen.append((config, is_profiling))
        return "done"

    def older(self: Any, config: Any) -> str:
        seen.append((config, False))
        return "done"

    pooling = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(runner_type="pooling")))
    generating = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(runner_type="generate")))
    profiling = bool(arguments or keywords)
    runner = generating if profiling else pooling  # neither has layers to hook, which would fail
    assert worker.wrap_initialize_kv_cache(newer)(runner, "config", *arguments, **keywords) == "done"
    assert seen == [("config", profiling)]
    if not profiling:
        assert worker.wrap_initialize_kv_cache(older)(runner, "config") == "done"


@pytest.mark.slow
@needs_vllm
def test_a_module_that_a_release_does_not_have_is_named(tmp_path: Path) -> None:
    # in a process of its own: importing vLLM brings Triton in, which tests/kernels must import first
    script = """
        from attnhook.backends import vllm as backend
        from attnhook.errors import UnsupportedError
        from attnhook.plugins.hooks import Hook, Hooks

        hooks = backend.HOOKS
        hooks.check_modules()
        for missing in ("vllm.v1.not_there", "vllm.nowhere.at_all"):
            one = Hook("worker.wrap_load_model", (f"{missing}:Runner.load_model",))
            try:
                Hooks(hooks.package, (*hooks.hooks, one), hooks.what, hooks.wanted).check_modules()
            except UnsupportedError as error:
                print(error)
    """
    environ = engine_environment(ATTNHOOK="0")
    code, output = run(["-c", script], environ, tmp_path / "log", ready=ready_for(environ))
    assert code == 0, output[-2000:]
    lines = [line for line in output.splitlines() if "was not found" in line]
    assert "its module vllm.v1.not_there was not found" in lines[0]
    assert "its module vllm.nowhere.at_all was not found" in lines[1] and len(lines) == 2
