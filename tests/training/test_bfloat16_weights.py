"""With weights in bfloat16, sums of many small terms are kept in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig, TrainConfig
from gpt.training import train_state, train_step

MODEL = ModelConfig(
    100, context_length=8, n_layers=1, n_heads=1, d_model=16, param_dtype="bfloat16"
)
CONFIG = TrainConfig(
    model=MODEL, batch_size=8, grad_accum=4, steps=20, warmup_steps=0, ema_decay=0.999
)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_gradients_are_summed_over_micro_batches_in_float32():
    params = jax.eval_shape(partial(train_state.fresh_state, CONFIG)).params
    tokens = jax.ShapeDtypeStruct((4, 2, 9), jnp.int32)
    gradients = partial(train_step.mean_gradients, CONFIG)
    loss, mean = jax.eval_shape(gradients, params, tokens, jnp.int32(0))
    assert dtypes(params) == {"bfloat16"}
    assert dtypes((loss, mean)) == {"float32"}


def test_the_averaged_weights_take_increments_that_bfloat16_would_lose():
    params = {"kernel": jnp.linspace(0.5, 1, 100, dtype=jnp.bfloat16)}
    ema_params = train_state.start_ema(CONFIG, params)
    moved = {"kernel": params["kernel"] * jnp.bfloat16(1.125)}
    after = train_step.update_ema(CONFIG, ema_params, moved, jnp.int32(10**6))
    assert dtypes((ema_params, after)) == {"float32"}
    increment = np.asarray(after["kernel"] - ema_params["kernel"])
    expected = 0.001 * np.asarray(moved["kernel"] - params["kernel"], np.float32)
    assert np.allclose(increment, expected, rtol=0.01, atol=0)
