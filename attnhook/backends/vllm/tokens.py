"""In vLLM's engine core: token ids for records that go to sinks which keep them.

The scheduler's requests hold prompt and accepted tokens by position; nothing is taken from a worker's batch, so chunked
prompts, cached prefixes, preemptions and rejected drafts make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from attnhook.record import tokens
from attnhook.record.token_record import TokenRecord
from attnhook.serving.wire import KEY, unpack_options


def fill(records: Sequence[TokenRecord], request: Any) -> Sequence[TokenRecord]:
    """The records of one request with their token ids; as they are where there is no ``request``."""
    if request is None:
        return records
    # of a prompt that is embeddings, in part or whole, the ids are stand-ins
    hidden = request.num_prompt_tokens if request.prompt_embeds is not None else 0
    token_at = tokens.sequence(request.all_token_ids, hidden=hidden)
    return tokens.fill(records, token_at, _mask_prefix(request.sampling_params.extra_args[KEY]))


@lru_cache(maxsize=256)
def _mask_prefix(packed: str) -> int:
    return unpack_options(packed)[0].mask_prefix
