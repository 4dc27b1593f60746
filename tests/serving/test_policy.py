"""Guard rails: who may ask, and what of it a server gives."""

from __future__ import annotations

import argparse
import gc
import os
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.flags import add_flags
from attnhook.serving.gate import Gate, Place
from attnhook.serving.policy import FLAGS, Policy
from attnhook.serving.refusal import Refusal

FINGERPRINT = RequestOptions(mode="fingerprint")


def test_who_may_ask() -> None:
    policy = Policy.from_environ({"ATTNHOOK_API_KEY": "s\u00e9same"})
    policy.admit({"x-attention-key": "s\u00e9same"})
    policy.admit({"x-attention-key": "s\u00e9same".encode().decode("latin-1")})  # as servers hand it on
    for headers in ({}, {"x-attention-key": "Sesame"}, {"x-attention-key": "s\u00e9same "}):
        with pytest.raises(Refusal, match="capture key") as caught:
            policy.admit(headers)
        assert caught.value.status == 403 and "s\u00e9same" not in str(caught.value)
    with pytest.raises(Refusal, match="forbids capture"):
        Policy.from_environ({"ATTNHOOK_RETURN_ATTENTION_TOKENS": "0"}).admit({})


def test_fingerprints_only() -> None:
    policy = Policy.from_environ({"ATTNHOOK_FINGERPRINT_ONLY": "1"})
    assert policy.apply(FINGERPRINT) == FINGERPRINT
    for mode in ("raw", "sketch"):
        with pytest.raises(Refusal, match="fingerprints only") as caught:
            policy.apply(RequestOptions(mode=mode))  # type: ignore[arg-type]
        assert caught.value.status == 403 and caught.value.field == "attention_mode"


def test_the_operators_prefix_is_a_minimum() -> None:
    policy = Policy.from_environ({"ATTNHOOK_MASK_PREFIX": "50"})
    assert policy.apply(RequestOptions(mask_prefix=0)).mask_prefix == 50
    assert policy.apply(RequestOptions(mask_prefix=70)).mask_prefix == 70
    spans = {"whole": (0, 900), "behind": (50, 60), "over": (49, 51)}
    applied = policy.apply(RequestOptions(spans=spans)).spans
    assert applied == {"whole": (50, 900), "behind": (50, 60), "over": (50, 51)}
    with pytest.raises(Refusal, match="'inside': \\[0, 50\\] lies below position 50"):
        policy.apply(RequestOptions(spans={"inside": (0, 50)}))


def test_spans_with_fingerprints_only() -> None:
    policy = Policy.from_environ({"ATTNHOOK_FINGERPRINT_ONLY": "1", "ATTNHOOK_SPAN_WIDTH": "8"})

    def check(tokens: int | None = 100, **spans: tuple[int, int]) -> None:
        policy.check_spans(policy.apply(RequestOptions(mode="fingerprint", spans=spans)), tokens)

    check(a=(0, 8), b=(8, 64), c=(0, 64))
    check(answer=(64, 100))
    check(answer=(64, 2**31 - 1))
    for start, end in ((5, 6), (0, 7), (1, 8), (0, 9), (64, 99)):
        with pytest.raises(OptionError, match="multiples of 8 positions"):
            check(a=(start, end))
    with pytest.raises(OptionError, match="multiples of 8"):
        check(None, answer=(64, 100))
    Policy.from_environ({}).check_spans(RequestOptions(spans={"a": (5, 6)}), 10)  # where positions are told anyway


def test_a_prefix_between_allowed_bounds_moves_spans_to_the_next() -> None:
    policy = Policy.from_environ({"ATTNHOOK_FINGERPRINT_ONLY": "1", "ATTNHOOK_MASK_PREFIX": "10"})
    options = policy.apply(RequestOptions(mode="fingerprint", spans={"a": (0, 64)}))
    assert options.spans == {"a": (16, 64)}
    policy.check_spans(options, 100)


@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 130), st.integers(1, 60)), max_size=6),
    st.integers(1, 120),
)
def test_no_sum_of_spans_tells_less_than_a_width(
    width: int, prefix: int, spans: list[tuple[int, int]], tokens: int
) -> None:
    """The finest that sums and differences of masses can tell are the pieces between neighbouring bounds."""
    policy = Policy(fingerprint_only=True, span_width=width, mask_prefix=prefix)
    asked = {str(n): (start, start + length) for n, (start, length) in enumerate(spans)}
    try:
        options = policy.apply(RequestOptions(mode="fingerprint", spans=asked))
        policy.check_spans(options, tokens)
    except (Refusal, OptionError):
        return
    bounds = sorted({0, *(min(bound, tokens) for span in options.spans.values() for bound in span)})
    for low, high in pairwise(bounds):
        # the last piece ends with the request, whose nearest positions every fingerprint tells by distance
        assert high - low >= width or high == tokens
    assert all(start >= prefix for start, _ in options.spans.values())


def test_places() -> None:
    gate = Gate()
    first = gate.place(1)
    with pytest.raises(Refusal, match="1 requests are capturing") as caught:
        gate.place(1)
    assert caught.value.status == 429
    first.leave()
    first.leave()
    assert gate.count == 0
    second = gate.place(1)
    second.reserve(60, 100)
    third = gate.place(2)
    with pytest.raises(Refusal, match=r"may come to 50 bytes .* 60 already; this server allows 100") as caught:
        third.reserve(50, 100)
    assert caught.value.status == 429
    second.leave()
    third.reserve(50, 100)
    assert gate.bytes == 50 and gate.count == 1
    del third, caught
    gc.collect()
    assert gate.bytes == gate.count == 0


def test_a_place_that_is_collected_inside_the_gate_does_not_stop_it() -> None:
    """The collector may run anywhere, also while the gate is locked."""
    gate = Gate()

    class Lock:
        """The gate's own lock, inside which garbage is collected."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            self.lock.__enter__()
            gc.collect(0)

        def __exit__(self, *error: object) -> None:
            self.lock.__exit__(*error)

    gate._lock = Lock(gate._lock)  # type: ignore[assignment]

    def cycle() -> None:
        dropped: dict[str, Any] = {"place": gate.place(None)}
        dropped["itself"] = dropped

    def work() -> None:
        for _ in range(20):
            cycle()
            place: Place = gate.place(None)
            place.leave()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive(), "the gate waits for itself"
    gc.collect()
    assert gate.count == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTNHOOK_MAX_CONCURRENT", "0"),
        ("ATTNHOOK_MAX_CONCURRENT", "many"),
        ("ATTNHOOK_FINGERPRINT_ONLY", "yes"),
        ("ATTNHOOK_CAPTURE_ALL", "raw"),
        ("ATTNHOOK_SPAN_WIDTH", "0"),
        ("ATTNHOOK_MAX_BYTES", "-5"),
        ("ATTNHOOK_MAX_BYTES", "1e6"),
        ("ATTNHOOK_MAX_BYTES_IN_FLIGHT", "\u0663"),
        ("ATTNHOOK_MASK_PREFIX", "-1"),
    ],
)
def test_bad_guard_rails_are_named(name: str, value: str) -> None:
    shown = value if name == "ATTNHOOK_MASK_PREFIX" else repr(value)  # that one is an option of requests too
    with pytest.raises(OptionError, match=f"{name}={shown} must be"):
        Policy.from_environ({name: value})


def test_a_key_stays_out_of_the_arguments_that_engines_log(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in {flag.variable for flag in FLAGS}}
    monkeypatch.setattr(os, "environ", plain)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = parser.parse_args(["--attention-tokens-api-key", "sesame", "--attention-tokens-span-width", "32"])
    assert "sesame" not in repr(given) and given.attention_tokens_span_width == 32
    policy = Policy.from_environ()
    assert policy.api_key == "sesame" and policy.span_width == 32
