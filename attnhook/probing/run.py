"""The loop over probes: build, run, hand to the sink, record; resumable at any point."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from attnhook.analysis.probes import Probe, Prompt, build
from attnhook.errors import AttnhookError, OptionError
from attnhook.plugins.contracts import Sink
from attnhook.probing.journal import Journal
from attnhook.probing.repeats import Repeats
from attnhook.probing.targets import Outcome, Target


@dataclass
class Tally:
    """What a run did, by pack."""

    probes: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)  # answers as they should be
    asked: Counter[str] = field(default_factory=Counter)  # probes with an answer
    dropped: Counter[str] = field(default_factory=Counter)  # rows that could not be captured, by reason
    skipped: dict[str, str] = field(default_factory=dict)  # probes that cannot be run here, and why

    def add(self, probe: Probe, entry: Mapping[str, Any]) -> None:
        """Count one finished probe, as its line of the journal tells it."""
        self.probes[probe.pack] += 1
        self.records[probe.pack] += entry["records"]
        self.dropped.update(entry.get("dropped", {}))
        if entry["right"] is not None:
            self.asked[probe.pack] += 1
            self.right[probe.pack] += entry["right"]


def run(
    probes: Sequence[Probe],
    target: Target,
    sink: Sink,
    journal: Journal,
    *,
    new_tokens: int,
    options: Mapping[str, Any],
    repeats: Repeats | None = None,
    progress: Callable[[Probe, Tally], object] = lambda probe, tally: None,
) -> Tally:
    """Run the probes that the journal does not have; ``progress`` is told of each that is finished or skipped.

    ``options`` are those of `attnhook.capture`; records in ``repeats`` are not written again. A probe that needs more
    tokens than the model's context, or whose distance the tokenizer cannot make, is skipped and not recorded. Raises
    AttnhookError at the first probe that fails; what was finished before is recorded.
    """
    tally = Tally()
    left = []
    for probe in probes:
        entry = journal.done.get(probe.request_id)
        if entry is None:
            left.append(probe)
        else:
            tally.add(probe, entry)
            progress(probe, tally)

    def skip(probe: Probe, why: str) -> None:
        tally.skipped[probe.request_id] = why
        progress(probe, tally)

    def attempt(probe: Probe) -> tuple[Prompt, Outcome] | str:
        prompt = _prepare(probe, target, new_tokens)
        return prompt if isinstance(prompt, str) else (prompt, target.run(prompt, new_tokens, options))

    for probe, result in _each(attempt, left, target.at_once):
        if isinstance(result, str):
            skip(probe, result)
            continue
        prompt, outcome = result
        if not outcome.records:
            why = ", ".join(f"{count} rows {reason}" for reason, count in outcome.dropped.items())
            raise AttnhookError(f"probe {probe.request_id} brought no record ({why or 'the answer is empty'})")
        entry = {
            "records": len(outcome.records),
            "right": None if probe.answer is None else is_right(outcome.text, probe.answer),
            "text": outcome.text,
            **({} if prompt.distance is None else {"distance": prompt.distance}),
            **({"dropped": dict(outcome.dropped)} if outcome.dropped else {}),
        }
        # at the sink first: what the journal has must be there
        try:
            fresh = outcome.records if repeats is None else repeats.without(outcome.records)
            if fresh:
                sink.write(fresh)
            sink.flush()
        except AttnhookError:
            raise
        except Exception as error:  # a sink may raise what its library raises
            raise AttnhookError(
                f"the sink did not take the records of {probe.request_id}: {type(error).__name__}: {error}; mend it "
                "and continue with --resume"
            ) from error
        journal.add(probe.request_id, entry)
        tally.add(probe, entry)
        progress(probe, tally)
    return tally


def is_right(text: str, answer: str) -> bool:
    """Whether a continuation begins with the answer: with the whole word, where the answer is one."""
    text = text.lstrip()
    return text.lower().startswith(answer.lower()) and not (
        answer[-1].isalnum() and re.match(r"\w", text[len(answer) :])
    )


def _prepare(probe: Probe, target: Target, new_tokens: int) -> Prompt | str:
    """The probe's prompt, or why it cannot be run here."""
    room = target.context
    if room is not None and (probe.distance or 0) + new_tokens > room:
        return f"{probe.distance} tokens are more than the model's context of {room}"
    try:
        prompt = build(probe, target.count)
    except OptionError as error:
        return str(error)
    tokens = target.count(prompt.transcript) if prompt.tokens is None else prompt.tokens
    if room is not None and tokens + new_tokens > room:
        return f"{tokens} tokens and {new_tokens} new ones are more than the model's context of {room}"
    return prompt


def _each(work: Callable[[Probe], Any], probes: Sequence[Probe], at_once: int) -> Iterator[tuple[Probe, Any]]:
    """Each probe with the result of its work, as they finish; so many are worked on at once."""
    if at_once == 1:
        for probe in probes:
            yield probe, work(probe)
        return
    waiting = iter(probes)
    with ThreadPoolExecutor(at_once) as pool:
        running: dict[Future[Any], Probe] = {}

        def more() -> None:
            probe = next(waiting, None)
            if probe is not None:
                running[pool.submit(work, probe)] = probe

        for _ in range(at_once):
            more()
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                probe = running.pop(future)
                more()
                yield probe, future.result()
