"""Made-up drivers of a real model: every row of theirs is captured once, and what is spoilt is found.

A driver is a way to call `generate`: batch, padding, choices, cache, prompt in pieces, early ends, what runs between
its passes, several at once. Records are compared with the tokens that came out, and with eager attention on them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import attnhook
from attnhook import UnsupportedError
from attnhook.backends.transformers import frames
from attnhook.capture.rows import Row
from tests import oracle
from tests.helpers import tiny_model

TOP_K = 5
Place = tuple[int, int, int, int | None]  # sequence of the batch, choice, position, decode step


@cache
def model() -> Any:
    return tiny_model()


class Between(tf.LogitsProcessor):
    """Runs the model, or generates with it, between the passes of the generation that it serves."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.kind != "nothing" and ids.shape[1]:  # a prompt of embeddings has no ids
            with torch.no_grad():
                model()(ids.flip(1)) if self.kind == "a pass" else model()(ids[:, -1:])
        return scores


@dataclass
class Driver:
    """One way to generate; ``ends`` is the step at which the first sequence ends, others may by chance."""

    pads: list[int]
    longest: int  # tokens of the padded prompts
    new: int
    choices: int = 1
    ends: int | None = None
    cache: str = "dynamic"
    chunk: int | None = None
    between: str = "nothing"
    embeds: bool = False

    def arguments(self) -> dict[str, Any]:
        """For `generate`, with a cache that holds all but two tokens where one is used again."""
        mask = torch.stack([(torch.arange(self.longest) >= pad).long() for pad in self.pads])
        ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(self.longest)) * mask
        found: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "max_new_tokens": self.new, "pad_token_id": 0,
            "do_sample": self.choices > 1, "num_return_sequences": self.choices, "prefill_chunk_size": self.chunk,
            "logits_processor": tf.LogitsProcessorList([Between(self.between)]),
        }  # fmt: skip
        if self.cache == "none":
            found["use_cache"] = False
        elif self.cache == "used again":
            found["past_key_values"] = tf.DynamicCache(config=model().config)
            places = (mask[:, :-2].cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :-2], "position_ids": places, "past_key_values": found["past_key_values"]}
            with torch.no_grad():
                model()(ids[:, :-2], **more)
        else:
            found["cache_implementation"] = self.cache
        if self.embeds:
            found["inputs_embeds"] = model().get_input_embeddings()(found.pop("input_ids")).detach()
        return found

    def run(self, arguments: dict[str, Any], end: int | None) -> torch.Tensor:
        """The new tokens [sequences x choices, n]; the same each time."""
        if self.choices > 1:
            torch.manual_seed(5)
        output: torch.Tensor = model().generate(**arguments, eos_token_id=end)
        return output if self.embeds else output[:, self.longest :]

    def end(self) -> int | None:
        """The token that ends sequences."""
        return None if self.ends is None else int(self.run(self.arguments(), None)[0, min(self.ends, self.new - 1)])

    def wanted(self, output: torch.Tensor, end: int | None, first: int = 0) -> list[Place]:
        """The places of the rows of these tokens, prompt rows too, from decode step ``first`` on."""
        places: list[Place] = []
        for n, row in enumerate(output.tolist()):
            b, choice = divmod(n, self.choices)
            count = row.index(end) + 1 if end in row else len(row)
            length = self.longest - self.pads[b]
            held = max(0, length - 2) if self.cache == "used again" else 0
            if not first:
                places += [(b, choice, position, None) for position in range(held, length - 1)]
            places += [(b, choice, length - 1 + step, step) for step in range(first, count)]
        return sorted(places, key=str)


@st.composite
def drivers(draw: st.DrawFn) -> Driver:
    longest = draw(st.integers(3, 9))
    pads = draw(st.lists(st.integers(0, longest - 1), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["plain", "plain", "choices", "chunks", "used again", "embeddings"]))
    caches = {"used again": ["used again"], "embeddings": ["dynamic"], "chunks": ["dynamic", "static"]}
    new = draw(st.integers(1, 5))
    return Driver(
        pads=[min(pad, longest - 3) for pad in pads] if kind == "used again" else pads,
        longest=longest,
        new=new,
        choices=draw(st.integers(2, 3)) if kind == "choices" else 1,
        ends=draw(st.none() | st.integers(0, new - 1)),
        cache=draw(st.sampled_from(caches.get(kind, ["dynamic", "static", "none"]))),
        chunk=draw(st.integers(1, longest)) if kind == "chunks" else None,
        between=draw(st.sampled_from(["nothing", "a pass", "a token"])),
        embeds=kind == "embeddings",
    )  # fmt: skip


def place(record: Any) -> Place:
    step = record.decode_step
    return int(record.request_id.rpartition("-")[2]), record.choice, record.query_position, step


def check(driver: Driver) -> None:
    """Every row once, at its place, with eager attention's numbers; the tokens are those without capture."""
    end = driver.end()
    plain, arguments = driver.run(driver.arguments(), end), driver.arguments()
    with attnhook.capture(layers="all", top_k=TOP_K, prompt=True) as records:
        output = driver.run(arguments, end)
    assert torch.equal(plain, output)
    assert sorted(map(place, records), key=str) == driver.wanted(output, end)
    if driver.choices > 1 or driver.embeds:
        return  # whose ids are not at hand as one batch
    ids = torch.cat([driver.arguments()["input_ids"], output], 1)[:, :-1]
    mask = torch.stack([(torch.arange(ids.shape[1]) >= pad).long() for pad in driver.pads])
    attention = oracle.eager_attention(model(), ids, mask)
    for b, pad in enumerate(driver.pads):
        mine = [record for record in records if place(record)[0] == b]
        oracle.check(oracle.compare(mine, attention, sequence=b, pad=pad, top_k=TOP_K))


@pytest.mark.slow
@settings(max_examples=15, derandomize=True)
@given(drivers())
def test_every_row_of_a_driver_is_there_once_and_right(driver: Driver) -> None:
    check(driver)


@pytest.mark.slow
@settings(max_examples=150)
@given(drivers())
def test_every_row_of_many_drivers_is_there_once_and_right(driver: Driver) -> None:
    check(driver)


FAULTS = ["removed", "repeated", "a later step", "an earlier step", "a later position", "another's", "a prompt row"]


@contextmanager
def spoilt(fault: str, at: int, which: int) -> Iterator[list[Row]]:
    """One row of the ``at``-th pass that has generated rows is not what it was; yields it, once it came."""
    whole, found, passes = frames.Frame._find_rows, [], [0]

    def spoil(self: Any, batch: int, q_len: int) -> Any:
        rows = whole(self, batch, q_len)
        generated = [n for n, (row, _) in enumerate(rows) if row.decode_step is not None]
        passes[0] += bool(generated)
        if found or not generated or passes[0] <= at:
            return rows
        n = generated[which % len(generated)]
        row, index = rows[n]
        found.append(row)
        spoilt_row = {
            "removed": [],
            "repeated": [rows[n], rows[n]],
            "a later step": [(row._replace(decode_step=row.decode_step + 1), index)],
            "an earlier step": [(row._replace(decode_step=row.decode_step - 1), index)],
            "a later position": [(row._replace(position=row.position + 1), index)],
            "another's": [(row._replace(request_id="somebody-0"), index)],
            "a prompt row": [(row._replace(decode_step=None), index)],
        }[fault]
        return [*rows[:n], *spoilt_row, *rows[n + 1 :]]

    frames.Frame._find_rows = spoil  # type: ignore[method-assign]
    try:
        yield found
    finally:
        frames.Frame._find_rows = whole  # type: ignore[method-assign]


def check_spoilt(driver: Driver, fault: str, at: int, which: int, strict: bool, prompt: bool) -> None:
    end, arguments = driver.end(), driver.arguments()
    refused: UnsupportedError | None = None
    with spoilt(fault, at, which) as found:
        try:
            with attnhook.capture(prompt=prompt, on_error="raise" if strict else "drop") as records:
                output = driver.run(arguments, end)
        except UnsupportedError as error:
            refused = error
    if not found:
        return  # the generation had ended before that pass
    if strict:
        assert refused is not None, f"{found[0]} {fault} was not found"
    else:
        assert refused is None and sum(records.dropped.values()) >= 1, f"{found[0]} {fault} was not found"
        assert torch.equal(output, driver.run(driver.arguments(), end))


SPOILT = (drivers(), st.sampled_from(FAULTS), st.integers(0, 4), st.integers(0, 5), st.booleans(), st.booleans())


@pytest.mark.slow
@settings(max_examples=25, derandomize=True)
@given(*SPOILT)
def test_each_spoilt_row_of_a_driver_is_found(
    driver: Driver, fault: str, at: int, which: int, strict: bool, prompt: bool
) -> None:
    check_spoilt(driver, fault, at, which, strict, prompt)


@pytest.mark.slow
@settings(max_examples=300)
@given(*SPOILT)
def test_each_spoilt_row_of_many_drivers_is_found(
    driver: Driver, fault: str, at: int, which: int, strict: bool, prompt: bool
) -> None:
    check_spoilt(driver, fault, at, which, strict, prompt)


class Opening(tf.LogitsProcessor):
    """Opens a block between two passes of the generation that it serves."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.block = at, 0, attnhook.capture()
        self.records: Any = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.records = self.block.__enter__()
        return scores


@settings(max_examples=15, derandomize=True)
@given(drivers(), st.integers(1, 4), st.booleans())
def test_who_comes_later_gets_every_row_from_then_on(driver: Driver, at: int, hooked: bool) -> None:
    """Whether hooks were there when the generation began, or not."""
    end, arguments, opening = driver.end(), driver.arguments(), Opening(at)
    arguments["logits_processor"].append(opening)
    unrelated = tiny_model()
    with attnhook.capture(model=unrelated) if hooked else _nothing():
        try:
            output = driver.run(arguments, end)
        finally:
            if opening.records is not None:
                opening.block.__exit__(None, None, None)
    if opening.records is not None:
        assert sorted(map(place, opening.records), key=str) == driver.wanted(output, end, first=at)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.slow
@settings(max_examples=6, derandomize=True)
@given(st.lists(drivers().filter(lambda driver: driver.choices == 1), min_size=2, max_size=4))
def test_drivers_in_threads_do_not_mix(made: list[Driver]) -> None:
    """The same model in several threads at once, each with a driver of its own."""
    ends = [driver.end() for driver in made]
    arguments = [driver.arguments() for driver in made]
    outputs: dict[int, torch.Tensor] = {}

    def run(n: int) -> None:
        outputs[n] = made[n].run(arguments[n], ends[n])

    with attnhook.capture(prompt=True) as records:
        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(made))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    by: dict[str, list[Place]] = {}
    for record in records:
        by.setdefault(record.request_id.rpartition("-")[0], []).append(place(record))
    found = sorted((sorted(places, key=str) for places in by.values()), key=str)
    assert found == sorted((driver.wanted(outputs[n], ends[n]) for n, driver in enumerate(made)), key=str)
