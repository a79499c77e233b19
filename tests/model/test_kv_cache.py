"""The cache where rows are ragged or full; what a model reads from it is compared in
test_choices.py."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.sampling import engine


def test_what_lies_past_the_end_is_dropped():
    new_BKTH = jnp.broadcast_to(jnp.array([5, 7])[:, None], (2, 1, 2, 3))
    pos_BT = jnp.array([[3, 4], [1, 2]])
    filled_BKSH = kv.append(jnp.zeros((2, 1, 4, 3)), new_BKTH, pos_BT)
    assert np.array_equal(filled_BKSH[:, 0, :, 0], [[0, 0, 0, 5], [0, 5, 7, 0]])


def test_each_row_counts_its_own_tokens():
    config = ModelConfig(50, context_length=8, n_layers=1, n_heads=2, d_model=8)
    params = transformer.unstack(transformer.init(config, jax.random.key(0)))
    cache, _ = engine.prefill(config, params, np.ones((2, 4), np.int32), np.array([4, 2]))
    assert cache.length_B.tolist() == [4, 2]
    token_B, active_B = np.ones(2, np.int32), np.array([True, False])
    cache, _ = engine.decode_step(config, params, kv.grow(cache, 8), token_B, active_B)
    assert cache.length_B.tolist() == [5, 2] and cache.capacity == 8
