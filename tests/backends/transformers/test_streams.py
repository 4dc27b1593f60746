"""A refusal ends the stream of its generation: who reads the stream never waits for ever, and learns why."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
import transformers as tf

import attnhook
from attnhook import UnsupportedError
from tests.helpers import byte_tokenizer, tiny_model

IDS = torch.arange(60, 70)[None]
SETTINGS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
WAIT = 30  # seconds after which a test fails instead of hanging


def bloom() -> Any:
    torch.manual_seed(0)
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=6)).eval()


class Evicting(tf.LogitsProcessor):
    """Takes keys out of the cache after the third token, which is refused in the pass after that."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.calls = cache, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
        return scores


def in_thread(model: Any, streamer: Any, **more: Any) -> tuple[threading.Thread, list[BaseException]]:
    """Generate in a thread, as the streamers' documentation does; what it raises is kept."""
    raised: list[BaseException] = []

    def produce() -> None:
        try:
            model.generate(IDS, **SETTINGS, streamer=streamer, **more)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    return thread, raised


def test_who_iterates_over_text_gets_the_error() -> None:
    model = bloom()
    streamer = tf.TextIteratorStreamer(byte_tokenizer(), timeout=WAIT)
    pieces: list[str] = []
    with attnhook.capture():
        thread, raised = in_thread(model, streamer)
        with pytest.raises(UnsupportedError, match="BloomForCausalLM") as seen:
            for piece in streamer:
                pieces.append(piece)
        thread.join(WAIT)
    assert raised == [seen.value]  # in the thread that generates it is what it was
    assert "".join(pieces) == byte_tokenizer().decode(IDS[0])  # the prompt, which the stream had kept back
    assert list(streamer) == [""]  # and the stream has ended
    model.generate(IDS, **SETTINGS, streamer=streamer)  # it serves again
    assert "".join(streamer)


def test_text_before_the_refusal_comes_first() -> None:
    model = tiny_model()
    plain = model.generate(IDS, **SETTINGS)
    cache = tf.DynamicCache(config=model.config)
    streamer = tf.TextIteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT)
    processors = tf.LogitsProcessorList([Evicting(cache)])
    pieces: list[str] = []
    with attnhook.capture() as records:
        thread, raised = in_thread(model, streamer, past_key_values=cache, logits_processor=processors)
        with pytest.raises(UnsupportedError, match="keys were taken out of it"):
            for piece in streamer:
                pieces.append(piece)
        thread.join(WAIT)
    assert len(records) == 3 and len(raised) == 1
    text = byte_tokenizer().decode(plain[0, IDS.shape[1] :][:3])
    assert "".join(pieces) == text


def test_who_iterates_in_a_coroutine_gets_the_error() -> None:
    async def consume() -> None:
        streamer = tf.AsyncTextIteratorStreamer(byte_tokenizer(), timeout=WAIT)
        with attnhook.capture():
            thread, raised = in_thread(bloom(), streamer)
            with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
                async for _ in streamer:
                    pass
            thread.join(WAIT)
        assert len(raised) == 1

    asyncio.run(consume())


class Counting(tf.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.ended = 0

    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        self.ended += 1


def test_any_other_streamer_is_told_the_end_once() -> None:
    streamer = Counting()
    with pytest.raises(UnsupportedError), attnhook.capture():
        bloom().generate(IDS, **SETTINGS, streamer=streamer)
    assert streamer.ended == 1
    with pytest.raises(UnsupportedError), attnhook.capture():  # a positional argument, the eighth
        bloom().generate(IDS, None, None, None, None, None, None, streamer, **SETTINGS)
    assert streamer.ended == 2
    with attnhook.capture(on_error="drop"):
        bloom().generate(IDS, **SETTINGS, streamer=streamer)
    assert streamer.ended == 3  # by generate itself


def test_an_error_of_the_model_is_left_as_it_is() -> None:
    """What Transformers does then is not ours to change."""

    class Broken(tf.LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    streamer, broken = Counting(), tf.LogitsProcessorList([Broken()])
    with pytest.raises(ZeroDivisionError), attnhook.capture():
        tiny_model().generate(IDS, **SETTINGS, streamer=streamer, logits_processor=broken)
    assert streamer.ended == 0


def test_a_streamer_that_fails_to_end_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Counting):
        def end(self) -> None:
            raise ValueError("the pipe is closed")

    with pytest.raises(UnsupportedError, match="BloomForCausalLM"), attnhook.capture():
        bloom().generate(IDS, **SETTINGS, streamer=Failing())
    assert "Failing could not be told" in caplog.text and "the pipe is closed" in caplog.text
