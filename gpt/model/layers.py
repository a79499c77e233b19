"""What a block is made of: norm, attention, MLP. Flax NNX declares the weights.

Each weight bears the logical axes it is sharded by, under a name of ours that Flax ignores.
Shape letters: see transformer.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model import cache as kv
from gpt.model.attention import Attend
from gpt.sharding import constrain

NORM_EPSILON = 1e-5  # GPT-2's


def drop(key_B: jax.Array | None, rate: float, place: int, x: jax.Array) -> jax.Array:
    """Inverted dropout with a key per row, so that no batch split or mesh changes a row's mask."""
    if key_B is None or rate == 0:
        return x

    def row(key, x_row):
        kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x_row.shape)
        return jnp.where(kept, x_row / (1 - rate), 0).astype(x.dtype)

    return jax.vmap(row)(key_B, x)


def normal(key: jax.Array, shape: tuple, axes: tuple, std: float, dtype) -> nnx.Param:
    """A weight drawn from N(0, std²), with the logical axes it is sharded by."""
    return nnx.Param((jax.random.normal(key, shape) * std).astype(dtype), axes=axes)


def constant(value: float, shape: tuple, axes: tuple, dtype) -> nnx.Param:
    """A weight that starts at `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


def as_rows(weight: nnx.Param, n_inputs: int, dtype) -> jax.Array:
    """A weight as a matrix [in, out] in the type of the products."""
    return weight[...].astype(dtype).reshape(n_inputs, -1)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over D, then scale and shift (Ba et al. 2016)."""

    def __init__(self, c: ModelConfig):
        self.scale = constant(1, (c.d_model,), (None,), c.param_dtype)
        self.bias = constant(0, (c.d_model,), (None,), c.param_dtype) if c.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        unit = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=NORM_EPSILON)
        y = unit * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, c: ModelConfig, key: jax.Array):
        D, N, K, H = c.d_model, c.n_heads, c.kv_heads, c.head_width
        keys = jax.random.split(key, 4)
        self.q = normal(keys[0], (D, N, H), ("embed", "heads", None), c.init_std, c.param_dtype)
        self.k = normal(keys[1], (D, K, H), ("embed", "kv_heads", None), c.init_std, c.param_dtype)
        self.v = normal(keys[2], (D, K, H), ("embed", "kv_heads", None), c.init_std, c.param_dtype)
        std = c.init_std / math.sqrt(2 * c.n_layers)
        self.o = normal(keys[3], (N, H, D), ("heads", None, "embed"), std, c.param_dtype)
        bias = functools.partial(constant, 0, dtype=c.param_dtype) if c.bias else lambda *_: None
        self.q_bias = bias((N, H), ("heads", None))
        self.k_bias = bias((K, H), ("kv_heads", None))
        self.v_bias = bias((K, H), ("kv_heads", None))
        self.o_bias = bias((D,), (None,))

    def project(self, x_BTD: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        """Heads of one projection, [B, T, heads, H].

        Products run on tokens flattened to rows: a three-axis product's backward pass is many
        times slower on CPU.
        """
        B, T, D = x_BTD.shape
        y = x_BTD.reshape(B * T, D) @ as_rows(weight, D, x_BTD.dtype)
        y = y.reshape(B, T, *weight.shape[1:])
        return y if bias is None else y + bias[...].astype(y.dtype)

    def merge(self, mix_BTNH: jax.Array) -> jax.Array:
        """The heads' results back in the residual stream, [B, T, D]."""
        B, T, N, H = mix_BTNH.shape
        y = mix_BTNH.reshape(B * T, N * H) @ as_rows(self.o, N * H, mix_BTNH.dtype)
        y = y.reshape(B, T, -1)
        return y if self.o_bias is None else y + self.o_bias[...].astype(y.dtype)

    def __call__(self, x_BTD, past, pos_BT, attend: Attend, drop):
        """Mixed values, and the layer's keys and values up to here (None where none are kept)."""
        q_BTNH = self.project(x_BTD, self.q, self.q_bias)
        k_BKTH = self.project(x_BTD, self.k, self.k_bias).swapaxes(1, 2)
        v_BKTH = self.project(x_BTD, self.v, self.v_bias).swapaxes(1, 2)
        q_BTNH = constrain(q_BTNH, "batch", None, "heads", None)
        now = (k_BKTH, v_BKTH)
        if past is not None:
            now = past = kv.remember(past, now, pos_BT)
        k_BKSH, v_BKSH = (a.astype(q_BTNH.dtype) for a in now)
        return self.merge(attend(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)), past


class MLP(nnx.Module):
    """Two linear layers around GELU's tanh form (Hendrycks & Gimpel 2016), as in GPT-2."""

    def __init__(self, c: ModelConfig, key: jax.Array):
        D, F = c.d_model, c.ff_width
        keys = jax.random.split(key)
        self.up = normal(keys[0], (D, F), ("embed", "mlp"), c.init_std, c.param_dtype)
        std = c.init_std / math.sqrt(2 * c.n_layers)
        self.down = normal(keys[1], (D, F), ("embed", "mlp"), std, c.param_dtype)
        self.up_bias = constant(0, (F,), ("mlp",), c.param_dtype) if c.bias else None
        self.down_bias = constant(0, (D,), (None,), c.param_dtype) if c.bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        h_MF = x_BTD.reshape(B * T, D) @ self.up[...].astype(x_BTD.dtype)
        if self.up_bias is not None:
            h_MF += self.up_bias[...].astype(h_MF.dtype)
        h_MF = jax.nn.gelu(h_MF, approximate=True)
        y_MD = jnp.einsum("MF,DF->MD", h_MF, self.down[...].astype(h_MF.dtype))
        if self.down_bias is not None:
            y_MD += self.down_bias[...].astype(y_MD.dtype)
        return y_MD.reshape(B, T, D)


class Block(nnx.Module):
    """Attention, then the MLP, each added to the residual stream after its own norm (pre-norm)."""

    def __init__(self, c: ModelConfig, key: jax.Array):
        keys = jax.random.split(key)
        self.attention_norm, self.attention = LayerNorm(c), Attention(c, keys[0])
        self.mlp_norm, self.mlp = LayerNorm(c), MLP(c, keys[1])

    def __call__(self, x_BTD, past, key_B, pos_BT, attend: Attend, dropout: float):
        drops = [functools.partial(drop, key_B, dropout, place) for place in range(3)]
        y_BTD, past = self.attention(self.attention_norm(x_BTD), past, pos_BT, attend, drops[0])
        x_BTD = constrain(x_BTD + drops[1](y_BTD), "batch", None, None)
        x_BTD = x_BTD + drops[2](self.mlp(self.mlp_norm(x_BTD)))
        return constrain(x_BTD, "batch", None, None), past
