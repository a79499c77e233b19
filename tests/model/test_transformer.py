"""The forward pass: against an independent form, causal, initialised as GPT-2 is."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

from gpt.config import ModelConfig
from gpt.model import attention, transformer
from gpt.presets import PRESETS

SMALL = ModelConfig(300, context_length=24, n_layers=3, n_heads=4, d_model=32)


def weights(config, seed=0):
    """Weights far from their initial values: a zero bias or a unit scale would hide a bug."""
    params = transformer.init(config, jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + noise.normal(0, 0.1, a.shape).astype("float32"), params)


def tokens(config, rows=2, length=16, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(config.vocab_size, size=(rows, length)).astype(np.int32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_forward_equals_numpy(bias, n_kv_heads):
    config = dataclasses.replace(SMALL, bias=bias, n_kv_heads=n_kv_heads)
    params, ids = weights(config), tokens(config)
    logits = np.asarray(transformer.forward(config, params, ids))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row in range(len(ids)):
        oracle = numpy_transformer.forward(exact, ids[row], config)
        assert np.abs(logits[row] - oracle).max() < 1e-5 * max(1, np.abs(oracle).max())


def test_both_layouts_agree_and_convert_exactly():
    params, ids = weights(SMALL), tokens(SMALL)
    forward = jax.jit(transformer.forward, static_argnums=0)
    unstacked = transformer.unstack(params)
    difference = forward(SMALL, params, ids) - forward(SMALL, unstacked, ids)
    assert np.abs(difference).max() < 1e-5
    again = transformer.stack(unstacked)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


def test_no_future_by_perturbation():
    params, ids = weights(SMALL), tokens(SMALL)
    forward = jax.jit(transformer.forward, static_argnums=0)
    before = np.asarray(forward(SMALL, params, ids))
    for t in range(1, ids.shape[1]):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        after = np.asarray(forward(SMALL, params, changed))
        assert np.array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


def test_no_future_by_gradient():
    """The embedding of token t has no gradient from logits before t, and some from each after."""
    params, ids = weights(SMALL), np.arange(12, dtype=np.int32)[None]

    def logit_at(table, t):
        logits = transformer.forward(SMALL, params | {"tokens": table}, ids)
        return jnp.sum(jax.lax.dynamic_index_in_dim(logits, t, axis=1)[..., 100:])

    gradient = jax.jit(jax.grad(logit_at))
    for t in range(12):
        # Rows 100 and on serve as the head; token ids 0..11 are read by the input alone.
        reached = np.abs(np.asarray(gradient(params["tokens"], t)))[:12].sum(-1) > 0
        assert np.array_equal(reached, np.arange(12) <= t)


def test_vocabulary_padding_is_never_seen():
    assert SMALL.padded_vocab == 384
    params, ids = weights(SMALL), tokens(SMALL)
    logits = transformer.forward(SMALL, params, ids)
    assert logits.shape == (2, 16, 300)
    poisoned = params | {"tokens": params["tokens"].at[300:].set(1e6)}
    assert np.array_equal(logits, transformer.forward(SMALL, poisoned, ids))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)],
)
def test_presets_have_gpt2s_size(name, millions):
    """Parameter counts of the published checkpoints."""
    assert transformer.count_parameters(PRESETS[name].model) / 1e6 == pytest.approx(
        millions, abs=0.05
    )


def test_initial_scales_are_gpt2s():
    config = dataclasses.replace(SMALL, d_model=64, n_layers=8)
    params = transformer.init(config, jax.random.key(0))
    block, residual = params["blocks"], 0.02 / math.sqrt(2 * config.n_layers)
    for weight, std in [
        (params["tokens"], 0.02),
        (block["attention"]["q"]["kernel"], 0.02),
        (block["attention"]["o"]["kernel"], residual),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["mlp"]["down"]["kernel"], residual),
    ]:
        assert np.std(weight) == pytest.approx(std, rel=0.05)
    layers = block["attention"]["q"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


def test_attend_is_a_door():
    """A recorder passed as `attend` sees every layer's queries and changes nothing."""
    seen = []

    def recorder(q, k, v, pos, drop):
        seen.append((q.shape, k.shape))
        return attention.attend(q, k, v, pos, drop)

    params, ids = transformer.unstack(weights(SMALL)), tokens(SMALL)
    model = transformer.bind(SMALL, params)
    x, _ = model.hidden(ids, attend=recorder)
    assert seen == [((2, 16, 4, 8), (2, 4, 16, 8))] * 3
    assert np.array_equal(x, model.hidden(ids)[0])


@pytest.mark.parametrize("stacked", [True, False])
def test_dropout_belongs_to_the_row(stacked):
    """A row's mask depends on its key alone: not on its place nor on its neighbours."""
    config = dataclasses.replace(SMALL, dropout=0.3)
    params, ids = weights(config), tokens(config, rows=4)
    params = params if stacked else transformer.unstack(params)
    keys = jax.random.split(jax.random.key(7), 4)
    forward = jax.jit(lambda ids, keys: transformer.forward(config, params, ids, key_B=keys))
    out = np.asarray(forward(ids, keys))
    order = np.array([2, 0, 3, 1])
    assert np.abs(out[order] - np.asarray(forward(ids[order], keys[order]))).max() < 1e-5
    assert np.abs(out - transformer.forward(config, params, ids)).max() > 0.1
    other = forward(ids, jax.random.split(jax.random.key(8), 4))
    assert np.abs(out - other).max() > 0.1


def test_bfloat16_stays_near_float32():
    params, ids = weights(SMALL), tokens(SMALL)
    exact = transformer.forward(SMALL, params, ids)
    logits = transformer.forward(SMALL.computing_in("bfloat16"), params, ids)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * float(exact.std())
