"""Every choice of the config, in combinations that cover each pair of choices at least once."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

from gpt import flops
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import kv_cache as kv
from gpt.model import positions, transformer

CHOICES = {
    "mlp": ["relu", "gelu", "gelu_tanh", "relu2", "swiglu"],
    "positions": ["learned", "sinusoidal", "rope", "none"],
    "norm": ["layer", "rms"],
    "norm_place": ["pre", "post"],
    "n_kv_heads": [1, 2, 4],
    "qk_norm": [False, True],
    "logit_softcap": [0.0, 5.0],
    "tied": [True, False],
    "bias": [True, False],
    "norm_bias": [None, False],
    "qkv_bias": [None, True],
    "out_bias": [None, True],
    "mlp_bias": [None, False],
    "d_head": [None, 6],
}
SMALL = ModelConfig(150, context_length=12, n_layers=2, n_heads=4, d_model=32)


def covering(choices):
    """Rows in which every pair of values of two fields meets: greedily, always the same."""
    names, rng = list(choices), np.random.default_rng(0)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in choices[a]
        for y in choices[b]
    }
    rows = []
    while pairs:
        drawn = [{n: v[rng.integers(len(v))] for n, v in choices.items()} for _ in range(200)]
        met = [set(itertools.combinations(row.items(), 2)) & pairs for row in drawn]
        best = max(range(200), key=lambda i: len(met[i]))
        rows.append(drawn[best])
        pairs -= met[best]
    return rows


ROWS = [dataclasses.replace(SMALL, **row) for row in covering(CHOICES)]


def weights(config, seed=0):
    """Weights far from their initial values: a zero bias or a unit scale would hide a bug."""
    noise = np.random.default_rng(seed)
    shapes = transformer.abstract(config)
    return jax.tree.map(lambda a: jnp.asarray(noise.normal(0.1, 0.3, a.shape), a.dtype), shapes)


@partial(jax.jit, static_argnums=0)
def whole_and_through_cache(config, params, tokens_BT):
    """Logits of the same tokens read at once, and as a prompt of 5 and then one by one."""
    whole_BTV = transformer.forward(config, params, tokens_BT)

    model = transformer.bind(config, transformer.unstack(params))
    B, T = tokens_BT.shape
    x_BTD, cache = model.hidden(tokens_BT[:, :5], kv.empty(config, B))
    cache = kv.grow(cache.advanced(jnp.full(B, 5)), T)

    def read_one(cache, token_B):
        x_BTD, cache = model.hidden(token_B[:, None], cache)
        return cache.advanced(jnp.ones(B, jnp.int32)), model.unembed(x_BTD[:, 0])

    _, logits_TBV = jax.lax.scan(read_one, cache, tokens_BT[:, 5:].T)
    return whole_BTV, jnp.concatenate([model.unembed(x_BTD), logits_TBV.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("config", ROWS, ids=range(len(ROWS)))
def test_choices_equal_numpy_and_keep_the_contract(config):
    """Read at once and through the cache, against an oracle that is causal by construction."""
    params = weights(config)
    tokens_BT = np.random.default_rng(1).integers(config.vocab_size, size=(2, 12)).astype(np.int32)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    oracle_BTV = np.stack([numpy_transformer.forward(exact, ids, config) for ids in tokens_BT])
    for logits_BTV in whole_and_through_cache(config, params, tokens_BT):
        largest = np.abs(logits_BTV - oracle_BTV).max(-1)
        assert (largest < 2e-5 * np.maximum(1, np.abs(oracle_BTV).max((1, 2)))[:, None]).all()

    tables = 1 if config.tied else 2
    padding = (config.padded_vocab - config.vocab_size) * 32 * tables
    assert flops.parameters(config) == sum(a.size for a in jax.tree.leaves(params)) - padding


def test_the_rows_cover_every_pair():
    met = {
        frozenset(pair)
        for config in ROWS
        for pair in itertools.combinations([(n, getattr(config, n)) for n in CHOICES], 2)
    }
    wanted = (
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(CHOICES, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
    )
    assert all(pair in met for pair in wanted) and len(ROWS) < 40


def test_rope_depends_on_distance_alone():
    """q·k of two turned vectors is the same wherever the pair stands (Su et al. 2021, 3.1)."""
    config = dataclasses.replace(SMALL, positions="rope")
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at_q, at_k):
        turned = [
            positions.apply_rope(x, positions.positions_of(config, jnp.array([[at]]), 1).rope)
            for at, x in ((at_q, q), (at_k, k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_stretched_rope_equals_numpy():
    """Eight pairs: some that turn fast, some slow, some between."""
    c = dataclasses.replace(
        SMALL, context_length=40, positions="rope", d_head=16, rope_theta=1000.0,
        rope_factor=8.0, rope_low=1.0, rope_high=4.0, rope_context=32,
    )  # fmt: skip
    params, ids = weights(c), np.random.default_rng(0).integers(c.vocab_size, size=40)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    ours = np.asarray(transformer.forward(c, params, jnp.asarray(ids[None])))[0]
    oracle = numpy_transformer.forward(exact, ids, c)
    assert np.abs(ours - oracle).max() < 2e-5 * max(1, np.abs(oracle).max())
    as_before = numpy_transformer.forward(exact, ids, dataclasses.replace(c, rope_factor=1.0))
    assert np.abs(oracle - as_before).max() > 0.1
    frequency = positions.frequencies(16, 1000.0)
    slowed = np.asarray(frequency / positions.scaled_frequencies(c))
    assert slowed[0] == 1 and slowed[-1] == 8 and any((slowed > 1) & (slowed < 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": "rope", "d_head": 5},
        {"positions": "sinusoidal", "d_model": 33, "d_head": 4},
        {"logit_softcap": -1.0},
        {"rope_theta": 0.0},
        {"rope_low": 4.0},
        {"rope_factor": float("inf")},
        {"rope_context": 0},
        {"norm_epsilon": float("nan")},
    ],
    ids=str,
)
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(UserError):
        dataclasses.replace(SMALL, **wrong)
