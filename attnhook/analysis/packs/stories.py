"""Packs that ask for something from the last paragraphs, or from afar."""

from __future__ import annotations

from collections.abc import Iterator

from attnhook.analysis.packs.draft import Draft, numbered, random, words

_COUNT = 32
NEAR = (16, 32, 64, 128)  # tokens
FAR = (256, 512, 1024, 2048, 4000)
_NEAR_EACH, _FAR_EACH = 10, 8

_STORIES = (
    (
        "{a} and {b} run the bakery in {town}. {a} bakes the bread at night, and {b} sells it in the morning. "
        "It is a hard life, but the two would not want another one. At four o'clock the oven is hot, and the street "
        "outside is dark and silent. The person who is awake at that hour, because the bread has to be baked, is",
        "a",
    ),
    (
        "{a} gave {b} the keys to the house in {town}, because {b} was going to stay there for the summer. The garden "
        "was in bloom, and the neighbours brought eggs and milk. In August the roof began to leak. "
        "The person who was living there and put a bucket under the leak was",
        "b",
    ),
    (
        "{a} is afraid of water; {b} is not. When the ferry to {town} left the harbour, one of them stood at the rail "
        "and laughed at the waves. The other one sat inside with closed eyes and counted to a hundred, again and "
        "again, until the land came into sight. The name of the one with closed eyes is",
        "a",
    ),
    (
        "At the market in {town}, {a} sells flowers and {b} sells cheese. Last week somebody came and bought "
        "everything that was on one of the two tables: roses, tulips, even the last bunch of daisies. The table was "
        "empty before noon. The one who could go home early that day was",
        "a",
    ),
)


def coreference() -> list[Draft]:
    """Stories of two people that end where one of them is named."""
    drafts = []
    for number in range(_COUNT):
        rng = random("coreference", number)
        a, b = rng.sample(words("names"), 2)
        story, who = _STORIES[number % len(_STORIES)]
        text = story.format(a=a, b=b, town=rng.choice(words("towns")))
        drafts.append(Draft(numbered("coreference", number), text, answer=a if who == "a" else b))
    return drafts


def entities() -> list[Draft]:
    """Things that are moved, and the question where one of them is now."""
    drafts = []
    for number in range(_COUNT):
        rng = random("entities", number)
        things, places = rng.sample(words("things"), 3), rng.sample(words("places"), 4)
        who = rng.sample(words("names"), 2)
        at = dict(zip(things, places, strict=False))
        lines = [f"The {thing} is in the {place}." for thing, place in at.items()]
        for _ in range(2 + number % 4):
            thing = rng.choice(things)
            target = rng.choice([place for place in places if place != at[thing]])
            lines.append(f"{rng.choice(who)} takes the {thing} out of the {at[thing]} and puts it into the {target}.")
            at[thing] = target
        asked = rng.choice(things)
        lines.append(f"Now the {asked} is in the")
        drafts.append(Draft(numbered("entities", number), " ".join(lines), answer=at[asked]))
    return drafts


def retrieval_near() -> list[Draft]:
    """Facts to be fetched from 16 to 128 tokens back."""
    return list(_retrieval("retrieval_near", NEAR, _NEAR_EACH))


def retrieval_far() -> list[Draft]:
    """Facts to be fetched from 256 to 4,000 tokens back."""
    return list(_retrieval("retrieval_far", FAR, _FAR_EACH))


def _retrieval(pack: str, distances: tuple[int, ...], each: int) -> Iterator[Draft]:
    # the first of each distance before the second of any: a limited run covers them all
    for number in range(each):
        for distance in distances:
            rng = random(pack, f"{distance} {number}")
            kind, values = rng.choice(
                (
                    ("The mayor of {} collects things made of", "materials"),
                    ("The farmers of {} are known for their", "fruits"),
                    ("The town hall of {} was once painted", "colours"),
                )
            )
            towns, things = rng.sample(words("towns"), 3), rng.sample(words(values), 3)
            facts = [f"{kind.format(town)} {thing}." for town, thing in zip(towns, things, strict=True)]
            # the one that is asked for is the last of three: the others are wrong answers of the same form
            begin = "From the travel notes. " + " ".join(facts)
            found = len(begin) - len(things[-1]) - 1
            text = f"{begin} {kind.format(towns[-1])}"
            yield Draft(
                f"{pack}-{distance:04d}-{number:02d}",
                text,
                answer=things[-1],
                filler=len(begin),
                distance=distance,
                found=found,
            )


def sentences(seed: str) -> Iterator[str]:
    """Sentences without end, each with a leading space, that hold nothing that any probe asks for."""
    rng = random("filler", seed)
    forms = (
        "On {d} the {n} {v} the {a} {m}.",
        "The {a} {n} {v} the {m}, and the {o} {w} the {b} {p}.",
        "Nobody knew why the {n} {v} the {m} on {d}.",
        "Behind the {n} there was a {m}, {a} and {b}.",
        "It was {a} there, so the {n} {v} the {m}.",
        "When the {n} {v} the {b} {m}, the {o} was already {a}.",
        "A {n} and a {m} were all that the {o} {v}.",
        "By {d} the {n} had {v} every {m}.",
    )
    while True:
        n, m, o, p = rng.sample(words("nouns"), 4)
        a, b = rng.sample(words("adjectives"), 2)
        v, w = rng.sample(words("verbs"), 2)
        form = rng.choice(forms)
        yield " " + form.format(n=n, m=m, o=o, p=p, a=a, b=b, v=v, w=w, d=rng.choice(words("days")))
