"""Batches: a pure function of seed and step, every window of an epoch once."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import batches
from gpt.data.token_files import Tokens
from gpt.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


def count_up(n: int) -> Tokens:
    """Tokens whose value is their place."""
    return Tokens([np.arange(n, dtype=np.uint32)], n)


def test_the_permutation_mixes_and_depends_on_its_key():
    size = 10_000
    place = np.arange(size, dtype=np.uint64)
    orders = [
        batches.permute(place, np.full(size, key, np.uint64), size).astype(float) for key in (1, 2)
    ]
    series = [place.astype(float), *orders, *(np.roll(order, 1) for order in orders)]
    correlations = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(correlations).max() < 0.05  # five standard deviations
    assert np.mean(orders[0] == orders[1]) < 0.01


@given(
    seq_len=st.integers(1, 20), extra=st.integers(1, 300), batch_size=st.integers(1, 9), seed=SEEDS
)
@settings(max_examples=30)
def test_every_window_of_an_epoch_is_seen_once(seq_len, extra, batch_size, seed):
    tokens = count_up(seq_len + extra)
    n_windows, _ = batches.count_windows(len(tokens), seq_len)
    steps = -(-2 * n_windows // batch_size)
    rows = np.concatenate(
        [batches.batch(tokens, seed, step, batch_size, seq_len) for step in range(steps)]
    )
    assert rows.dtype == np.int32 and rows.shape[1] == seq_len + 1
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in (rows[:n_windows], rows[n_windows : 2 * n_windows]):
        starts = np.sort(epoch[:, 0])
        assert (np.diff(starts) == seq_len).all()
        assert n_windows * seq_len > len(tokens) - 1 - 2 * seq_len  # little is left out


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = count_up(5000)
    once = [batches.batch(tokens, 7, step, 4, 16) for step in range(50)]
    again = [batches.batch(tokens, 7, step, 4, 16) for step in reversed(range(50))][::-1]
    assert np.array_equal(once, again)
    assert not np.array_equal(once[0], batches.batch(tokens, 8, 0, 4, 16))
    assert not np.array_equal(once[0], once[1])
    starts = batches.batch(tokens, 7, 0, 200, 16)[:, 0]
    assert np.mean(np.diff(starts) == 16) < 0.1  # not in the order of the text
    rows = batches.batch(tokens, 2**31 - 1, 2**40, 512, 16)  # no number overflows
    assert rows.min() >= 0 and (np.diff(rows, axis=1) == 1).all()


@pytest.mark.parametrize("rows", [slice(4, 12), np.array([0, 3, 6])])
def test_rows_are_those_of_the_whole_batch(rows):
    tokens = count_up(700)
    for step in range(20):  # over several ends of epochs
        whole = batches.batch(tokens, 3, step, 12, 16)
        assert np.array_equal(batches.batch(tokens, 3, step, 12, 16, rows), whole[rows])


def test_epochs_begin_at_different_offsets():
    tokens = count_up(1000)
    n_windows, _ = batches.count_windows(1000, 16)
    phases = {
        int(batches.batch(tokens, 0, epoch, n_windows, 16)[:, 0].min()) for epoch in range(100)
    }
    assert phases == set(range(16))


def test_text_shorter_than_a_sequence_is_refused_with_its_length():
    assert batches.batch(count_up(17), 0, 0, 2, 16).tolist() == [list(range(17))] * 2
    with pytest.raises(UserError, match=r"has 16 tokens .*--seq-len 16"):
        batches.batch(count_up(16), 0, 0, 2, 16)
    with pytest.raises(UserError, match="--seq-len 2000"):
        batches.require_length(count_up(1500), 2000)


@given(n=st.integers(2, 200), seq_len=st.integers(1, 40), batch_size=st.integers(1, 7))
@settings(max_examples=30)
def test_evaluation_counts_every_target_once(n, seq_len, batch_size):
    seen = np.zeros(n)
    for tokens, weights in batches.evaluation_windows(count_up(n), seq_len, 0, batch_size):
        assert tokens.shape == (batch_size, seq_len + 1) and tokens.dtype == np.int32
        assert weights.shape == (batch_size, seq_len) and weights.dtype == np.float32
        targets = tokens[:, 1:][weights > 0]
        assert (targets == tokens[:, :-1][weights > 0] + 1).all()
        np.add.at(seen, targets, weights[weights > 0])
    assert seen.tolist() == [0] + [1] * (n - 1)


@given(n=st.integers(60, 3000), max_tokens=st.integers(1, 3000), batch_size=st.integers(1, 7))
@settings(max_examples=30)
def test_a_bounded_evaluation_reads_whole_windows_spread_evenly(n, max_tokens, batch_size):
    found = list(batches.evaluation_windows(count_up(n), 16, max_tokens, batch_size))
    counted = sum(weights.sum() for _, weights in found)
    if max_tokens >= n - 1:
        assert counted == n - 1
        return
    assert counted == max(1, min(max_tokens, n - 1) // 16) * 16
    starts = np.concatenate([tokens[weights[:, 0] > 0, 0] for tokens, weights in found])
    gaps = np.diff(starts)
    assert (gaps >= 16).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 16)
    assert starts[-1] + (gaps.min() if len(gaps) else n) + 32 > n - 16


def test_prefetch_yields_in_order_and_stays_a_little_ahead():
    made, ahead = [], threading.Event()

    def make(step):
        made.append(step)
        if step == 5:
            ahead.set()
        return step * step

    steps = batches.prefetch(make, 3, 10)
    assert next(steps) == 9
    assert ahead.wait(60)
    time.sleep(0.1)  # for a thread that goes on too far; however long, a right one never does
    assert made == [3, 4, 5]
    assert list(steps) == [step * step for step in range(4, 10)]
    assert list(batches.prefetch(str, 5, 5)) == []


def test_an_error_in_the_thread_surfaces_in_its_turn_and_closing_ends_it():
    def make(step):
        if step == 2:
            raise UserError("broken")
        return step

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("prefetch")]

    steps = batches.prefetch(make, 0, 5)
    assert list(itertools.islice(steps, 2)) == [0, 1]
    with pytest.raises(UserError, match="broken"):
        next(steps)
    steps = batches.prefetch(lambda step: step, 0, 1000)
    next(steps)
    assert len(threads()) == 1
    steps.close()
    assert threads() == []
