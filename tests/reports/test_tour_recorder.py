"""The recorder keeps what the forward pass computed, and samples what sample.py samples."""

import math

import byte_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import transformer
from gpt.reports import tour_recorder
from gpt.reports.tour_recorder import record_tour
from gpt.sampling import generate
from gpt.sampling.settings import Settings

MODERN = ModelConfig(
    257, 64, n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, positions="rope", norm="rms",
    mlp="swiglu", qk_norm=True, tied=False,
)  # fmt: skip
POST = ModelConfig(257, 64, n_layers=2, n_heads=1, d_model=16, norm_place="post", d_head=6)
TIED = ModelConfig(257, 8, n_layers=1, n_heads=2, d_model=64, positions="rope")
SETTINGS = Settings(
    max_new_tokens=4, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3
)
PROMPT = "今天 fish"


@pytest.fixture(scope="module", params=[MODERN, POST], ids=["modern", "post"])
def recorded(request):
    """A model, and the record of a tour."""
    model = byte_models.make_model(request.param, loudness=3)
    return model, record_tour(model, PROMPT, SETTINGS)


@pytest.fixture(scope="module")
def tied():
    return byte_models.make_model(TIED)


def test_recorded_logits_are_those_of_the_forward_pass(recorded):
    """Of prefill and of each decode step, against one pass without a cache; the lens ends there."""
    model, record = recorded
    logits_PV = transformer.forward(model.config, model.params, jnp.array([record.read_ids]))[0]
    recorded_PV = np.concatenate([call.logits_TV for call in record.calls])
    assert np.allclose(recorded_PV, logits_PV, atol=2e-5 * max(1, float(logits_PV.std())))
    probs, ids = jax.lax.top_k(jax.nn.softmax(recorded_PV), tour_recorder.LENS_TOP)
    assert record.lens_layers[-1] == model.config.n_layers
    assert np.allclose(record.lens_probs[-1], probs, atol=1e-4)
    assert np.mean(record.lens_ids[-1] == ids) > 0.95  # near ties may swap


def test_recorded_arrays_fit_together(recorded):
    """Queries and keys give the scores, their masked softmax the weights, and these the output."""
    model, record = recorded
    c = model.config
    k, v = (np.repeat(record.cached(name), c.n_heads // c.kv_heads, axis=1) for name in "kv")
    scores, weights = record.attention_map("scores"), record.attention_map("weights")
    P, T = len(record.read_ids), len(record.prompt_ids)
    is_visible = np.tril(np.ones((P, P), bool))
    dots = np.einsum("LPNH,LNSH->LNPS", record.by_position("q"), k)
    tolerance = 1e-4 * np.abs(dots).max()
    assert np.allclose(scores[..., is_visible], dots[..., is_visible], atol=tolerance)
    # Within the prefill the scores of later keys are kept too, to show what the mask removes.
    assert np.allclose(scores[..., :T, :T], dots[..., :T, :T], atol=tolerance)
    expected = jax.nn.softmax(np.where(is_visible, dots / math.sqrt(c.head_width), -1e30))
    assert np.allclose(weights, expected, atol=1e-5)
    assert np.all(weights[..., ~is_visible] == 0)
    mix = np.einsum("LNPS,LNSH->LPNH", weights, v)
    assert np.allclose(record.by_position("mix"), mix, atol=1e-4 * np.abs(v).max())


def test_it_samples_what_generate_samples(recorded):
    model, record = recorded
    (completion,) = generate.complete(model, [PROMPT], SETTINGS)
    tokens = [sampled.token for sampled in record.sampled]
    assert tokens[: len(completion.token_ids)] == completion.token_ids
    for sampled in record.sampled:
        probs = list(sampled.stages.values())[-1]
        low = probs[: sampled.token].sum(dtype=np.float64)
        assert low - 1e-5 <= sampled.uniform <= low + probs[sampled.token] + 1e-5
        assert list(sampled.stages) == ["the model", "penalty", "temperature", "top-k", "top-p"]
        assert np.count_nonzero(sampled.stages["top-k"]) <= 40
        assert all(math.isclose(p.sum(), 1, abs_tol=1e-5) for p in sampled.stages.values())


def test_a_tied_embedding_predicts_the_token_itself(tied):
    record = record_tour(tied, "abcdef", Settings(max_new_tokens=1, temperature=0))
    assert record.lens_layers[0] == 0
    assert record.lens_ids[0][:, 0].tolist() == record.read_ids
    assert record.sampled[0].uniform is None
    assert list(record.sampled[0].stages) == ["the model"]


def test_what_does_not_fit_is_refused(tied):
    with pytest.raises(UserError, match="9 tokens: expected at most the model's context of 8"):
        record_tour(tied, "a" * 9, SETTINGS)
    large = ModelConfig(257, 2048, n_layers=12, n_heads=12, d_model=768)
    tour_recorder.require_page_size(large, 64)
    with pytest.raises(UserError, match="a page of 200 positions of this model would have 45 MB"):
        tour_recorder.require_page_size(large, 200)
