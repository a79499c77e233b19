"""Attention: projections, scores, mask, mix.

`attend` is handed to the forward pass as an argument, so that a fused kernel or a recorder of
attention maps enters by the same door as the plain einsums below.
Shape letters: see transformer.py.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.model.layers import NORMS, biases, linear, normal, plus, product
from gpt.model.positions import Place
from gpt.sharding import constrain

Drop = Callable[[jax.Array], jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Drop | None], jax.Array]
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
    drop: Drop | None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the visible slots (Vaswani et al. 2017, section 3.2.1).

    Query head n reads key/value head n // (N/K). Softmax in float32. `drop` is applied to the
    attention weights, where there is one. Returns mix_BTNH in the type of `v_BKSH`.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
    )
    mask = visible(pos_BT, T, S)[:, None, None]
    scores_BKGTS = jnp.where(mask, scores_BKGTS / math.sqrt(H), MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    weights_BKGTS = weights_BKGTS if drop is None else drop(weights_BKGTS)
    mix_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    return mix_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class Attention(nnx.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2.2).

    Fewer key/value heads than query heads: grouped queries (Ainslie et al. 2023).
    """

    def __init__(self, c: ModelConfig, key: jax.Array):
        D, N, K, H = c.d_model, c.n_heads, c.kv_heads, c.head_width
        self.head_width, keys = H, jax.random.split(key, 4)
        self.q = normal(keys[0], (D, N, H), ("embed", "heads", None), c.init_std, c.param_dtype)
        self.k = normal(keys[1], (D, K, H), ("embed", "kv_heads", None), c.init_std, c.param_dtype)
        self.v = normal(keys[2], (D, K, H), ("embed", "kv_heads", None), c.init_std, c.param_dtype)
        std = c.init_std / math.sqrt(2 * c.n_layers)
        self.o = normal(keys[3], (N, H, D), ("heads", None, "embed"), std, c.param_dtype)
        bias = biases(c, "qkv")
        self.q_bias = bias((N, H), ("heads", None))
        self.k_bias = bias((K, H), ("kv_heads", None))
        self.v_bias = bias((K, H), ("kv_heads", None))
        self.o_bias = biases(c, "out")((D,), (None,))
        self.q_norm = NORMS[c.norm](c, H) if c.qk_norm else None
        self.k_norm = NORMS[c.norm](c, H) if c.qk_norm else None

    def project(self, x_BTD: jax.Array):
        """q_BTNH, k_BTKH, v_BTKH; queries and keys normalised where the model does so."""
        B, T, D = x_BTD.shape
        x_MD = x_BTD.reshape(B * T, D)
        pairs = (self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias)
        q, k, v = (linear(x_MD, *pair).reshape(B, T, -1, self.head_width) for pair in pairs)
        if self.q_norm is None:
            return q, k, v
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, mix_BTNH: jax.Array) -> jax.Array:
        """The heads' results back in the residual stream, [B, T, D]."""
        B, T, N, H = mix_BTNH.shape
        y_MD = product(mix_BTNH.reshape(B * T, N * H), self.o)
        return plus(y_MD, self.o_bias).reshape(B, T, -1)

    def __call__(self, x_BTD, past, place: Place, attend: Attend, drop: Drop | None):
        """Mixed values, and the layer's keys and values up to here (None where none are kept)."""
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        q_BTNH = constrain(place.rotate(q_BTNH), "batch", None, "heads", None)
        now = place.rotate(k_BTKH).swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        if past is not None:
            now = past = kv.remember(past, now, place.pos_BT)
        k_BKSH, v_BKSH = (a.astype(q_BTNH.dtype) for a in now)
        return self.merge(attend(q_BTNH, k_BKSH, v_BKSH, place.pos_BT, drop)), past
