"""Packs of texts that come back to the same form again and again."""

from __future__ import annotations

from attnhook.analysis.packs.draft import Draft, numbered, random, words

_COUNT = 24


def counting() -> list[Draft]:
    """Sequences with a fixed step."""
    drafts = []
    for number in range(_COUNT):
        rng = random("counting", number)
        start, step = rng.randrange(1, 30), (1, 2, 3, 5, 10, -1)[number % 6]
        start += 200 if step < 0 else 0
        items = 24 + 8 * (number % 3)
        form = ("{i}, ", "Step {i}\n", "page {i} of the book; ", "{i} sheep\n")[number // 6]
        text = "".join(form.format(i=start + i * step) for i in range(items))
        head, answer = form.split("{i}")[0], str(start + items * step)
        drafts.append(Draft(numbered("counting", number), (text + head).rstrip(" "), answer=answer))
    return drafts


def tables() -> list[Draft]:
    """Rows of a table, the last one begun."""
    drafts = []
    for number in range(_COUNT):
        rng = random("tables", number)
        kind = number % 3
        head = ("town", "colour", "number")
        rows = [
            (rng.choice(words("towns")), rng.choice(words("colours")), str(rng.randrange(10, 99)))
            for _ in range(12 + 4 * (number % 4))
        ]
        last = rng.choice(words("towns"))
        if kind == 0:
            lines = [f"| {a} | {b} | {c} |" for a, b, c in (head, ("---",) * 3, *rows)]
            lines.append(f"| {last} |")
        elif kind == 1:
            lines = [",".join(row) for row in (head, *rows)]
            lines.append(f"{last},")
        else:
            lines = [f"{a:<14}{b:<10}{c:>6}" for a, b, c in (head, *rows)]
            lines.append(last)
        drafts.append(Draft(numbered("tables", number), "\n".join(lines)))
    return drafts


def lists() -> list[Draft]:
    """Items of the same form, the last one begun."""
    drafts = []
    for number in range(_COUNT):
        rng = random("lists", number)
        items = 16 + 4 * (number % 4)
        lines = [("Shopping:", "Packing list:", "To do:")[number % 3]]
        for item in range(1, items + 1):
            lead = ("- ", f"{item}. ", "* [ ] ")[number // 3 % 3]
            thing = (
                f"{rng.randrange(2, 9)} {rng.choice(words('fruits'))} from {rng.choice(words('towns'))}",
                f"one {rng.choice(words('colours'))} {rng.choice(words('things'))}",
                f"bring the {rng.choice(words('things'))} to {rng.choice(words('names'))}",
            )[number % 3]
            lines.append(lead + thing)
        lines.append(("-", f"{items + 1}.", "* [ ]")[number // 3 % 3])
        drafts.append(Draft(numbered("lists", number), "\n".join(lines)))
    return drafts


def code_indent() -> list[Draft]:
    """Functions full of equal statements, the last one cut after its indentation and a first word."""
    drafts = []
    for number in range(_COUNT):
        rng = random("code_indent", number)
        depth = 1 + number % 3
        indent = "    " * depth
        lines = [
            *(("def place(board):", "    for row in board:", "        if row:")[:depth]),
        ]
        for _ in range(14 + 4 * (number % 4)):
            thing, colour = rng.choice(words("things")), rng.choice(words("colours"))
            lines.append(
                (
                    f'{indent}board["{thing}"] = "{colour}"',
                    f"{indent}{thing}.move({rng.randrange(10)}, {rng.randrange(10)})",
                    f'{indent}log.info("{thing} is {colour}")',
                )[number // 3 % 3]
            )
        lines.append(indent + ('board["', f"{rng.choice(words('things'))}.", "log.info(")[number // 3 % 3])
        drafts.append(Draft(numbered("code_indent", number), "\n".join(lines)))
    return drafts


def repeats() -> list[Draft]:
    """Runs of 4 to 24 unrelated words, repeated for about 240 words and cut inside a run."""
    drafts = []
    for number in range(_COUNT):
        rng = random("repeats", number)
        period = (4, 6, 8, 12, 16, 24)[number % 6]
        run = rng.sample(words("short"), period)
        total = 240 + rng.randrange(period)
        text = " ".join(run[i % period] for i in range(total))
        drafts.append(Draft(numbered("repeats", number), text, answer=run[total % period]))
    return drafts
