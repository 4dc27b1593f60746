"""In vLLM's engine core: which tokens of a request with stop strings are kept.

The core accepts tokens, several at once where it speculates, and only the front end, which has the text, finds a stop
string among them and drops what follows. Here the same is found with vLLM's own code, so that no row leaves, to a sink
or a reply, whose token does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class StopFollower:
    """One request's text, as far as its stop strings need it."""

    def __init__(self, scheduler: Any, request: Any) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        tokenizer = cached_tokenizer_from_config(model_config=scheduler.vllm_config.model_config)
        facts = SimpleNamespace(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            prompt_embeds=getattr(request, "prompt_embeds", None),
            sampling_params=request.sampling_params,
        )
        self._text: Any = IncrementalDetokenizer.from_new_request(tokenizer, facts)
        self._fed = 0  # tokens that the request had
        self.stopped = False

    def kept(self, new: list[int], tokens: int, before: list[int], *, ended: bool) -> int:
        """How many of the newly accepted tokens stay.

        ``tokens`` is the number of generated tokens with them, ``before`` those that came first, should some have
        passed by, ``ended`` whether the last one is a stop token.
        """
        for token in before[self._fed : tokens - len(new)]:  # one at a time, as an engine without drafts
            self._feed([token], ended=False)
        self._fed = tokens
        return self._feed(list(new), ended=ended)

    def _feed(self, new: list[int], *, ended: bool) -> int:
        if self.stopped:
            return 0
        had = len(self._text.output_token_ids)
        self.stopped = self._text.update(new, ended) is not None
        return min(len(new), len(self._text.output_token_ids) - had)


class Stops:
    """The followers of one scheduler's requests."""

    def __init__(self) -> None:
        self._followers: dict[str, StopFollower] = {}

    def follow(self, scheduler: Any, requests: dict[str, Any]) -> None:
        """Begin with those of these requests that have stop strings."""
        for name, request in requests.items():
            params = request.sampling_params
            if name not in self._followers and params is not None and params.stop:
                self._followers[name] = StopFollower(scheduler, request)

    def kept(self, output: Any, request: Any) -> int:
        """How many of an output's new tokens stay; all of them where nothing is followed."""
        new = output.new_token_ids
        follower = self._followers.get(output.request_id)
        if follower is None or request is None:
            return len(new)
        generated = list(request.output_token_ids)
        ended = output.finish_reason is not None and output.finish_reason.name == "STOP"
        return follower.kept(new, len(generated), generated, ended=ended)

    def stopped(self, name: str) -> bool:
        """Whether a request's text has met a stop string: the front end ends it then."""
        follower = self._followers.get(name)
        return follower is not None and follower.stopped

    def forget(self, alive: Any) -> None:
        """Drop those of requests that ended."""
        for name in [name for name in self._followers if name not in alive]:
            del self._followers[name]
