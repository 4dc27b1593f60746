"""A worker's passes over a fake engine, whose attention is real: plans, groups, drafts, graphs, ranks, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attnhook.errors import UnsupportedError
from attnhook.options import RequestOptions
from attnhook.serving.wire import Share
from tests.serving.fake import DIM, HEADS, LAYERS, Board, Engine, Part, Request, ThreadRanks, check, on_ranks, records

ALL = RequestOptions(layers="all", top_k=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_request(name: str = "r0", prompt: int = 6, length: int = 12, options: RequestOptions | None = ALL) -> Request:
    seed = torch.Generator().manual_seed(sum(map(ord, name)))
    return Request(name, torch.randint(0, 50, (length,), generator=seed).tolist(), prompt, options)


def generate(engine: Engine, request: Request, *, chunks: tuple[int, ...] = ()) -> list[Share]:
    """All passes of one request alone: its prompt, in pieces where it is cut, then token by token."""
    pieces = [*chunks, request.prompt - sum(chunks), *[1] * (len(request.tokens) - request.prompt)]
    return [engine.run((request, tokens))[request.name] for tokens in pieces]


def test_every_generated_token_has_its_row() -> None:
    request = a_request()
    shares = generate(Engine(), request)
    assert [share.error for share in shares] == [None] * 7
    rows = [records(share.generated) for share in shares]
    assert [[(row.decode_step, row.query_position) for row in one] for one in rows] == [[(n, 5 + n)] for n in range(7)]
    for (row,) in rows:
        assert row.model == "fake-4" and row.layers == (0, 1, 2, 3)
        check(request, row)


def test_prompt_rows_come_once_though_the_prompt_is_computed_in_pieces_and_again() -> None:
    request = a_request(options=replace(ALL, prompt=True))
    engine = Engine()
    shares = [engine.run((request, 2))["r0"]]
    request.computed = 0  # preempted: its keys are gone
    request.pages.clear()
    shares += [engine.run((request, tokens))["r0"] for tokens in (3, 3, 1)]
    prompt = [row for share in shares for row in records(share.prompt)]
    assert [row.query_position for row in prompt] == [0, 1, 2, 3, 4]
    assert [row.decode_step for row in prompt] == [None] * 5
    for row in prompt:
        check(request, row)
    assert [share.generated != [] for share in shares] == [False, False, True, True]


def test_prompt_rows_that_came_from_a_cache_are_told() -> None:
    request, engine = a_request(options=replace(ALL, prompt=True)), Engine()
    warm = Request("warm", request.tokens, 6)
    engine.run((warm, 4))
    request.computed, request.pages = 3, [*warm.pages]
    share = engine.run((request, 3))["r0"]
    assert share.error == "attention_prompt: rows 0 to 2 of the prompt came from a cache and were not computed"
    assert [row.query_position for row in records(share.prompt)] == [3, 4]


CHOSEN = replace(ALL, rows=((1, 3), (4, 5)))


def test_chosen_prompt_rows_come_once_through_pieces_and_again() -> None:
    request, engine = a_request(options=CHOSEN), Engine()
    shares = [engine.run((request, 2))["r0"]]
    request.computed = 0  # preempted: its keys are gone
    request.pages.clear()
    shares += [engine.run((request, tokens))["r0"] for tokens in (3, 3, 1)]
    assert [share.error for share in shares] == [None] * 4
    prompt = [row for share in shares for row in records(share.prompt)]
    assert [row.query_position for row in prompt] == [1, 2, 4]
    for row in prompt:
        check(request, row)


@pytest.mark.parametrize(
    ("cached", "error", "positions"),
    [
        (1, None, [1, 2, 4]),
        (2, "attention_rows: rows 1 to 1 of the prompt came from a cache and were not computed", [2, 4]),
        (3, "attention_rows: rows 1 to 2 of the prompt came from a cache and were not computed", [4]),
    ],
)
def test_chosen_rows_that_came_from_a_cache_are_told(cached: int, error: str | None, positions: list[int]) -> None:
    request, engine = a_request(options=CHOSEN), Engine()
    warm = Request("warm", request.tokens, 6)
    engine.run((warm, 4))
    request.computed, request.pages = cached, [*warm.pages]
    share = engine.run((request, 6 - cached))["r0"]
    assert share.error == error
    assert [row.query_position for row in records(share.prompt)] == positions


@pytest.mark.parametrize(("rows", "generated"), [(((1, 3),), []), (((1, 3), (5, 6)), [5])])
def test_no_row_of_the_answer_but_a_chosen_one_of_the_prompt(
    rows: tuple[tuple[int, int], ...], generated: list[int]
) -> None:
    request = a_request(options=replace(ALL, rows=rows, max_tokens=0))
    shares = generate(Engine(), request, chunks=(4,))
    assert [row.query_position for share in shares for row in records(share.prompt)] == [1, 2]
    assert [row.query_position for share in shares for row in records(share.generated)] == generated


def test_chosen_rows_beyond_the_prompt_are_refused() -> None:
    request, engine = a_request(options=replace(ALL, rows=((4, 7),))), Engine()
    share = engine.run((request, 6))["r0"]
    assert share.error is not None and "attention_rows: [4, 7] reaches beyond the prompt" in share.error
    assert share.generated == []


def test_heads_chosen_by_layer_are_those_of_as_many_requests() -> None:
    by_layer: dict[int, tuple[int, ...]] = {0: (1,), 2: (0, 3), -1: (1,)}
    request = a_request(options=replace(ALL, layers=(0, 1, 2, 3), heads=by_layer))
    shares = generate(Engine(), request)
    for layer, heads in ((0, (1,)), (1, None), (2, (0, 3)), (3, (1,))):
        alone = a_request(options=RequestOptions(layers=(layer,), top_k=5, heads=heads))
        for together, single in zip(shares, generate(Engine(), alone), strict=True):
            (one,), (other,) = records(together.generated), records(single.generated)
            assert one.layers == (0, 1, 2, 3)
            assert np.array_equal(one.token_positions[layer], other.token_positions[0])
            assert np.array_equal(one.attention_scores[layer], other.attention_scores[0])
            assert np.array_equal(one.fingerprints[layer], other.fingerprints[0])


def test_a_mixed_batch_each_its_own() -> None:
    quiet = a_request("quiet", options=None)
    same, twin = a_request("same"), a_request("twin")
    other = a_request("other", options=RequestOptions(layers=(1,), heads=(0, 3), top_k=2))
    thrifty = a_request("thrifty", options=replace(ALL, stride=2, max_tokens=2))
    engine = Engine()
    batch = [quiet, same, other, twin, thrifty]
    shares = [engine.run(*((request, 6) for request in batch))]
    shares += [engine.run(*((request, 1) for request in batch)) for _ in range(4)]
    for at, step in enumerate(shares):
        assert set(step) == {"same", "twin", "other", "thrifty"}
        for request in (same, twin):
            (row,) = records(step[request.name].generated)
            assert row.request_id == request.name and row.query_position == 5 + at
            check(request, row)
        (row,) = records(step["other"].generated)
        assert row.layers == (1,) and row.token_positions.shape == (1, 2)
    assert [len(records(step["thrifty"].generated)) for step in shares] == [1, 0, 1, 0, 0]


def test_rows_of_drafts_one_place_for_each_that_may_be_accepted() -> None:
    request, engine = a_request(options=replace(ALL, stride=2)), Engine()
    engine.run((request, 6))
    share = engine.run(Part(request, 4, drafts=3))["r0"]
    # decode steps 1 to 4, of which the stride wants 2 and 4
    assert [bool(row) for row in share.generated] == [False, True, False, True]
    for row in records(share.generated):
        assert row.query_position == 5 + (row.decode_step or 0)
        check(request, row)


def test_the_self_check_rebuilds_every_row() -> None:
    request = a_request(options=replace(ALL, self_check=True))
    shares = generate(Engine(), request)
    checks = [share.check for share in shares]
    assert all(check is not None and check < 1e-5 for check in checks)


def test_an_output_that_is_none_of_the_formula_is_refused() -> None:
    request, engine = a_request(length=20, prompt=16), Engine()
    honest = engine.adapter.output
    engine.adapter.output = lambda call: 2 * honest(call)  # type: ignore[method-assign, operator]
    share = engine.run((request, 16))["r0"]
    assert share.error is not None and "layer 0: its output differs from softmax attention" in share.error
    assert share.generated == [b""]


# -- what goes wrong is told to those who ask, and to nobody else


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (RequestOptions(layers=(7,)), "attention_layers"),
        (RequestOptions(heads=(HEADS,)), "attention_heads"),
        (RequestOptions(layers=(1,), heads={2: (0,)}), "attention_heads: layer 2 is not captured"),
        (RequestOptions(layers=(1,), heads={1: (HEADS,)}), f"attention_heads: head {HEADS} of layer 1 does not exist"),
    ],
)
def test_a_layer_or_head_that_is_not_there_concerns_one_request(options: RequestOptions, error: str) -> None:
    bad, good = a_request("bad", options=options), a_request("good")
    shares = Engine().run((bad, 6), (good, 6))
    assert error in (shares["bad"].error or "") and shares["bad"].generated == []
    assert shares["good"].error is None
    check(good, records(shares["good"].generated)[0])


def test_keys_that_cannot_be_read_fail_the_pass_and_not_the_next() -> None:
    request, engine = a_request(), Engine()

    def broken(call: Any) -> None:
        raise UnsupportedError(f"layer {call.layer} is in a format that nobody knows")

    engine.adapter.break_keys = broken
    share = engine.run((request, 6))["r0"]
    assert share.error == "layer 0 is in a format that nobody knows" and not records(share.generated)
    engine.adapter.break_keys = lambda call: None
    share = engine.run((request, 1))["r0"]
    assert share.error is None
    check(request, records(share.generated)[0])


def test_rows_that_cannot_be_told_fail_all_who_ask() -> None:
    first, second, engine = a_request("a"), a_request("b"), Engine()

    def broken(batch: list[Part]) -> None:
        raise RuntimeError("the batch has no rows")

    engine.adapter.break_rows = broken
    shares = engine.run((first, 6), (second, 6))
    assert {name: share.error for name, share in shares.items()} == dict.fromkeys(
        "ab", "RuntimeError: the batch has no rows"
    )


def test_a_layer_that_makes_no_call_is_missed() -> None:
    request, engine = a_request(), Engine()
    attend = engine._attend
    engine._attend = lambda layer, batch: None if layer == 2 else attend(layer, batch)  # type: ignore[method-assign]
    share = engine.run((request, 6))["r0"]
    assert share.error == "layers [2] made no attention call in this forward pass"


def test_a_query_that_is_no_number_drops_its_row_alone() -> None:
    broken, whole, engine = a_request("broken"), a_request("whole"), Engine()
    honest = engine.adapter.queries

    def queries(call: Any) -> torch.Tensor:
        q = honest(call).clone()
        q[5, 0, 0] = torch.nan  # the last row of the first request
        return q

    engine.adapter.queries = queries  # type: ignore[method-assign]
    shares = engine.run((broken, 6), (whole, 6))
    assert "1 rows dropped" in (shares["broken"].error or "") and not records(shares["broken"].generated)
    assert shares["whole"].error is None and len(records(shares["whole"].generated)) == 1


def test_a_pass_that_the_engine_gives_up_leaves_nothing_behind() -> None:
    request, engine = a_request(), Engine()
    engine.worker.begin([Part(request, 6)], ["r0"])
    engine.worker.abandon()
    assert engine.worker.finish() == {} and not engine.worker.sees
    check(request, records(engine.run((request, 6))["r0"].generated)[0])


def test_a_model_without_attention_is_refused() -> None:
    class NoLayers(Engine):
        @property
        def layers(self) -> range:
            return range(0)

        @layers.setter
        def layers(self, value: range) -> None:
            pass

    with pytest.raises(UnsupportedError, match="Fake's model has no attention layer"):
        NoLayers()


# -- graphs, whose queries are kept


def test_a_pass_that_graphs_run_gives_the_same_records(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [records(share.generated) for share in generate(Engine(), a_request())]
    monkeypatch.setenv("ATTNHOOK_GRAPH_LAYERS", "all")
    engine, request = Engine(avoids_graphs=True), a_request()
    silent = a_request("silent", options=None)
    engine.run((silent, 6))  # the graphs are captured of a pass in which nobody asks
    replayed = []
    for tokens in [6, *[1] * 6]:
        replayed.append(engine.run((request, tokens))["r0"])
    assert [records(share.generated)[0].to_bytes() for share in replayed] == [one[0].to_bytes() for one in plain]


def test_layers_that_no_graph_keeps_are_run_by_python_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_GRAPH_LAYERS", "0,3")
    for avoids in (True, False):
        engine, request = Engine(avoids_graphs=avoids), a_request()
        engine.run((a_request("silent", options=None), 6))
        share = engine.run((request, 6))["r0"]
        check(request, records(share.generated)[0])
        assert records(share.generated)[0].layers == tuple(range(LAYERS))


def test_more_rows_than_a_graph_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_GRAPH_LAYERS", "all")
    engine, request = Engine(avoids_graphs=True), a_request(prompt=10, length=11, options=replace(ALL, prompt=True))
    engine.run((a_request("silent", options=None), 6))
    share = engine.run((request, 10))["r0"]  # ten rows, and room for eight
    assert share.error is None and len(records(share.prompt)) == 9


# -- ranks


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_together_give_the_records_of_one(size: int, stages: int) -> None:
    def work(engine: Engine) -> dict[str, Share]:
        one = a_request("one", options=replace(ALL, spans={"start": (0, 3)}))
        by_layer = {1: (0, 3), 2: (3,)}
        two = a_request("two", options=RequestOptions(layers=(1, 2), heads=by_layer, top_k=3, rows=((0, 3), (4, 5))))
        shares = engine.run((one, 6), (two, 4))
        later = engine.run((one, 1), (two, 2))
        return {**{f"{name} first": share for name, share in shares.items()}, **later}

    alone, together = work(Engine()), on_ranks(size, stages, work)
    assert set(together) == set(alone) == {"one first", "two first", "one", "two"}
    for name, share in alone.items():
        assert together[name].error is None
        mine, theirs = ([*records(x.prompt), *records(x.generated)] for x in (share, together[name]))
        assert len(mine) == len(theirs) and (mine or name == "two first")
        for a, b in zip(mine, theirs, strict=True):
            assert a.layers == b.layers and a.query_position == b.query_position
            assert (a.token_positions == b.token_positions).all()
            assert abs(a.attention_scores - b.attention_scores).max() < 1e-6
            assert abs(a.fingerprints - b.fingerprints).max() < 1e-5
            assert a.span_names == b.span_names
            assert a.span_mass.size == 0 or abs(a.span_mass - b.span_mass).max() < 1e-6


def test_a_rank_that_fails_keeps_in_step_and_says_so() -> None:
    def work(engine: Engine) -> dict[str, Share]:
        request = a_request()
        if engine.adapter.ranks.rank == 1:

            def broken(call: Any) -> None:
                raise UnsupportedError("rank 1 has lost its keys")

            engine.adapter.break_keys = broken
        failed = engine.run((request, 6))
        engine.adapter.break_keys = lambda call: None
        later = engine.run((request, 1))
        return {f"{name} {when}": s for when, x in (("failed", failed), ("later", later)) for name, s in x.items()}

    shares = on_ranks(2, 1, work)
    assert shares["r0 failed"].error == "rank 1 has lost its keys" and not records(shares["r0 failed"].generated)
    assert shares["r0 later"].error is None and len(records(shares["r0 later"].generated)) == 1


def test_a_stage_that_fails_leaves_no_partial_record() -> None:
    def work(engine: Engine) -> dict[str, Share]:
        if engine.adapter.ranks.stage == 0:

            def broken(call: Any) -> None:
                raise UnsupportedError("the first stage has lost its keys")

            engine.adapter.break_keys = broken
        return engine.run((a_request(), 6))

    share = on_ranks(1, 2, work)["r0"]
    assert share.error == "the first stage has lost its keys" and share.generated == [b""]


def test_ranks_that_lost_each_other_say_so() -> None:
    class Lost(ThreadRanks):
        def collect(self, mine: Any) -> list[Any]:
            raise UnsupportedError("the workers of this model lost each other")

    engine = Engine(Lost(Board(1, 1), 0, 0))
    share = engine.run((a_request(), 6))["r0"]
    assert share.error == "the workers of this model lost each other" and not records(share.generated)


def test_the_kernel_of_a_batch_is_kept_and_dropped_with_its_shape() -> None:
    engine, request = Engine(), a_request()
    engine.run((request, 6))
    for _ in range(4):
        engine.run((request, 1))
    assert len(engine.worker._memory.kernels) == 1
    assert engine.adapter.shape().layers[0].dim == DIM


def test_an_adapter_tells_of_a_softmax_what_it_has() -> None:
    request, engine = a_request(options=replace(ALL, self_check=True)), Engine()
    whole = engine.adapter.keys
    engine.adapter.keys = lambda call: whole(call)._replace(softmax={"scale": DIM**-0.5})  # type: ignore[method-assign]
    share = engine.run((request, 6))["r0"]
    assert share.error is None and share.check is not None and share.check < 1e-5
    check(request, records(share.generated)[0])
