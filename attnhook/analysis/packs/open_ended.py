"""Packs without one right place to look at: diffuse, and the natural mixture."""

from __future__ import annotations

from attnhook.analysis.packs.draft import Draft, data, numbered, random, words

_COUNT = 24


def noise() -> list[Draft]:
    """Random words, letters or digits."""
    drafts = []
    pool = [
        word for kind in ("nouns", "adjectives", "verbs", "short", "things", "days", "fruits") for word in words(kind)
    ]
    for number in range(_COUNT):
        rng = random("noise", number)
        size = 60 + 30 * (number % 4)
        if number % 3 == 0:
            text = " ".join(rng.choice(pool) for _ in range(size))
        elif number % 3 == 1:
            text = " ".join(
                "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 8)))
                for _ in range(size // 2)
            )
        else:
            text = " ".join(str(rng.randrange(10, 10**4)) for _ in range(size // 2))
        drafts.append(Draft(numbered("noise", number), text))
    return drafts


def contradictions() -> list[Draft]:
    """Several witnesses of one thing who all say something else."""
    drafts = []
    for number in range(_COUNT):
        rng = random("contradictions", number)
        kind = ("colours", "places", "fruits")[number % 3]
        form = (
            "{who} says that the car was {what}.",
            "{who} says that the money was in the {what}.",
            "{who} says that the cart was full of {what}.",
        )[number % 3]
        end = ("In truth, the car was", "In truth, the money was in the", "In truth, the cart was full of")[number % 3]
        said = 4 + number % 4
        names, things = rng.sample(words("names"), said), rng.sample(words(kind), said)
        lines = [form.format(who=who, what=what) for who, what in zip(names, things, strict=True)]
        text = " ".join([*lines, "They cannot all be right, and none of them is more credible than the others.", end])
        drafts.append(Draft(numbered("contradictions", number), text))
    return drafts


def chat() -> list[Draft]:
    """What people ask assistants."""
    return [Draft(numbered("chat", number), turns=tuple(turns)) for number, turns in enumerate(data("chat"))]
