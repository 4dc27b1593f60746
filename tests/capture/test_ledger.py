"""The account of a generation: whatever is removed, repeated or renumbered is found, whatever the driver does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attnhook.capture.ledger import RowLedger
from attnhook.capture.rows import Row

Sequence = tuple[str, int]


@st.composite
def generations(draw: st.DrawFn) -> tuple[list[list[Row]], dict[Sequence, int], int]:
    """Passes of a made-up driver, the tokens that each sequence got, and the pass at which somebody begins to listen.

    Batches of one to four sequences of different lengths, one to three choices each, prompts in one or several pieces,
    with and without their rows, sequences that end early.
    """
    choices = draw(st.integers(1, 3))
    count = draw(st.integers(1, 4)) * choices
    names = [(f"r-{n // choices}", n % choices) for n in range(count)]
    prompts = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    new = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    piece = draw(st.integers(1, 9))
    with_prompt = draw(st.booleans())
    longest, passes = max(prompts), []
    for start in range(0, longest, piece):  # padded on the left, so all prompts end together
        rows = []
        for b, (request, choice) in enumerate(names):
            for index in range(start, min(start + piece, longest)):
                position = index - (longest - prompts[b])
                step = 0 if index == longest - 1 else None
                if position >= 0 and (step is not None or with_prompt):
                    rows.append(Row(request, choice, position, step, b))
        passes.append(rows)
    for step in range(1, max(new)):
        passes.append([Row(*names[b], prompts[b] - 1 + step, step, b) for b in range(count) if step < new[b]])
    return passes, dict(zip(names, new, strict=True)), draw(st.integers(0, len(passes) - 1))


def account(passes: list[list[Row]], *, whole: bool = True) -> RowLedger:
    ledger = RowLedger(whole=whole)
    for rows in passes:
        ledger.note(rows)
    return ledger


@given(generations())
def test_what_is_whole_is_right(made: tuple[list[list[Row]], dict[Sequence, int], int]) -> None:
    passes, tokens, _ = made
    assert account(passes).check(tokens) == ([], 0)


@given(generations())
def test_who_comes_later_has_every_row_from_then_on(made: tuple[list[list[Row]], dict[Sequence, int], int]) -> None:
    passes, tokens, start = made
    assert account(passes[start:], whole=False).check(tokens) == ([], 0)


@given(generations(), st.data())
def test_each_spoilt_row_is_found(made: tuple[list[list[Row]], dict[Sequence, int], int], data: st.DataObject) -> None:
    passes, tokens, _ = made
    flat = [(n, i) for n, rows in enumerate(passes) for i, row in enumerate(rows) if row.decode_step is not None]
    n, i = data.draw(st.sampled_from(flat))
    row = passes[n][i]
    first = {r[:2]: r.position - r.decode_step for rows in passes for r in rows if r.decode_step is not None}
    assert account(passes).check(tokens, first) == ([], 0)
    how = data.draw(st.sampled_from(["removed", "repeated", "moved", "another step", "another's", "unknown"]))
    spoilt = [list(rows) for rows in passes]
    if how == "removed":
        del spoilt[n][i]
    elif how == "repeated":
        spoilt[n].insert(i, row)
    elif how == "moved":
        spoilt[n][i] = row._replace(position=row.position + data.draw(st.sampled_from([-1, 1, 7])))
    elif how == "another step":
        spoilt[n][i] = row._replace(decode_step=row.decode_step + data.draw(st.sampled_from([-1, 1, 5])))
    elif how == "another's":
        spoilt[n][i] = row._replace(request_id="somebody")
    else:
        spoilt[n].append(Row("nobody", 0, 3, 0, 0))
    told, rows = account(spoilt).check(tokens, first)
    assert told and rows >= 1, how
    name = {"another's": "somebody", "unknown": "nobody"}.get(how, row.request_id)
    assert any(name in line for line in told)


@given(generations(), st.data())
def test_spoilt_prompt_rows_are_found(
    made: tuple[list[list[Row]], dict[Sequence, int], int], data: st.DataObject
) -> None:
    passes, tokens, _ = made
    prompt = [(n, i) for n, rows in enumerate(passes) for i, row in enumerate(rows) if row.decode_step is None]
    if not prompt:
        return
    n, i = data.draw(st.sampled_from(prompt))
    row = passes[n][i]
    how = data.draw(st.sampled_from(["repeated", "moved", "removed"]))
    spoilt = [list(rows) for rows in passes]
    if how == "repeated":
        spoilt[n].insert(i, row)
    elif how == "moved":
        spoilt[n][i] = row._replace(position=row.position + 100)
    elif row.position == 0:
        return  # a prompt whose first rows came from a cache begins later
    else:
        del spoilt[n][i]
    assert account(spoilt).check(tokens)[0], how


def test_the_numbers_are_told() -> None:
    rows = [[Row("r-0", 0, 9, 0, 0)], *([Row("r-0", 0, 9 + n, n, 0)] for n in range(2, 30))]
    (line,), count = account(rows).check({("r-0", 0): 30})
    assert line == (
        "sequence r-0, choice 0: 30 tokens were generated, and rows of the decode steps "
        "[0, 2, 3, 4, 5, 6, ..., 26, 27, 28, 29] (29) came"
    )
    assert count == 1
