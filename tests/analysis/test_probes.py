"""Probe packs: fixed texts with unique names, halves, and distances as promised on a real tokenizer."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice

import pytest

from attnhook.analysis import probes
from attnhook.analysis.packs import stories
from attnhook.analysis.packs.draft import data
from attnhook.errors import OptionError
from attnhook.record import zones
from tests.helpers import byte_tokenizer, python

#: Changes with any probe: a change of a text is a new version of what is measured, and is told in CHANGELOG.md.
DIGEST = "b4d89eed2ebaeb7e"


def test_the_texts_are_fixed_in_every_process() -> None:
    assert probes.digest() == DIGEST
    code = "from attnhook.analysis import probes; print(probes.digest())"
    other = python("-c", code, PYTHONHASHSEED="7")
    assert other.stdout.strip() == DIGEST, other.stderr


def test_every_behaviour_has_packs_and_every_probe_a_name_of_its_own() -> None:
    packs, everything = probes.packs(), probes.select()
    assert {pack.behaviour for pack in packs.values()} == set(probes.BEHAVIOURS)
    assert set(data("catalogue")) == set(packs) and len(everything) >= 400
    for pack in packs.values():
        assert pack.purpose and pack.judged and len(pack.probes) >= 24
        assert pack.zone is None or pack.zone in zones.ZONE_NAMES
    names = [probe.request_id for probe in everything]
    assert len(set(names)) == len(names)
    for name, probe in zip(names, everything, strict=True):
        assert name == f"probe/{probe.pack}/{probe.id}" and re.fullmatch(r"[a-z0-9_/-]+", name)
        assert probes.find(name) is probe
        assert (probe.text is None) != (probe.messages is None)
        assert probe.behaviour == packs[probe.pack].behaviour
        if probe.text is not None:  # a space at the end is half a token
            assert probe.text == probe.text.rstrip(" ") and probe.text
    texts = Counter(repr(probe.text or probe.messages) for probe in everything if not probe.distance)
    assert max(texts.values()) == 1
    assert probes.find("chatcmpl-1") is None


def test_messages_begin_and_end_with_the_user() -> None:
    turns = [[message["role"] for message in probe.messages or ()] for probe in probes.packs()["chat"].probes]
    assert {len(roles) for roles in turns} == {1, 3}
    assert all(roles == ["user", "assistant", "user"][: len(roles)] for roles in turns)


def test_halves_are_halves_of_each_pack_and_each_distance() -> None:
    for pack in probes.packs().values():
        groups = {probe.distance for probe in pack.probes}
        for distance in groups:
            halves = Counter(probe.half for probe in pack.probes if probe.distance == distance)
            assert halves["fit"] == halves["held-out"], (pack.name, distance)
    # no pattern of the numbers: the sequences of two packs differ
    chat, grammar = ([probe.half for probe in probes.packs()[name].probes] for name in ("chat", "grammar"))
    assert chat != grammar and chat != sorted(chat)


def test_answers_are_right() -> None:
    packs = probes.packs()
    for probe in packs["brackets"].probes:
        assert probe.text and probe.answer in (")", "]")
        line = probe.text.splitlines()[-1] + probe.answer
        assert not re.search(r"\([^()\[\]]*\]|\[[^()\[\]]*\)", line), line  # closes the innermost
    for probe in packs["json_repair"].probes:
        _, whole, cut = (probe.text or "").splitlines()
        json.loads(whole)
        with pytest.raises(ValueError):
            json.loads(cut)
        if probe.answer == "}":
            json.loads(cut + "}")
    for probe in packs["counting"].probes:
        numbers = [int(number) for number in re.findall(r"\d+", probe.text or "")]
        assert int(probe.answer or "") - numbers[-1] == numbers[1] - numbers[0] == numbers[-1] - numbers[-2]
    for probe in packs["repeats"].probes:
        run = (probe.text or "").split()
        period = len(set(run))
        assert run[:-period] == run[period:] and run[-period] == probe.answer
    for probe in packs["entities"].probes:  # the last sentence that tells of the thing
        *said, asked = (probe.text or "").split(". ")
        thing = asked.split()[2]
        about = [sentence for sentence in said if f"the {thing} " in f"{sentence.lower()} "]
        assert about[-1].rstrip(".").endswith(f"the {probe.answer}"), probe.text


def test_filler_tells_no_answer() -> None:
    filler = set(re.findall(r"\w+", "".join(islice(stories.sentences("x"), 400)).lower()))
    filler |= set(data("words")["short"])
    for pack in ("retrieval_near", "retrieval_far"):
        for probe in probes.packs()[pack].probes:
            assert probe.answer not in filler
            assert len(re.findall(rf"\b{probe.answer}\b", probe.text or "")) == 1


@pytest.mark.model
def test_distances_are_as_promised(smol_path: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{smol_path}/tokenizer.json")
    seen = set()
    # three of the shorter distances, one of each longer one
    chosen = [*probes.select(["retrieval_near"], 12), *probes.select(["retrieval_far"], 5)]
    for probe in chosen:
        prompt = probes.build(probe, lambda text: len(tokenizer.encode(text).ids))
        ids = tokenizer.encode(prompt.text).ids
        start, end = prompt.spans[probes.ANSWER]
        assert tokenizer.decode(ids[start:end]) == f" {probe.answer}"
        assert prompt.tokens == len(ids) and prompt.distance == len(ids) - 1 - start
        assert abs(prompt.distance - (probe.distance or 0)) <= probes.TOLERANCE
        assert prompt == probes.build(probe, lambda text: len(tokenizer.encode(text).ids))
        # tokens that come before every text move positions and leave distances
        moved = probes.build(probe, lambda text: 1 + len(tokenizer.encode(text).ids))
        assert (moved.text, moved.distance) == (prompt.text, prompt.distance)
        assert moved.spans[probes.ANSWER] == (start + 1, end + 1)
        seen.add(probe.distance)
    assert seen == {16, 32, 64, 128, 256, 512, 1024, 2048, 4000}


def test_a_tokenizer_that_takes_too_many_tokens_is_told() -> None:
    tokenizer = byte_tokenizer()
    near = probes.packs()["retrieval_near"].probes[0]  # 16 bytes do not hold the question
    with pytest.raises(OptionError, match=r"retrieval_near-0016-00 is to have 16 tokens.*--packs"):
        probes.build(near, lambda text: len(tokenizer(text)["input_ids"]))
    plain = probes.packs()["grammar"].probes[0]
    prompt = probes.build(plain, lambda text: len(tokenizer(text)["input_ids"]))
    assert (prompt.text, prompt.tokens, prompt.spans) == (plain.text, len(plain.text or ""), {})


def test_selection() -> None:
    chosen = probes.select(["chat", "brackets", "chat"], 3)
    assert [probe.pack for probe in chosen] == ["chat"] * 3 + ["brackets"] * 3
    # a limited run has every distance before it has one twice
    assert {probe.distance for probe in probes.select(["retrieval_far"], 5)} == set(stories.FAR)
    with pytest.raises(OptionError, match=r"pack 'bracket' does not exist: the packs are brackets, "):
        probes.select(["bracket"])
    with pytest.raises(OptionError, match="limit=0"):
        probes.select(None, 0)
