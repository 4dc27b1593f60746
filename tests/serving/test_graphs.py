"""Buffers that a CUDA graph writes queries into: what replays see, played by hand."""

from __future__ import annotations

import torch

from attnhook.serving.graphs import KeptQueries


def queries(rows: int, layer: int) -> torch.Tensor:
    return (torch.arange(rows * 6, dtype=torch.float32) + 1000 * layer).view(rows, 2, 3)


def test_rows_that_the_index_names() -> None:
    kept = KeptQueries({0: (2, 3), 5: (2, 3)}, 4, torch.float32, torch.device("cpu"))
    assert kept.records(5) and not kept.records(1)
    kept.aim(torch.tensor([7, 0, 3]))
    for layer in (0, 5):
        kept.keep(layer, queries(9, layer))
    for layer in (0, 5):
        got = kept.get(layer, 3)
        assert got is not None and torch.equal(got, queries(9, layer)[[7, 0, 3]])
    assert kept.get(1, 3) is None


def test_a_smaller_graph_after_a_larger_one() -> None:
    kept = KeptQueries({0: (2, 3)}, 4, torch.float32, torch.device("cpu"))
    kept.aim(torch.tensor([7, 8]))
    kept.keep(0, queries(9, 0))
    kept.rest()
    kept.keep(0, queries(2, 0))  # rows 7 and 8 would not be there
    got = kept.get(0, 2)
    assert got is not None and torch.equal(got, queries(2, 0)[[0, 0]])


def test_more_rows_than_room() -> None:
    kept = KeptQueries({0: (2, 3)}, 2, torch.float32, torch.device("cpu"))
    kept.aim(torch.tensor([1, 2, 3]))
    kept.keep(0, queries(9, 0))
    assert kept.get(0, 3) is None


def test_queries_of_another_type_are_given_up() -> None:
    kept = KeptQueries({0: (2, 3)}, 2, torch.bfloat16, torch.device("cpu"))
    kept.aim(torch.tensor([1]))
    kept.keep(0, queries(9, 0))
    assert kept.get(0, 1) is None and not kept.records(0)


def test_a_pass_that_nothing_keeps_shows_no_queries_of_another() -> None:
    kept = KeptQueries({0: (2, 3), 1: (4, 3)}, 4, torch.bfloat16, torch.device("cpu"))
    kept.aim(torch.tensor([1, 2]))
    kept.keep(0, queries(9, 0).bfloat16())
    kept.keep(1, torch.ones(9, 4, 3, dtype=torch.bfloat16))
    kept.rest()
    kept.aim(torch.tensor([3]))
    for layer in (0, 1):
        got = kept.get(layer, 1)
        assert got is not None and bool(got.isnan().all())


def test_a_layer_that_is_given_up_is_not_among_the_kept() -> None:
    kept = KeptQueries({0: (2, 3), 1: (2, 3)}, 4, torch.float32, torch.device("cpu"))
    kept.drop(0, ValueError("another shape"))
    assert 0 not in kept and 1 in kept
