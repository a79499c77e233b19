"""From logits to a token, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.model.attention import MASKED
from gpt.sampling import draw

V = 17
keep_top_k, argmax, inverse_cdf = map(jax.jit, (draw.keep_top_k, draw.argmax, draw.inverse_cdf))


def rows(temperature=1.0, top_k=0, seed=0, n=1):
    full = lambda value, dtype: jnp.full(n, value, dtype)  # noqa: E731
    return draw.Draw(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(seed, jnp.uint32),
        jnp.arange(n, dtype=jnp.uint32),
    )


# Subnormal numbers are zero to most devices.
values = st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=V, max_size=V)


@settings(max_examples=200, deadline=None)
@given(values, st.integers(0, V + 3))
def test_top_k_keeps_the_k_largest_and_their_ties(logits, k):
    x = np.array([logits], np.float32)
    kept = np.asarray(keep_top_k(jnp.asarray(x), jnp.array([k])))[0]
    smallest = np.sort(x[0])[::-1][min(k, V) - 1] if k else -np.inf
    assert np.array_equal(kept, np.where(x[0] >= smallest, x[0], np.float32(MASKED)))


@settings(max_examples=200, deadline=None)
@given(values)
def test_argmax_is_the_first_largest(logits):
    x = np.array([logits], np.float32)
    assert int(argmax(jnp.asarray(x))[0]) == x[0].argmax()


@settings(max_examples=200, deadline=None)
@given(values, st.floats(0, 1, width=32), st.integers(1, V))
def test_inverse_cdf_never_draws_a_masked_token(logits, u, n_kept):
    x = np.array([logits], np.float32)
    x[0, n_kept:] = MASKED
    token = int(inverse_cdf(jnp.asarray(x), jnp.array([u], jnp.float32))[0])
    assert 0 <= token < n_kept


def test_sparse_rows_of_a_large_vocabulary_draw_what_was_kept():
    """Where a parallel sum wavers: one in a thousand of 50,257 kept, aims right at its steps."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (64, 50257)).astype(np.float32)
    logits[rng.random(logits.shape) > 0.001] = MASKED
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    cdf = np.asarray(jnp.cumsum(jnp.asarray(weight), axis=-1))
    for _ in range(20):
        at = cdf[np.arange(64), rng.integers(50257, size=64)] / cdf[:, -1]
        token = np.asarray(inverse_cdf(jnp.asarray(logits), jnp.asarray(at)))
        assert np.all(logits[np.arange(64), token] > MASKED)


def test_draws_follow_the_distribution():
    """Frequencies of 100,000 draws against softmax(logits / temperature), within 5 sigma."""
    n, temperature = 100_000, 0.7
    logits = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
    tokens = np.asarray(
        jax.jit(draw.sample)(
            jnp.tile(logits, (n, 1)), rows(temperature, n=n), jnp.zeros(n, jnp.int32)
        )
    )
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    frequency = np.bincount(tokens, minlength=V) / n
    assert np.all(np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / n))


def test_noise_depends_on_seed_sample_and_position():
    n = 64
    base = draw.uniform(rows(n=n), jnp.zeros(n, jnp.int32))
    assert len(np.unique(base)) == n
    assert np.array_equal(base, draw.uniform(rows(n=n), jnp.zeros(n, jnp.int32)))
    for other in (
        draw.uniform(rows(seed=1, n=n), jnp.zeros(n, jnp.int32)),
        draw.uniform(rows(n=n), jnp.ones(n, jnp.int32)),
    ):
        assert not np.any(np.asarray(base) == np.asarray(other))


def test_rows_draw_by_their_own_settings():
    """Greedy, top-1 and free rows side by side in one program."""
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1, (300, V)).astype(np.float32))
    mixed = draw.Draw(
        jnp.tile(jnp.array([0.0, 1.0, 1.0], jnp.float32), 100),
        jnp.tile(jnp.array([0, 1, 0], jnp.int32), 100),
        jnp.zeros(300, jnp.uint32),
        jnp.arange(300, dtype=jnp.uint32),
    )
    tokens = np.asarray(draw.sample(logits, mixed, jnp.zeros(300, jnp.int32)))
    likeliest = np.asarray(logits).argmax(-1)
    assert np.array_equal(tokens[0::3], likeliest[0::3])
    assert np.array_equal(tokens[1::3], likeliest[1::3])
    assert 0 < np.mean(tokens[2::3] == likeliest[2::3]) < 0.9


def test_logprob_ignores_temperature_and_filters():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 2, (4, V)).astype(np.float32))
    tokens = jnp.array([0, 5, 9, 16])
    expected = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(4), tokens]
    assert np.allclose(draw.logprob(logits, tokens), expected, atol=1e-6)
