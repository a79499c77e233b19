"""Scores of given text: of any length, each token once, from a few programs."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.compile_log import Stopwatch
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import scoring

CONFIG = ModelConfig(50, context_length=16, n_layers=2, n_heads=2, d_model=16)
EOT = 49
forward = jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    stacked = transformer.init(CONFIG, jax.random.key(0))
    return transformer.unstack(jax.tree.map(lambda a: a * 5, stacked))


def random_ids(length):
    return np.random.default_rng(length).integers(49, size=length).tolist()


def full(params, sequence):
    """log p of each token of `sequence` but the first, from one pass over all of it."""
    padded = np.zeros((1, CONFIG.context_length), np.int32)
    padded[0, : len(sequence) - 1] = sequence[:-1]
    logits = forward(CONFIG, params, padded)[0]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return [float(logp[i, token]) for i, token in enumerate(sequence[1:])]


def one_by_one(params, ids, stride):
    """Hugging Face's loop: a window every `stride` tokens, each predicts what is new in it."""
    sequence, expected = [EOT, *ids], []
    for start in range(0, len(ids), stride):
        window = full(params, sequence[start : start + 17])
        expected += window[len(expected) - start :]
        if start + 16 >= len(ids):
            return expected


def test_a_text_within_the_context(params):
    ids = random_ids(16)
    scores = scoring.score_ids(CONFIG, params, ids, EOT)
    assert np.allclose(scores, full(params, [EOT, *ids]), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 8, 15, 16, None])
@pytest.mark.parametrize("length", [1, 17, 33, 50])
def test_a_longer_text_is_read_in_windows(params, length, stride):
    """Read eight at a time or one by one, each token keeps its log-probability."""
    ids = random_ids(length)
    scores = scoring.score_ids(CONFIG, params, ids, EOT, stride)
    assert np.allclose(scores, one_by_one(params, ids, stride or 8), atol=1e-5)


@given(n=st.integers(1, 200), size=st.integers(1, 20), data=st.data())
def test_windows_predict_each_token_once_with_enough_before_it(n, size, data):
    stride = data.draw(st.integers(1, size))
    windows = scoring.cut_windows(n, size, stride)
    assert [i for _, done, end in windows for i in range(done, end)] == list(range(n))
    for i, (start, done, end) in enumerate(windows):
        assert start == i * stride <= done and end - start <= size
        assert i == 0 or done - start == size - stride
    grouped = scoring.batches(windows)
    assert [window for group in grouped for window in group] == windows
    assert {len(group) for group in grouped} <= {1, scoring.ROWS}
    assert [len(group) for group in grouped].count(1) < scoring.ROWS


def test_any_length_takes_few_programs(params):
    for length in (17, 16 * 12):  # windows one by one, and in a batch
        scoring.score_ids(CONFIG, params, random_ids(length), EOT)
    with Stopwatch() as watch:
        for length in range(16 * 12 + 1, 400, 31):
            scoring.score_ids(CONFIG, params, random_ids(length), EOT)
    assert watch.programs == 0


def test_totals():
    made = scoring.Score([1, 2], [-1.0, -3.0], n_bytes=4, context=16, stride=8)
    assert made.mean_nll == 2.0
    assert made.perplexity == pytest.approx(np.e**2)
    assert made.bits_per_byte == pytest.approx(4 / np.log(2) / 4)


@pytest.mark.parametrize(("nll", "expected"), [(1e4, math.inf), (math.nan, math.nan)])
def test_totals_of_a_hopeless_model(nll, expected):
    perplexity = scoring.Score([1], [-nll], n_bytes=1, context=16, stride=8).perplexity
    assert perplexity == expected or (math.isnan(perplexity) and math.isnan(expected))


def test_a_score_that_is_no_number_is_refused(params, monkeypatch):
    """By the first token that has none, of a text in two windows."""
    honest = scoring.target_logprobs
    monkeypatch.setattr(scoring, "target_logprobs", lambda *a: honest(*a).at[:, 12].set(np.nan))
    with pytest.raises(UserError, match="the model's output is not a number at token 13: its"):
        scoring.score_ids(CONFIG, params, random_ids(20), EOT)


@pytest.mark.parametrize(
    ("ids", "stride", "words"),
    [
        ([], None, "nothing to score"),
        ([3, 50], None, "no token has the id 50: expected 0 to 49"),
        ([-1], None, "the id -1"),
        ([2**70], None, "expected 0 to 49"),
        ([1], 0, "stride is 0: expected 1 to 16"),
        ([1], 17, "stride is 17"),
    ],
)
def test_what_cannot_be_scored_is_refused(ids, stride, words, params):
    with pytest.raises(UserError, match=words):
        scoring.score_ids(CONFIG, params, ids, EOT, stride)
