"""Scores of given text: of any length, and each token once."""

import jax
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import score

CONFIG = ModelConfig(50, context_length=16, n_layers=2, n_heads=2, d_model=16)
EOT = 49


@pytest.fixture(scope="module")
def params():
    stacked = transformer.init(CONFIG, jax.random.key(0))
    return transformer.unstack(jax.tree.map(lambda a: a * 5, stacked))


def full(params, sequence):
    """log p of each token of `sequence` but the first, from one pass over all of it."""
    logits = transformer.forward(CONFIG, params, np.array([sequence[:-1]]))[0]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return [logp[i, token] for i, token in enumerate(sequence[1:])]


def test_a_text_within_the_context(params):
    ids = list(np.random.default_rng(0).integers(49, size=16))
    assert np.allclose(score.score_ids(CONFIG, params, ids, EOT), full(params, [EOT, *ids]))


@pytest.mark.parametrize("overlap", [0, 1, 8, 15])
@pytest.mark.parametrize("length", [17, 33, 50])
def test_a_longer_text_is_read_in_overlapping_windows(params, length, overlap):
    """Each token is predicted once, from at least `overlap` tokens before it."""
    ids = [int(i) for i in np.random.default_rng(1).integers(49, size=length)]
    sequence = [EOT, *ids]
    scores = score.score_ids(CONFIG, params, ids, EOT, overlap)
    expected, start = full(params, sequence[:17]), 0
    while len(expected) < length:
        start = len(expected) - overlap
        expected += full(params, sequence[start : start + 17])[overlap:]
    assert np.allclose(scores, expected, atol=1e-5)


def test_totals():
    made = score.Score([1, 2], [-1.0, -3.0], n_bytes=4)
    assert made.mean_nll == 2.0
    assert made.perplexity == pytest.approx(np.e**2)
    assert made.bits_per_byte == pytest.approx(4 / np.log(2) / 4)


def test_nothing_to_score_is_refused(params):
    with pytest.raises(UserError, match="nothing to score"):
        score.score_ids(CONFIG, params, [], EOT)
