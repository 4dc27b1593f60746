"""The text of each token: joined, the pieces are the decoded text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from attnhook.record.pieces import pieces
from tests.helpers import byte_tokenizer

TEXTS = [
    "",
    "plain words, and  two spaces .",
    " leading and trailing ",
    "\n\n\tcode:\n    indented\r\n",
    "don 't , it 's",
    "🎉🎊 flags 🇫🇷 family 👨\u200d👩\u200d👧 e\u0301",
    "中文字符和日本語, mixed 文 in 한국어",
    "\ufffd a real replacement character \ufffd",
    "<|im_start|>user\nhi<|im_end|>",
    "\x00\x1b[31m\x7f",
]


def pieces_join(tokenizer: Any, ids: list[int]) -> None:
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)


@given(st.text(max_size=12) | st.lists(st.sampled_from(TEXTS), max_size=2).map("".join))
def test_pieces_of_bytes_join_to_the_text(text):
    tokenizer = BYTES
    pieces_join(tokenizer, tokenizer(text)["input_ids"])


@given(st.lists(st.integers(0, 255), max_size=12))
def test_pieces_of_any_bytes_join_to_what_is_decoded(ids):
    pieces_join(BYTES, ids)


BYTES = byte_tokenizer()


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for end in range(len(ids) + 1):  # an answer may end in mid-character
        pieces_join(tokenizer, ids[:end])


@pytest.mark.model
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=10))
def test_pieces_of_any_tokens_join_to_what_is_decoded(tokenizer, ids):
    pieces_join(tokenizer, ids)


def byte_fallback_tokenizer() -> Any:
    """Like Llama's and Gemma's: words begin with a space, and what is not in the vocabulary is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abenst.,'文", "▁a", "▁b"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("▁", "a"), ("▁", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FALLBACK = byte_fallback_tokenizer()


@given(st.text(st.sampled_from("abenst.,' \n文é🎉\u200d")) | st.text(max_size=12))
@example("00\x80𐀀𐀀𐀀𐀀𐀀00\x80𐀀")  # the window would begin inside a character
def test_pieces_with_byte_fallback_join_to_the_text(text):
    pieces_join(FALLBACK, FALLBACK(text)["input_ids"])


def test_a_character_of_several_tokens_is_whole_at_the_last():
    ids = BYTES("a🎉b")["input_ids"]
    assert pieces(BYTES, ids) == ["a", "", "", "", "🎉", "b"]
    assert pieces(BYTES, []) == []
    ids = FALLBACK("a 🎉🎉b")["input_ids"]
    assert pieces(FALLBACK, ids) == ["a", " ", "", "", "", "🎉", "", "", "", "🎉", "b"]
