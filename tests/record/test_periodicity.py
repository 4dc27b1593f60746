"""Periodicity from attended positions: closed forms, invariances, and a real model on two kinds of text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attnhook
from attnhook.record import periodicity
from attnhook.record.token_record import TokenRecord

K = 8


def rows(distances, scores, count=40, first=200):
    """Consecutive rows that all attend at the same distances."""
    at = np.arange(first, first + count)
    return at[:, None] - np.asarray(distances), np.tile(np.asarray(scores, float), (count, 1)), at


def record(position, positions, scores, request_id="r", choice=0):
    return TokenRecord(
        request_id=request_id,
        query_position=position,
        layers=(0, 1),
        token_positions=np.asarray(positions, np.int32),
        attention_scores=np.asarray(scores, np.float32),
        fingerprints=np.zeros((2, 20), np.float32),
        choice=choice,
    )


def test_one_tooth_has_the_closed_form():
    # all at distance 64: it is a tooth of 64 (window of 65 distances), 32 (33), 16 (17), 8 (9) and 4 (5); the
    # longest period expects least of its tooth by chance
    found = periodicity.comb(*rows([64], [0.5]))
    assert np.isnan(found[: periodicity.MIN_ROWS - 1]).all()
    np.testing.assert_allclose(found[periodicity.MIN_ROWS - 1 :], 1 - 1 / 65)


@pytest.mark.parametrize("period", [5, 12, 40])
def test_a_comb_scores_high_and_an_even_spread_low(period):
    teeth = np.arange(1, 5) * period
    assert periodicity.comb(*rows(teeth, [0.1] * 4))[-1] > 0.7
    even = np.arange(4, 180)
    assert periodicity.comb(*rows(even, np.full(even.size, 1 / even.size)))[-1] < 0.05


def test_positions_that_stay_where_they_are_have_no_period():
    rng = np.random.default_rng(0)
    at = np.arange(150, 250)
    hubs = np.tile(rng.choice(140, K, replace=False), (100, 1))
    assert periodicity.comb(hubs, np.full((100, K), 0.1), at)[-1] < 0.2


def test_near_keys_the_sink_and_missing_entries_do_not_count():
    positions, scores, at = rows([12, 24], [0.2, 0.1])
    extra = np.stack([at, at - 1, np.zeros_like(at), np.full_like(at, -1)], axis=1)
    more = np.concatenate([positions, extra], axis=1)
    found = periodicity.comb(more, np.concatenate([scores, np.full(extra.shape, 0.2)], axis=1), at)
    np.testing.assert_allclose(found, periodicity.comb(positions, scores, at))


def test_nothing_attended_is_no_period():
    at = np.arange(20)
    assert periodicity.comb(np.full((20, 3), -1), np.zeros((20, 3)), at)[-1] == 0
    assert periodicity.comb(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, int)).shape == (0,)


def test_a_row_depends_on_the_rows_before_it_and_no_others():
    rng = np.random.default_rng(1)
    at = np.arange(100, 200)
    positions = rng.integers(0, 100, (100, K))
    scores = rng.random((100, K)) / K
    whole = periodicity.comb(positions, scores, at)
    np.testing.assert_allclose(periodicity.comb(positions[:60], scores[:60], at[:60]), whole[:60])
    window = slice(60 - periodicity.WINDOW, 60)
    assert periodicity.comb(positions[window], scores[window], at[window])[-1] == pytest.approx(whole[59])


def test_rows_far_apart_are_not_one_window():
    at = np.arange(20) * periodicity.WINDOW + 500
    assert np.isnan(periodicity.comb(at[:, None] - [12, 24], np.full((20, 2), 0.1), at)).all()


def test_requests_and_choices_are_kept_apart_and_order_is_free():
    rng = np.random.default_rng(2)
    records = [
        record(p, rng.integers(0, p, (2, 4)), rng.random((2, 4)) / 4, request_id, choice)
        for request_id, choice in (("a", 0), ("a", 1), ("b", 0))
        for p in range(100, 130)
    ]
    found = periodicity.measure(records)
    for start in (0, 30, 60):
        np.testing.assert_allclose(found[start : start + 30], periodicity.measure(records[start : start + 30]))
    order = rng.permutation(len(records))
    np.testing.assert_allclose(periodicity.measure([records[i] for i in order]), found[order])


def test_records_without_positions_are_unknown():
    bare = [record(p, np.zeros((2, 0)), np.zeros((2, 0))) for p in range(20)]
    assert np.isnan(periodicity.measure(bare)).all()
    assert periodicity.measure([]).shape == (0,)


@pytest.mark.model
def test_a_real_model_on_repeats_and_on_prose(smol, tokenizer, long_text):
    text = {
        "repeats": " basket wrong seven paint river hollow" * 30,
        "prose": long_text[2000:4000],
    }
    median = {}
    for name, content in text.items():
        ids = tokenizer(content, return_tensors="pt").input_ids[:, :160]
        with torch.no_grad(), attnhook.capture(model=smol, layers="auto", top_k=K, prompt=True) as records:
            smol.generate(ids, max_new_tokens=1, do_sample=False)
        median[name] = np.median(periodicity.measure(list(records))[80:])
    assert median["repeats"] > 2 * median["prose"]
    assert median["repeats"] > 0.14
