"""What the tour writes down is what the forward pass computed, and draws what sample.py draws."""

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
from gpt.sampling import generate
from gpt.sampling.settings import Settings

PLAIN = ModelConfig(257, 64, n_layers=1, n_heads=2, d_model=16)
MODERN = ModelConfig(
    257, 64, n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, positions="rope", norm="rms",
    mlp="swiglu", qk_norm=True, tied=False,
)  # fmt: skip
POST = ModelConfig(257, 64, n_layers=2, n_heads=1, d_model=16, norm_place="post", d_head=6)
SETTINGS = Settings(
    max_new_tokens=6, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3
)
PROMPT = "今天 fish"


@pytest.fixture(scope="module", params=[MODERN, POST], ids=["modern", "post"])
def journey(request):
    """A model and what the tour of a prompt noted."""
    model = byte_models.make_model(request.param, loudness=3)
    return model, tour_recorder.take_tour(model, PROMPT, SETTINGS)


def test_the_recorded_logits_are_the_forward_pass(journey):
    """Recorded through `attend`, in prefill and in each decode step, against one plain pass."""
    model, noted = journey
    tokens_BT = jnp.array([noted.read_ids])
    plain_TV = transformer.forward(model.config, model.params, tokens_BT)[0]
    recorded_PV = np.concatenate([reading.logits_TV for reading in noted.readings])
    assert np.allclose(recorded_PV, plain_TV, atol=2e-5 * max(1, float(plain_TV.std())))


def test_recorded_attention_makes_the_recorded_output(journey):
    """softmax(q k / sqrt(H)) over what is visible gives the weights; they and the values, the
    mix."""
    model, noted = journey
    c = model.config
    q, mix = noted.joined("q"), noted.joined("mix")
    k, v = (np.repeat(noted.cached(n), c.n_heads // c.kv_heads, axis=1) for n in "kv")
    scores, weights = noted.map("scores"), noted.map("weights")
    P = len(noted.read_ids)
    behind = np.tril(np.ones((P, P), bool))
    dots = np.einsum("LPNH,LNSH->LNPS", q, k)
    assert np.allclose(scores[..., behind], dots[..., behind], atol=1e-4 * np.abs(dots).max())
    expected = jax.nn.softmax(np.where(behind, dots / math.sqrt(c.head_width), -1e30))
    assert np.allclose(weights, expected, atol=1e-5)
    assert np.all(weights[..., ~behind] == 0)
    assert np.allclose(mix, np.einsum("LNPS,LNSH->LPNH", weights, v), atol=1e-4 * np.abs(v).max())


def test_scores_of_what_lies_ahead_are_kept_too(journey):
    """Within the prefill a query meets later keys, and the mask strikes the score out."""
    _, noted = journey
    T = len(noted.prompt_ids)
    ahead = np.triu(np.ones((T, T), bool), 1)
    assert np.any(noted.map("scores")[..., :T, :T][..., ahead] != 0)


def test_it_draws_what_generate_draws(journey):
    model, noted = journey
    (done,) = generate.complete(model, [PROMPT], SETTINGS)
    drawn = [drawing.token for drawing in noted.drawings]
    assert drawn[: len(done.token_ids)] == done.token_ids
    for drawing in noted.drawings:
        last = list(drawing.stages.values())[-1]
        before = last[: drawing.token].sum(dtype=np.float64)
        assert before - 1e-5 <= drawing.uniform <= before + last[drawing.token] + 1e-5
        assert list(drawing.stages) == ["the model", "penalty", "temperature", "top-k", "top-p"]
        assert np.count_nonzero(drawing.stages["top-k"]) <= 40
        assert all(math.isclose(probs.sum(), 1, abs_tol=1e-5) for probs in drawing.stages.values())


def test_the_cache_is_written_where_it_says(journey):
    """The prefill writes all slots of the prompt, each step the one after."""
    _, noted = journey
    T = len(noted.prompt_ids)
    assert noted.readings[0].written == list(range(T))
    for i, reading in enumerate(noted.readings[1:]):
        assert reading.written == [T + i] and reading.first == T + i
        assert reading.capacity >= T + len(noted.readings) - 1


def test_the_last_layer_of_the_lens_is_the_model(journey):
    model, noted = journey
    recorded_PV = np.concatenate([reading.logits_TV for reading in noted.readings])
    probs, ids = jax.lax.top_k(jax.nn.softmax(recorded_PV), tour_recorder.LENS_TOP)
    assert noted.lens_layers[-1] == model.config.n_layers
    assert np.allclose(noted.lens_probs[-1], probs, atol=1e-4)
    assert np.mean(noted.lens_ids[-1] == ids) > 0.95  # near ties may change places


def test_the_first_layer_of_the_lens_is_the_embedding():
    """A tied model without layers says the token it was given."""
    wide = ModelConfig(257, 32, n_layers=1, n_heads=2, d_model=64, positions="rope")
    model = byte_models.make_model(wide)
    noted = tour_recorder.take_tour(model, "abc", Settings(max_new_tokens=1, temperature=0))
    assert noted.lens_layers[0] == 0
    assert noted.lens_ids[0][:, 0].tolist() == noted.read_ids
    assert noted.drawings[0].uniform is None and list(noted.drawings[0].stages) == ["the model"]


def test_what_does_not_fit_is_refused():
    model = byte_models.make_model(PLAIN)
    with pytest.raises(UserError, match="65 tokens: expected at most the model's context of 64"):
        tour_recorder.take_tour(model, "a" * 65, SETTINGS)
    large = ModelConfig(257, 2048, n_layers=12, n_heads=12, d_model=768)
    tour_recorder.require_size(large, 64)
    with pytest.raises(UserError, match="a page of this model holds"):
        tour_recorder.require_size(large, 200)


def test_a_diverged_model_is_told():
    model = byte_models.make_model(PLAIN)
    model.params = jax.tree.map(lambda a: a * np.nan, model.params)
    with pytest.raises(UserError, match="not a number"):
        tour_recorder.take_tour(model, "ab", Settings())


def test_it_stops_where_the_context_does():
    model = byte_models.make_model(PLAIN)
    noted = tour_recorder.take_tour(model, "a" * 62, Settings(max_new_tokens=9, ignore_eos=True))
    assert len(noted.drawings) == 3 and len(noted.read_ids) == 64
