"""Attention: projections, scores, masking, mixing.

The forward pass takes the attention function as an argument, `attend`:
  plain_attention    the einsums below
  fused_attention    the platform's kernel if one fits, else plain (flash_attention.py)
  prompt_attention   the same, for a prompt whose keys and values become the cache
  decode_attention   one token per row, attending to the cache
The tour passes one that also records the weights (reports/tour_recorder.py).
Shape letters are defined in transformer.py.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.model.layers import NORMS, Linear, dropout, normal
from gpt.model.positions import Positions, apply_rope
from gpt.sharding import constrain

Drop = Callable[[jax.Array], jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Drop | None], jax.Array]
MASKED = -1e30  # finite, so differences of scores are never NaN


def visible(pos_BT: jax.Array | None, n_queries: int, n_slots: int) -> jax.Array:
    """The causal mask, [B or 1, T, S]: True at slots up to each query's own position.

    `pos_BT`: the queries' positions; None means query t is at position t.
    """
    pos = jnp.arange(n_queries)[None] if pos_BT is None else pos_BT
    return jnp.arange(n_slots) <= pos[:, :, None]


def plain_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    pos_BT: jax.Array | None = None,
    drop: Drop | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the visible slots (Vaswani et al. 2017, section 3.2.1).

    Query head n uses key/value head n // (N/K). The softmax is in float32. `drop`, if given, is
    applied to the attention weights. Returns mix_BTNH in the dtype of `v_BKSH`.
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
    if drop is not None:
        weights_BKGTS = drop(weights_BKGTS)
    mix_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    return mix_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class Attention(nnx.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2.2).

    With fewer key/value than query heads, it is grouped-query attention (Ainslie et al. 2023).
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, N, K, H = config.d_model, config.n_heads, config.kv_heads, config.head_width
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        qkv = {
            "use_bias": config.biased("qkv"),
            "dtype": config.param_dtype,
            "kernel_init": normal(config.init_std),
        }
        self.q = Linear(q_key, (D,), (N, H), ("embed", "heads", None), **qkv)
        self.k = Linear(k_key, (D,), (K, H), ("embed", "kv_heads", None), **qkv)
        self.v = Linear(v_key, (D,), (K, H), ("embed", "kv_heads", None), **qkv)
        self.o = Linear(
            o_key,
            (N, H),
            (D,),
            ("heads", None, "embed"),
            use_bias=config.biased("out"),
            dtype=config.param_dtype,
            kernel_init=normal(config.residual_std),
        )
        self.dropout = config.dropout
        self.q_norm = NORMS[config.norm](config, H) if config.qk_norm else None
        self.k_norm = NORMS[config.norm](config, H) if config.qk_norm else None

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q_BTNH, k_BTKH, v_BTKH; queries and keys are normalized if the model has QK-norm."""
        q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self,
        x_BTD: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        dropout_key_B: jax.Array | None,
        positions: Positions,
        attend: Attend,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The attention output, [B, T, D], and the layer's updated cached keys and values.

        `past`: the layer's cached keys and values, [B, K, S, H]; None without a cache.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        q_BTNH = constrain(apply_rope(q_BTNH, positions.rope), "batch", None, "heads", None)
        k_BKTH = apply_rope(k_BTKH, positions.rope).swapaxes(1, 2)
        v_BKTH = v_BTKH.swapaxes(1, 2)

        # With a cache, tokens attend to its slots, including those just written; without one, to
        # each other.
        if past is None:
            k_BKSH, v_BKSH = k_BKTH, v_BKTH
        else:
            k_BKSH = kv.write(past[0], k_BKTH, positions.pos_BT)
            v_BKSH = kv.write(past[1], v_BKTH, positions.pos_BT)
            past = k_BKSH, v_BKSH

        drop = None  # fused kernels require drop=None
        if dropout_key_B is not None and self.dropout > 0:
            site = "attention_weights"
            drop = partial(dropout, dropout_key_B=dropout_key_B, rate=self.dropout, site=site)
        k_BKSH, v_BKSH = k_BKSH.astype(q_BTNH.dtype), v_BKSH.astype(q_BTNH.dtype)
        mix_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, positions.pos_BT, drop)
        return self.o(mix_BTNH), past
