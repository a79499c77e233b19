"""From logits to a token, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.model.attention import MASKED
from gpt.sampling import sampler

V = 17
NEUTRAL = {"repetition_penalty": 1.0, "temperature": 1.0}
NEUTRAL |= {name: one.off for name, one in sampler.FILTERS.items()}
NOISE = {"seed": 0, "sample": 0}
adjust, filtered = jax.jit(sampler.adjust_logits), jax.jit(sampler.filter_logits)
inverse_cdf, sample = jax.jit(sampler.inverse_cdf), jax.jit(sampler.sample)


def rows(n=1, bias=None, **columns) -> sampler.SamplingParams:
    """`n` rows of neutral settings but for `columns`: one value for all, or one for each."""
    full = {}
    for kind, defaults in (("float32", NEUTRAL), ("uint32", NOISE)):
        for name, value in defaults.items():
            column = np.asarray(columns.get(name, value), kind)
            full[name] = jnp.asarray(np.broadcast_to(column, n))
    filters = {name: full.pop(name) for name in sampler.FILTERS}
    bias = jnp.zeros((n, V), jnp.float32) if bias is None else jnp.asarray(bias)
    return sampler.SamplingParams(bias_BV=bias, filters=filters, **full)


def nothing_seen(n=1):
    return jnp.zeros((n, V), bool)


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def oracle(x, top_k, top_p, min_p):
    """What may be drawn, by sorting, in float64, ties at a threshold included; and what a rounding
    could turn: tokens whose share of the probability lies within 1e-5 of a threshold."""
    keep, unsure = np.ones(len(x), bool), np.zeros(len(x), bool)
    if top_k:
        keep = x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    p = softmax(np.where(keep, x, -np.inf))
    likelier = np.array([p[x > value].sum() for value in x])  # the share of what is likelier
    if top_p < 1:
        unsure |= keep & (np.abs(likelier - top_p) < 1e-5)
        keep &= (likelier < top_p) | (x == x.max())
    unsure |= keep & (np.abs(p / p.max() - min_p) < 1e-5) & (x < x.max())
    keep &= p >= min_p * p.max()
    return keep, unsure


# Subnormal numbers are zero to most devices.
numbers = st.floats(-50, 50, width=32, allow_subnormal=False)
values = st.lists(numbers, min_size=V, max_size=V)
tied = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0]), min_size=V, max_size=V)
lonely = st.integers(0, V - 1).map(lambda i: [0.0 if j == i else MASKED for j in range(V)])
shares = st.one_of(st.sampled_from([0.0, 1e-7, 0.5, 0.9, 1.0]), st.floats(0, 1, width=32))


@settings(max_examples=200)
@given(
    values | tied | lonely,
    st.integers(0, V + 3),
    shares,
    shares,
    st.sampled_from([1e-30, 0.1, 0.7, 1.0, 3.0, 1e30]),
)
@example([0.0] * V, 1, 1.0, 0.0, 1.0)  # all tied: one may not be chosen among equals
@example([1.0, *[0.0] * (V - 1)], 0, 0.0, 1.0, 1.0)
@example([0.0, -0.8, *[-9.0] * (V - 2)], 0, 1.0, 0.5, 1.0)  # exp(-0.8) is a little below a half
def test_filters_keep_what_sorting_keeps(logits, k, p, m, temperature):
    """Top-k, then top-p of what is left, then min-p, in Hugging Face's order."""
    x = np.array(logits, np.float32)
    one = rows(temperature=temperature, top_k=k, top_p=p, min_p=m)
    out = np.asarray(filtered(jnp.asarray(x)[None], one))[0]
    with np.errstate(over="ignore"):
        scaled = ((x - x.max()) / np.float32(temperature)).astype(np.float32)
    keep, unsure = oracle(scaled.astype(float), k, np.float32(p), np.float32(m))
    kept = out > MASKED / 2
    assert kept[x.argmax()]
    possible = (x > MASKED) & (scaled > MASKED / 2)
    wrong = (kept != (keep & possible)) & ~unsure
    assert not wrong.any()
    assert np.allclose(out[kept], scaled[kept], rtol=1e-6)


@settings(max_examples=100)
@given(values, st.lists(st.booleans(), min_size=V, max_size=V), st.floats(0.1, 5), values)
def test_bias_comes_before_the_penalty(logits, seen, penalty, bias):
    x, seen = np.array(logits, np.float32), np.array(seen)
    bias, penalty = np.array(bias, np.float32), np.float32(penalty)
    one = rows(bias=bias[None], repetition_penalty=penalty)
    out = np.asarray(adjust(jnp.asarray(x)[None], one, jnp.asarray(seen)[None]))[0]
    sums = x + bias
    punished = np.where(sums > 0, sums / penalty, sums * penalty)
    assert np.allclose(out, np.where(seen, punished, sums), rtol=1e-6)


def test_a_forbidden_token_is_never_drawn():
    """Not even where it is the likeliest, seen, and greedily wanted."""
    n = 500
    logits = jnp.zeros((n, V)).at[:, 3].set(30.0)
    bias = jnp.zeros((n, V)).at[:, 3].set(MASKED)
    for temperature in (0.0, 1.0, 1e30):
        settings = rows(n, bias, temperature=temperature, repetition_penalty=2, sample=range(n))
        tokens = sample(logits, settings, jnp.ones((n, V), bool), jnp.arange(n))
        assert not np.any(np.asarray(tokens) == 3)


def test_inverse_cdf_is_the_inverse_of_the_sum():
    """Over several blocks of a large vocabulary, in float64; off by a rounding of u at most."""
    rng = np.random.default_rng(0)
    x, u = rng.normal(0, 1, (200, 1000)).astype(np.float32), rng.random(200).astype(np.float32)
    x -= x.max(-1, keepdims=True)
    tokens = np.asarray(inverse_cdf(jnp.asarray(x), jnp.asarray(u)))
    weight = np.exp(x.astype(float))
    cdf = weight.cumsum(-1) / weight.sum(-1, keepdims=True)
    row = np.arange(200)
    below = np.where(tokens > 0, cdf[row, tokens - 1], 0)
    assert np.all(u < cdf[row, tokens] + 1e-6) and np.all(u >= below - 1e-6)
    assert len(np.unique(tokens)) > 100


def test_sparse_rows_of_a_large_vocabulary_draw_what_was_kept():
    """Where a parallel sum wavers: one in a thousand of 50,257 kept, aims right at its steps."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (64, 50257)).astype(np.float32)
    logits[rng.random(logits.shape) > 0.001] = MASKED
    logits -= logits.max(-1, keepdims=True)
    logits = np.maximum(logits, MASKED)
    weight = np.exp(logits)
    cdf = np.asarray(jnp.cumsum(jnp.asarray(weight), axis=-1))
    for _ in range(20):
        at = cdf[np.arange(64), rng.integers(50257, size=64)] / cdf[:, -1]
        token = np.asarray(inverse_cdf(jnp.asarray(logits), jnp.asarray(at)))
        assert np.all(logits[np.arange(64), token] > MASKED)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9)])
def test_draws_follow_the_filtered_distribution(temperature, top_p):
    """Frequencies of 100,000 draws against the softmax of what is kept, within 5 sigma."""
    n = 100_000
    logits = np.random.default_rng(3).normal(0, 1.5, V).astype(np.float32)
    mixed = rows(n, sample=np.arange(n), temperature=temperature, top_p=top_p)
    tokens = sample(jnp.tile(logits, (n, 1)), mixed, nothing_seen(n), jnp.zeros(n, jnp.int32))
    frequency = np.bincount(np.asarray(tokens), minlength=V) / n
    keep, _ = oracle(logits.astype(float), 0, top_p, 0)
    assert keep.sum() > 1 and (keep.sum() < V) == (top_p < 1)
    p = softmax(np.where(keep, logits / temperature, -np.inf))
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n))


def test_noise_depends_on_seed_sample_and_position():
    n, start, later = 50, jnp.zeros(50, jnp.int32), jnp.ones(50, jnp.int32)
    base = np.asarray(sampler.uniform(rows(n, sample=range(n)), start))
    assert len(np.unique(base)) == n
    assert not np.any(base == sampler.uniform(rows(n, sample=range(n), seed=1), start))
    assert not np.any(base == sampler.uniform(rows(n, sample=range(n)), later))


columns = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.integers(0, 5),
        "top_p": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "seed": st.integers(0, 3),
        "sample": st.integers(0, 3),
    }
)


def test_the_search_for_thresholds_is_skipped_where_nobody_asks(monkeypatch):
    """One program for both: what the device runs is counted."""
    calls, honest = [], sampler.keep_largest

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return honest(*args)

    monkeypatch.setattr(sampler, "keep_largest", counted)
    fresh, x = jax.jit(lambda *args: sampler.sample(*args)), jnp.zeros((2, V))
    for columns, searches in [
        ({"temperature": 0, "top_k": 3}, 0),
        ({}, 0),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.5, "top_k": 3}, 2),
    ]:
        calls.clear()
        fresh(x, rows(2, **columns), nothing_seen(2), jnp.zeros(2, jnp.int32))
        jax.effects_barrier()
        assert len(calls) == searches, columns
    assert fresh._cache_size() == 1


@settings(max_examples=100)
@given(
    st.lists(columns, min_size=4, max_size=4),
    st.lists(values | tied | lonely, min_size=4, max_size=4),
    st.integers(0, 1000),
)
def test_an_accelerator_draws_what_a_cpu_draws(each, logits, seed):
    """Thresholds found by digits, and only the steps that the host says are needed."""
    rng = np.random.default_rng(seed)
    logits = jnp.array(logits, jnp.float32)
    seen, at = jnp.asarray(rng.random((4, V)) < 0.3), jnp.arange(4)
    mixed = rows(4, **{name: [one[name] for one in each] for name in (*NEUTRAL, *NOISE)})
    known = sampler.with_known_stages(mixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "platform", lambda: "gpu")
        tokens = sampler.sample(logits, known, seen, at)
    assert np.array_equal(tokens, sample(logits, mixed, seen, at))


def test_stages_are_those_that_some_row_needs():
    assert sampler.with_known_stages(rows(2)).stages == {"draw"}
    mixed = rows(2, temperature=[0, 1], top_p=[1, 0.5], repetition_penalty=1.1)
    assert sampler.with_known_stages(mixed).stages == {"adjust", "greedy", "draw", "top_p"}
