"""Scores, mask, mix: what attention does once queries, keys and values exist.

`attend` is handed to the forward pass as an argument, so that a fused kernel or a recorder of
attention maps enters by the same door as the plain einsums below.
Shape letters: see transformer.py.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Drop = Callable[[jax.Array], jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Drop], jax.Array]
MASKED = -1e30  # finite, so that no difference of scores is ever NaN


def visible(pos_BT: jax.Array | None, n_queries: int, n_slots: int) -> jax.Array:
    """True where a query may look: at slots up to its own position. [B or 1, T, S].

    `pos_BT` None means that query t stands at slot t.
    """
    pos = jnp.arange(n_queries)[None] if pos_BT is None else pos_BT
    return jnp.arange(n_slots) <= pos[:, :, None]


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    pos_BT: jax.Array | None,
    drop: Drop,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the visible slots (Vaswani et al. 2017, section 3.2.1).

    Query head n reads key/value head n // (N/K). Softmax in float32. `drop` is applied to the
    attention weights. Returns mix_BTNH in the type of `v_BKSH`.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
    )
    mask = visible(pos_BT, T, S)[:, None, None]
    scores_BKGTS = jnp.where(mask, scores_BKGTS / math.sqrt(H), MASKED)
    weights_BKGTS = drop(jax.nn.softmax(scores_BKGTS, axis=-1)).astype(v_BKSH.dtype)
    mix_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return mix_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
