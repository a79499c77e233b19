"""Scores of given text: of any length, each token once, from a few programs, in little memory."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from byte_models import make_model

from gpt import hardware
from gpt.compile_log import Stopwatch
from gpt.config import ModelConfig
from gpt.data.tokenizers import IdTokenizer
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import engine, scoring

CONFIG = ModelConfig(257, context_length=16, n_layers=2, n_heads=2, d_model=16)
EOT = 256
forward = jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, loudness=5.0)


def random_ids(length):
    return np.random.default_rng(length).integers(EOT, size=length).tolist()


def one_by_one(model, ids, stride):
    """Hugging Face's loop: a window every `stride` tokens, each predicts what is new in it."""
    sequence, expected = [EOT, *ids], []
    for start in range(0, len(ids), stride):
        window = sequence[start : start + 17]
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logprobs = np.asarray(jax.nn.log_softmax(forward(CONFIG, model.params, padded)[0]))
        new = range(len(expected) - start, len(window) - 1)
        expected += [float(logprobs[i, window[i + 1]]) for i in new]
        if start + 16 >= len(ids):
            return expected


@pytest.mark.parametrize("stride", [1, 8, 15, 16, None])
@pytest.mark.parametrize("length", [1, 16, 17, 50])
def test_a_text_is_read_in_windows(model, length, stride):
    """Read eight at a time or one by one, each token keeps its log-probability."""
    ids = random_ids(length)
    scored = model.score(ids, stride)
    assert np.allclose(scored.logprobs, one_by_one(model, ids, stride or 8), atol=1e-5)


def test_a_long_window_is_read_in_pieces_over_the_cache(monkeypatch, watch):
    """The last piece is smaller; the result is that of one pass."""
    model = make_model(dataclasses.replace(CONFIG, context_length=72), loudness=5.0)
    ids = random_ids(150)
    whole = model.score(ids)
    monkeypatch.setattr(engine, "PIECE", 32)
    pieces = watch(scoring, "target_logprobs")
    assert np.allclose(model.score(ids).logprobs, whole.logprobs, atol=2e-5)
    shapes = {(tokens_BT.shape, cache.capacity) for _, _, cache, tokens_BT, *_ in pieces}
    assert shapes == {((1, 32), 0), ((1, 32), 72), ((1, 8), 72)}


def test_windows_that_exceed_memory_are_refused_and_smaller_ones_are_not(monkeypatch):
    model = make_model(dataclasses.replace(CONFIG, context_length=4096), loudness=5.0)
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) + 20_000_000
    monkeypatch.setattr(hardware, "memory", lambda: (need, "a small machine"))
    with pytest.raises(UserError, match=r"4,096 tokens take .* score in smaller ones \(window\)"):
        model.score(random_ids(4000))
    score = model.score(random_ids(100), window=32)
    assert (score.context, score.stride) == (32, 16)


def test_any_length_takes_few_programs(model):
    for length in (17, 16 * 12):  # windows one by one, and in a batch
        model.score(random_ids(length))
    with Stopwatch() as watch:
        for length in range(16 * 12 + 1, 400, 31):
            model.score(random_ids(length))
    assert watch.compile_seconds == 0


def test_totals():
    made = scoring.Score([1, 2], [-1.0, -3.0], 4, context=16, stride=8, prefix=[0], before="")
    assert made.mean_nll == 2.0
    assert made.perplexity == pytest.approx(np.e**2)
    assert made.bits_per_byte == pytest.approx(4 / np.log(2) / 4)
    assert dataclasses.replace(made, logprobs=[-1e4]).perplexity == math.inf


def test_what_is_no_text_has_no_bytes(model):
    """Special tokens are predicted like others, and count no byte; bare ids are no text at all."""
    plain, marked = model.score(list(b"abc")), model.score([*b"abc", EOT])
    assert (plain.n_bytes, marked.n_bytes) == (3, 3)
    assert marked.bits_per_byte > plain.bits_per_byte
    assert model.score([EOT]).bits_per_byte is None
    bare = dataclasses.replace(model, tokenizer=IdTokenizer(257, EOT)).score([101, 102])
    assert bare.bits_per_byte is None and bare.to_json()["bits_per_byte"] is None
    assert "bits per byte" not in str(bare) and "bits per byte" in str(plain)


def test_without_a_prefix_the_first_token_is_not_scored(model):
    alone = dataclasses.replace(model, prefix="none")
    assert alone.score([EOT, *b"abc"]).logprobs == model.score("abc").logprobs
    assert alone.score("abc").token_ids == [*b"bc"]
    assert "(its first token not scored, context 16, stride 8)" in str(alone.score("abc"))
    assert "(after '<|endoftext|>', context 16, stride 8)" in str(model.score("abc"))
    with pytest.raises(UserError, match="nothing to score"):
        alone.score("a")
    endless = dataclasses.replace(model, tokenizer=IdTokenizer(257, -1))
    assert endless.score([1, 2, 3]).token_ids == [2, 3]


def test_a_score_that_is_no_number_is_refused(model, monkeypatch):
    """By the first token that has none, of a text in two windows."""
    honest = scoring.target_logprobs

    def broken(*args):
        logprobs_BT, cache = honest(*args)
        return logprobs_BT.at[:, 12].set(np.nan), cache

    monkeypatch.setattr(scoring, "target_logprobs", broken)
    with pytest.raises(UserError, match="the model's output is not a number at token 13: its"):
        model.score(random_ids(20))


def test_what_cannot_be_scored_is_refused(model):
    for ids, settings, words in (
        ([], {}, "nothing to score"),
        ([3, 257], {}, "token id 257 does not exist: expected an integer from 0 to 256"),
        ([-1], {}, "token id -1"),
        ([1], {"stride": 0}, "stride is 0: expected 1 to 16"),
        ([1], {"window": 8, "stride": 9}, "stride is 9: expected 1 to 8"),
        ([1], {"window": 17}, "window is 17: expected 1 to 16"),
    ):
        with pytest.raises(UserError, match=words):
            model.score(ids, **settings)
