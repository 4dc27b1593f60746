"""Probe packs: several hundred prompts, each with the kind of attention that it should excite.

A pack says which behaviour its probes are for, and how one would judge whether a model shows it; docs/probes.md has
the table. The texts are fixed: the same ids and texts in every process, `digest` names them. Only the retrieval
packs need the model's tokenizer, for `build` puts as much filler between a fact and its question as makes up the
promised distance in tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from typing import Any, Literal, get_args

from attnhook.analysis.packs import local, open_ended, periodic, stories
from attnhook.analysis.packs.draft import Draft, data, random, words
from attnhook.errors import OptionError

Behaviour = Literal["local", "mid", "long", "periodic", "diffuse", "natural"]
Half = Literal["fit", "held-out"]
BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)

#: The zone that a behaviour should show as; the natural mixture has none.
ZONES: dict[Behaviour, str | None] = {
    "local": "syntax_floor",
    "mid": "semantic_bridge",
    "long": "long_range",
    "periodic": "structure_ripple",
    "diffuse": "diffuse",
    "natural": None,
}

#: Span of the tokens that a retrieval probe's question asks for.
ANSWER = "answer"
TOLERANCE = 3  # tokens by which a built distance may differ from the promised one

_PREFIX = "probe/"
_MAKERS: dict[str, Callable[[], list[Draft]]] = {
    "brackets": local.brackets,
    "json_repair": local.json_repair,
    "grammar": local.grammar,
    "coreference": stories.coreference,
    "entities": stories.entities,
    "retrieval_near": stories.retrieval_near,
    "retrieval_far": stories.retrieval_far,
    "counting": periodic.counting,
    "tables": periodic.tables,
    "lists": periodic.lists,
    "code_indent": periodic.code_indent,
    "repeats": periodic.repeats,
    "noise": open_ended.noise,
    "contradictions": open_ended.contradictions,
    "chat": open_ended.chat,
}


@dataclass(frozen=True)
class Probe:
    """One prompt: a ``text`` to be continued as it is, or ``messages`` for the model's chat template."""

    id: str
    pack: str
    behaviour: Behaviour
    half: Half  # thresholds are fitted on one half of each pack and judged on the other
    text: str | None  # a retrieval probe's lacks its filler until `build`
    messages: tuple[dict[str, str], ...] | None  # {"role": ..., "content": ...}, the user's first and last
    answer: str | None  # how the text should go on, where that is certain; without its leading space
    distance: int | None  # tokens from the answer's first token to the prompt's last, for retrieval
    _draft: Draft = field(repr=False)

    @property
    def request_id(self) -> str:
        """``probe/<pack>/<id>``: the request id of this probe's records."""
        return f"{_PREFIX}{self.pack}/{self.id}"


@dataclass(frozen=True)
class Pack:
    """Probes with one purpose."""

    name: str
    behaviour: Behaviour
    purpose: str
    judged: str  # how one would find out whether a model does what the pack is for
    probes: tuple[Probe, ...]

    @property
    def zone(self) -> str | None:
        """The zone that the pack should excite."""
        return ZONES[self.behaviour]


@dataclass(frozen=True)
class Prompt:
    """A probe as one tokenizer's model gets it."""

    probe: Probe
    text: str | None
    messages: tuple[dict[str, str], ...] | None
    tokens: int | None = None  # of the text
    distance: int | None = None  # as measured, within TOLERANCE of the promised one
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # positions of ANSWER, where it is to be retrieved

    @cached_property
    def transcript(self) -> str:
        """The messages as plain text, for models without a chat template, or the text."""
        if self.messages is None:
            return self.text or ""
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in self.messages]
        return "\n".join([*turns, "Assistant:"])


@cache
def packs() -> dict[str, Pack]:
    """All packs by name, in the order of the documentation."""
    catalogue: dict[str, dict[str, Any]] = data("catalogue")
    found = {}
    for name, make in _MAKERS.items():
        about, drafts = catalogue[name], make()
        halves = _halves(name, [draft.id for draft in drafts])
        probes = tuple(_probe(name, about["behaviour"], halves[draft.id], draft) for draft in drafts)
        found[name] = Pack(name, about["behaviour"], about["purpose"], about["judged"], probes)
    return found


def select(names: Sequence[str] | None = None, limit: int | None = None) -> list[Probe]:
    """The probes of the named packs (default: all), at most ``limit`` of each pack.

    Raises OptionError for a pack that does not exist.
    """
    known = packs()
    for name in names or ():
        if name not in known:
            raise OptionError("packs", f"pack {name!r} does not exist: the packs are {', '.join(known)}")
    if limit is not None and limit < 1:
        raise OptionError("limit", f"limit={limit} must be at least 1 probe of each pack")
    chosen = [known[name] for name in dict.fromkeys(known if names is None else names)]
    return [probe for pack in chosen for probe in pack.probes[:limit]]


def find(request_id: str) -> Probe | None:
    """The probe that a record belongs to, or None where its request id is not that of a probe."""
    return _by_request().get(request_id)


@cache
def _by_request() -> dict[str, Probe]:
    return {probe.request_id: probe for probe in select()}


@cache
def digest() -> str:
    """Sixteen hex digits that change whenever a probe does: they go with what was measured."""
    sha = hashlib.sha256(json.dumps([list(words(kind)) for kind in data("words")]).encode())  # the filler's words
    for probe in select():
        sha.update(repr((probe.pack, probe.behaviour, probe.half, probe._draft)).encode())
    sha.update("".join(islice(stories.sentences("digest"), 50)).encode())
    return sha.hexdigest()[:16]


def build(probe: Probe, count: Callable[[str], int]) -> Prompt:
    """The prompt of a probe for the tokenizer whose ``count`` says how many tokens a text has.

    ``count`` may include tokens that the tokenizer adds before every text. A retrieval probe gets filler until the
    answer lies ``distance`` tokens before the last one, within TOLERANCE. Raises OptionError where the tokenizer
    takes too many tokens for that, or breaks the text in a way that no filler mends.
    """
    draft = probe._draft
    if draft.filler is None or draft.distance is None or draft.found is None or probe.text is None:
        return Prompt(probe, probe.text, probe.messages, None if probe.text is None else count(probe.text))
    before, after = probe.text[: draft.filler], probe.text[draft.filler :]
    # a token takes the space before a word along, so the prefix ends before that space
    start = count(probe.text[: draft.found].removesuffix(" "))
    end = count(probe.text[: draft.found + len(draft.answer or "")])

    def measured(filler: str) -> int:
        return count(before + filler + after) - 1 - start

    filler, distance = _fill(probe, measured)
    text = before + filler + after
    return Prompt(probe, text, None, count(text), distance, {ANSWER: (start, end)})


def _fill(probe: Probe, measured: Callable[[str], int]) -> tuple[str, int]:
    """Filler with which ``measured`` gives the promised distance, and what it gives."""
    promised = probe.distance or 0
    source, lines = stories.sentences(probe.request_id), list[str]()
    each = 12.0  # tokens per sentence, a guess until there are some
    distance = empty = measured("")
    while promised - distance > 2 * each:
        lines += islice(source, max(1, int((promised - distance) / each) - 1))
        distance = measured("".join(lines))
        each = max(1.0, (distance - empty) / len(lines))
        while distance > promised and lines:
            lines.pop()
            distance = measured("".join(lines))
    text = "".join(lines)
    # the rest is words that most tokenizers have whole; where one has not, it takes fewer of them
    rng = random("padding", probe.request_id)
    padding = [rng.choice(words("short")) for _ in range(max(0, promised - distance))]
    best = (text, distance)
    for size in range(len(padding), 0, -1):
        tried = f"{text} {' '.join(padding[:size]).capitalize()}."
        reached = measured(tried)
        if abs(reached - promised) < abs(best[1] - promised):
            best = (tried, reached)
        if reached <= promised:
            break
    if abs(best[1] - promised) > TOLERANCE:
        raise OptionError(
            "packs",
            f"probe {probe.pack}/{probe.id} is to have {promised} tokens between fact and question; with this "
            f"tokenizer it has {best[1]}: leave the pack {probe.pack} out with --packs",
        )
    return best


def _probe(pack: str, behaviour: Behaviour, half: Half, draft: Draft) -> Probe:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(draft.turns))
    return Probe(
        id=draft.id,
        pack=pack,
        behaviour=behaviour,
        half=half,
        text=draft.text or None,
        messages=messages or None,
        answer=draft.answer,
        distance=draft.distance,
        _draft=draft,
    )


def _halves(pack: str, ids: Sequence[str]) -> dict[str, Half]:
    """Every other id, in the order of their hashes, so that no pattern of the numbers shows in a half.

    Ids that differ in their last number only, the probes of one distance, are halved among themselves.
    """
    groups: dict[str, list[str]] = {}
    for name in ids:
        groups.setdefault(name.rpartition("-")[0], []).append(name)
    halves: dict[str, Half] = {}
    for group in groups.values():
        group.sort(key=lambda name: hashlib.sha256(f"{pack}/{name}".encode()).digest())
        halves |= {name: "held-out" if i % 2 else "fit" for i, name in enumerate(group)}
    return halves
