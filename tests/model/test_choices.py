"""Every choice of the config, in combinations that cover each pair of choices at least once."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

from gpt import flops
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import positions, transformer
from gpt.sampling import cache_check

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


def reached(config, params):
    """[t, s]: whether the state after token t has a gradient from the embedding of token s."""
    tokens = jnp.arange(12, dtype=jnp.int32)[None]

    def states(rows):
        table = params["tokens"].at[:12].set(rows)
        return transformer.bind(config, params | {"tokens": table}).hidden(tokens)[0][0]

    jacobian = jax.jit(jax.jacrev(states))(params["tokens"][:12])
    return np.abs(np.asarray(jacobian)).sum((1, 3)) > 0


@pytest.mark.parametrize("config", ROWS, ids=range(len(ROWS)))
def test_choices_equal_numpy_and_keep_the_contract(config):
    """The forward pass, reading through the cache, causality and the parameter count."""
    params = weights(config)
    probe = cache_check.make_probe(config, transformer.unstack(params))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row, ids in enumerate(probe.tokens_BT):
        oracle = numpy_transformer.forward(exact, ids, config)
        assert np.abs(probe.logits_BTV[row] - oracle).max() < 2e-5 * max(1, np.abs(oracle).max())
    for end, logits_BV in probe.through_cache(prefix=5, chunk=1, capacity=12):
        assert np.abs(logits_BV - probe.logits_BTV[:, end - 1]).max() <= probe.allowed
    assert cache_check.check_causality(probe).passed and cache_check.check_ragged(probe).passed
    assert np.array_equal(reached(config, params), np.tri(12, dtype=bool))
    padding = (config.padded_vocab - config.vocab_size) * 32 * (1 if config.tied else 2)
    n = sum(leaf.size for leaf in jax.tree.leaves(params)) - padding
    assert transformer.count_parameters(config) == flops.parameters(config) == n


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
