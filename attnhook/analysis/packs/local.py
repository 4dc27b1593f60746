"""Packs that excite attention to the last few tokens."""

from __future__ import annotations

import json

from attnhook.analysis.packs.draft import Draft, data, numbered, random, words

_COUNT = 24
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def brackets() -> list[Draft]:
    """Nested expressions that are cut before a closing bracket."""
    drafts = []
    for number in range(_COUNT):
        rng = random("brackets", number)
        lines = [_closed(_expression(rng.randrange(10**6), 3)) for _ in range(2)]
        expression = _expression(rng.randrange(10**6), 2 + number % 4)
        drafts.append(
            Draft(
                numbered("brackets", number),
                "\n".join([*lines, expression]),
                answer=_closing(expression)[0],
            )
        )
    return drafts


def _expression(seed: int, depth: int) -> str:
    """Brackets opened ``depth`` times with something in each, none closed."""
    rng = random("expression", seed)
    text = rng.choice(("total = ", "x = ", "result = ", "return "))
    for _ in range(depth):
        text += f"{rng.choice('abcdfgh')}{rng.choice('([')}{rng.choice('nmpqrst')} {rng.choice('+-*')} "
    return text + str(rng.randrange(2, 99))


def _closing(text: str) -> str:
    open_: list[str] = []
    for letter in text:
        if letter in _CLOSING:
            open_.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            open_.pop()
    return "".join(reversed(open_))


def _closed(text: str) -> str:
    return text + _closing(text)


def json_repair() -> list[Draft]:
    """An object that is whole, and one of the same kind that is cut at one of four places."""
    drafts = []
    for number in range(_COUNT):
        rng = random("json_repair", number)

        def thing() -> dict[str, object]:
            return {
                "name": rng.choice(words("things")),  # noqa: B023 - called in this round only
                "colour": rng.choice(words("colours")),  # noqa: B023
                "sizes": [rng.randrange(1, 40), rng.randrange(1, 40)],  # noqa: B023
                "stored": rng.random() < 0.5,  # noqa: B023
            }

        whole, cut = json.dumps(thing()), json.dumps(thing())
        mark, answer = (('"colour', '":'), ('"sizes": ', "["), ("]", ", "), ("}", "}"))[number % 4]
        end = cut.index(mark) + (0 if mark == "}" else len(mark))
        text = f"Valid JSON, one object a line:\n{whole}\n{cut[:end]}"
        drafts.append(Draft(numbered("json_repair", number), text.rstrip(), answer=answer.strip()))
    return drafts


def grammar() -> list[Draft]:
    """Written sentences without their end."""
    return [
        Draft(numbered("grammar", number), text, answer=answer) for number, (text, answer) in enumerate(data("grammar"))
    ]
