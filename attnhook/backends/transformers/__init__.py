"""Hugging Face Transformers: capture through its own attention interface registry.

sdpa, flash attention and flex attention stay in use; eager attention is never needed. `hooks` holds the
patched functions, `frames` knows which rows a forward pass computes, `masks` which keys they see.
"""

from __future__ import annotations

from attnhook.plugins.contracts import SelfCheck
from attnhook.plugins.hooked import HookedBackend
from attnhook.plugins.hooks import Hook, Hooks

_GENERATION = "transformers.generation"
_MIXIN = f"{_GENERATION}.utils:GenerationMixin"
_CACHE = "transformers.cache_utils:Cache"

HOOKS = Hooks(
    __name__,
    (
        Hook("hooks.wrap_get_interface", ("transformers.modeling_utils:AttentionInterface.get_interface",)),
        Hook("hooks.wrap_call", ("transformers.modeling_utils:PreTrainedModel.__call__",)),
        Hook("hooks.wrap_generate", (f"{_MIXIN}.generate",)),
        Hook("hooks.wrap_sample", (f"{_MIXIN}._sample",)),
        Hook("hooks.wrap_generate_batch", (f"{_MIXIN}.generate_batch",), needed=False),
        Hook("hooks.wrap_valid_auto_compile_criteria", (f"{_MIXIN}._valid_auto_compile_criteria",)),
        Hook("hooks.wrap_beam_search", (f"{_MIXIN}._beam_search",), needed=False),
        Hook("hooks.wrap_assisted_decoding", (f"{_MIXIN}._assisted_decoding",), needed=False),
        Hook("hooks.wrap_stopping_criteria", (f"{_GENERATION}.stopping_criteria:StoppingCriteriaList.__call__",)),
        Hook("hooks.wrap_logits_processors", (f"{_GENERATION}.logits_process:LogitsProcessorList.__call__",)),
        *(
            Hook("hooks.wrap_cache_rearrangement", (f"{_CACHE}.{name}",), needed=False)
            for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop")
        ),
        # what other releases do without it is told by their masks and lengths
        Hook("hooks.wrap_get_prompt", ("peft.peft_model:PeftModel.get_prompt",), needed=False),
    ),
    lambda: f"transformers {TransformersBackend().version()}",
    "transformers 5.16 to 5.24: pip install 'transformers>=5.16,<5.25'",
)


class TransformersBackend(HookedBackend):
    """The backend object that the plugin registers."""

    name = "transformers"
    modules = ("transformers", "torch")
    distributions = ("transformers",)
    hooks = HOOKS

    def models_in(self, target: object) -> tuple[object, ...]:
        """The models of Transformers that an object is or wraps."""
        from attnhook.backends.transformers.wrappers import models_in

        return models_in(target)

    def self_check(self, model: str | None) -> SelfCheck:
        """A short answer of a model, captured and compared with eager attention."""
        from attnhook.backends.transformers import selfcheck

        return selfcheck.run(model)
