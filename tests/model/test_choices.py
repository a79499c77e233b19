"""Logits with every choice of the config, read at once and through the cache, against NumPy."""

import dataclasses
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

from gpt import flops
from gpt.config import ModelConfig
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


def models(n, seed):
    """`n` configs in which each value of a choice is as frequent as its others."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        columns[name] = [values[i % len(values)] for i in range(n)]
        rng.shuffle(columns[name])
    return [
        dataclasses.replace(SMALL, **{name: column[i] for name, column in columns.items()})
        for i in range(n)
    ]


def weights(config, seed=0):
    """Weights far from their initial values: a zero bias or a unit scale would hide a bug."""
    noise = np.random.default_rng(seed)
    shapes = transformer.abstract(config)
    return jax.tree.map(lambda a: jnp.asarray(noise.normal(0.1, 0.3, a.shape), a.dtype), shapes)


def agrees_with_numpy(logits_BTV, config, params, tokens_BT):
    """The oracle is causal by construction: who agrees with it sees no future."""
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    oracle_BTV = np.stack([numpy_transformer.forward(exact, ids, config) for ids in tokens_BT])
    largest = np.maximum(1, np.abs(oracle_BTV).max((1, 2), keepdims=True))
    return (np.abs(logits_BTV - oracle_BTV) < 2e-5 * largest).all()


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


MODELS = [pytest.param(config, id=f"model-{i}") for i, config in enumerate(models(10, seed=0))]
MODELS += [
    pytest.param(config, id=f"another-{i}", marks=pytest.mark.slow)
    for i, config in enumerate(models(100, seed=1))
]


@pytest.mark.parametrize("config", MODELS)
def test_logits_are_those_of_numpy(config):
    params = weights(config)
    tokens_BT = np.random.default_rng(1).integers(config.vocab_size, size=(2, 12)).astype(np.int32)
    for logits_BTV in whole_and_through_cache(config, params, tokens_BT):
        assert agrees_with_numpy(logits_BTV, config, params, tokens_BT)

    tables = 1 if config.tied else 2
    padding = (config.padded_vocab - config.vocab_size) * 32 * tables
    assert flops.parameters(config) == sum(a.size for a in jax.tree.leaves(params)) - padding


def test_stretched_rope_is_that_of_numpy():
    """Eight pairs: some that turn fast, some slow, some between."""
    config = dataclasses.replace(
        SMALL, context_length=40, positions="rope", d_head=16, rope_theta=1000.0,
        rope_factor=8.0, rope_low=1.0, rope_high=4.0, rope_context=32,
    )  # fmt: skip
    params = weights(config)
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(1, 40))
    logits_BTV = transformer.forward(config, params, jnp.asarray(tokens_BT))
    assert agrees_with_numpy(logits_BTV, config, params, tokens_BT)
    slowed = positions.frequencies(16, 1000.0) / positions.scaled_frequencies(config)
    assert slowed[0] == 1 and slowed[-1] == 8 and any((slowed > 1) & (slowed < 8))
