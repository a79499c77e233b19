"""One training step: loss, gradients, accumulation, donation, what learns and what decays."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.model import transformer
from gpt.training import step_functions, train_state

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=2, d_model=32)
CONFIG = TrainConfig(model=MODEL, batch_size=8, steps=50, warmup_steps=5, z_loss=0.01)


def batch(config, micro=1, seed=0, rows=8):
    T = config.model.context_length
    ids = np.random.default_rng(seed).integers(config.model.vocab_size, size=(rows, T + 1))
    return ids.astype(np.int32).reshape(micro, rows // micro, T + 1)


def start(config):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return train_state.make_state(config, mesh), *step_functions.compile_steps(config, mesh)


def test_accumulation_equals_the_large_batch():
    """With dropout, whose noise belongs to the row and the step."""
    model = dataclasses.replace(MODEL, dropout=0.2)
    config = dataclasses.replace(CONFIG, model=model)
    params = transformer.init(model, jax.random.key(0))
    grads = jax.jit(step_functions.loss_and_gradients, static_argnums=0)
    n = jnp.int32(3)
    whole, g1 = grads(config, params, batch(config), n)
    for micro in (2, 4):
        split, g2 = grads(config, params, batch(config, micro), n)
        assert abs(whole - split) < 1e-6
        for x, y in zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True):
            assert np.abs(x - y).max() < 1e-6
    other_step, _ = grads(config, params, batch(config), jnp.int32(4))
    assert abs(whole - other_step) > 1e-4


def test_recomputation_changes_no_gradient():
    """The traced programs differ, so that the flag is seen to act."""
    model = dataclasses.replace(MODEL, dropout=0.1)
    params = transformer.init(model, jax.random.key(0))
    results, programs = [], []
    for remat in ("blocks", "products", "none"):
        config = dataclasses.replace(CONFIG, model=model, remat=remat)
        args = (params, batch(config), jnp.int32(0))
        results.append(jax.jit(step_functions.loss_and_gradients, static_argnums=0)(config, *args))
        programs.append(
            str(jax.make_jaxpr(step_functions.loss_and_gradients, static_argnums=0)(config, *args))
        )
    assert len(set(programs)) == 3 and "remat" not in programs[2]
    for result in results[1:]:
        for x, y in zip(*map(jax.tree.leaves, (results[0], result)), strict=True):
            assert np.abs(x - y).max() < 1e-6


def test_the_state_is_donated():
    state, train, _ = start(CONFIG)
    new, _ = train(state, batch(CONFIG))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_evaluation_weighs_and_changes_nothing():
    state, _, evaluate = start(CONFIG)
    tokens = batch(CONFIG)[0]
    weights = np.random.default_rng(0).integers(2, size=(8, 16)).astype(np.float32)
    total, n = evaluate(state.params, tokens, weights)
    logp = jax.nn.log_softmax(transformer.forward(MODEL, state.params, tokens[:, :-1]))
    losses = -np.take_along_axis(np.asarray(logp), tokens[:, 1:, None], axis=-1)[..., 0]
    assert float(n) == weights.sum()
    assert float(total) == pytest.approx((losses * weights).sum(), rel=1e-5)


# With weights in bfloat16, sums of many small terms are kept in float32.

NARROW = dataclasses.replace(
    CONFIG, model=dataclasses.replace(MODEL, param_dtype="bfloat16"), grad_accum=4, ema_decay=0.999
)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_gradients_are_summed_over_micro_batches_in_float32():
    params = jax.eval_shape(partial(train_state.fresh_state, NARROW)).params
    tokens = jax.ShapeDtypeStruct((4, 2, 17), jnp.int32)
    gradients = partial(step_functions.loss_and_gradients, NARROW)
    loss, mean = jax.eval_shape(gradients, params, tokens, jnp.int32(0))
    assert dtypes(params) == {"bfloat16"}
    assert dtypes((loss, mean)) == {"float32"}


def test_the_averaged_weights_take_increments_that_bfloat16_would_lose():
    params = {"kernel": jnp.linspace(0.5, 1, 100, dtype=jnp.bfloat16)}
    ema_params = train_state.start_ema(NARROW, params)
    moved = {"kernel": params["kernel"] * jnp.bfloat16(1.125)}
    after = step_functions.update_ema(NARROW, ema_params, moved, jnp.int32(10**6))
    assert dtypes((ema_params, after)) == {"float32"}
    increment = np.asarray(after["kernel"] - ema_params["kernel"])
    expected = 0.001 * np.asarray(moved["kernel"] - params["kernel"], np.float32)
    assert np.allclose(increment, expected, rtol=0.01, atol=0)
