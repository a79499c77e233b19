"""The decoder-only Transformer: embedding, blocks, head.

Shape letters, used as suffixes of arrays and in einsum strings everywhere:
  B batch   T query time   S cache slots   D model width   N query heads   K key/value heads
  G = N/K   H head width   F MLP width     V vocabulary    L layers        M = B*T tokens

Flax NNX declares the weights; what leaves this file is a nested dict of arrays (`params`) and
functions over it. A `stacked` dict holds each block weight as [L, ...], scanned over in training;
an unstacked one holds a subtree per layer, which decoding reads faster.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model import cache as kv
from gpt.model.attention import MASKED, Attend, attend
from gpt.sharding import constrain

NORM_EPSILON = 1e-5  # GPT-2's
INIT_STD = 0.02


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
        self.q = normal(keys[0], (D, N, H), ("embed", "heads", None), INIT_STD, c.param_dtype)
        self.k = normal(keys[1], (D, K, H), ("embed", "kv_heads", None), INIT_STD, c.param_dtype)
        self.v = normal(keys[2], (D, K, H), ("embed", "kv_heads", None), INIT_STD, c.param_dtype)
        std = INIT_STD / math.sqrt(2 * c.n_layers)
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
        self.up = normal(keys[0], (D, F), ("embed", "mlp"), INIT_STD, c.param_dtype)
        std = INIT_STD / math.sqrt(2 * c.n_layers)
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


class GPT(nnx.Module):
    """Every weight of the model, declared."""

    def __init__(self, c: ModelConfig, key: jax.Array, stacked: bool = True):
        keys = jax.random.split(key, 3)
        D, V, S = c.d_model, c.padded_vocab, c.context_length
        self.tokens = normal(keys[0], (V, D), ("vocab", "embed"), INIT_STD, c.param_dtype)
        self.positions = normal(keys[1], (S, D), (None, "embed"), INIT_STD, c.param_dtype)
        blocks = jax.random.split(keys[2], c.n_layers)
        block = functools.partial(Block, c)
        self.blocks = jax.vmap(block)(blocks) if stacked else nnx.List(map(block, blocks))
        self.final_norm = LayerNorm(c)


def init(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh stacked weights: N(0, 0.02²), residual outputs scaled by 1/sqrt(2L) (GPT-2, 2.3)."""
    return nnx.to_pure_dict(nnx.state(GPT(config, key)))


def abstract(config: ModelConfig) -> dict:
    """Shapes and types of the stacked weights; nothing is computed."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> dict:
    """The tree of the stacked weights with, for each leaf, the names of its axes."""
    state = nnx.state(nnx.eval_shape(lambda: GPT(config, jax.random.key(0))))
    weights = nnx.to_pure_dict(state, extract_fn=lambda variable: variable)

    def axes(variable):
        names = variable.get_metadata()["axes"]
        return (None,) * (len(variable.shape) - len(names)) + names

    return jax.tree.map(axes, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def unstack(params: dict) -> dict:
    """One subtree per layer, for decoding."""
    n_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    layers = {i: jax.tree.map(lambda a: a[i], params["blocks"]) for i in range(n_layers)}  # noqa: B023
    return params | {"blocks": layers}


def stack(params: dict) -> dict:
    """The inverse of `unstack`."""
    return params | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *params["blocks"].values())}


@functools.cache
def graphdef(config: ModelConfig, stacked: bool) -> nnx.GraphDef:
    """The model's structure without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, jax.random.key(0), stacked)))


def drop(key_B: jax.Array | None, rate: float, place: int, x: jax.Array) -> jax.Array:
    """Inverted dropout with a key per row, so that no batch split or mesh changes a row's mask."""
    if key_B is None or rate == 0:
        return x

    def row(key, x_row):
        kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x_row.shape)
        return jnp.where(kept, x_row / (1 - rate), 0).astype(x.dtype)

    return jax.vmap(row)(key_B, x)


def fold(layer, x, blocks, pasts, keys_LB, remat: bool):
    """Run x through the blocks: the one place that knows both weight layouts."""
    if not isinstance(blocks, nnx.List):

        def body(x, block_and_key):
            block, key_B = block_and_key
            return layer(x, block, None, key_B)[0], None

        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        return jax.lax.scan(body, x, (blocks, keys_LB))
    kept = []
    for i, block in enumerate(blocks):
        key_B = None if keys_LB is None else keys_LB[i]
        x, past = layer(x, block, None if pasts is None else pasts[i], key_B)
        kept.append(past)
    return x, kept


def hidden(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    cache: kv.KVCache | None = None,
    key_B: jax.Array | None = None,
    attend: Attend = attend,
    remat: bool = True,
) -> tuple[jax.Array, kv.KVCache | None]:
    """The normalised residual stream after the last block, and the cache with these tokens in it.

    Without a cache, token t of each row stands at position t. With one (unstacked weights), row b's
    tokens continue at position `cache.length_B[b]`; the returned cache holds their keys and values,
    its lengths unchanged: the caller knows how many of the T tokens are real. `key_B` (one key a
    row) turns dropout on. `remat` recomputes blocks in the backward pass of stacked weights.
    Returns x_BTD in the compute type.
    """
    model = nnx.merge(graphdef(config, 0 not in params["blocks"]), params)
    T = tokens_BT.shape[1]
    pos_BT = None
    if cache is not None and cache.capacity:
        pos_BT = cache.length_B[:, None] + jnp.arange(T)
    keys_LB = None if key_B is None else split_rows(key_B, config.n_layers)
    x_BTD = embed(config, model, tokens_BT, pos_BT)
    x_BTD = drop(key_B, config.dropout, 3, x_BTD)

    def layer(x, block, past, key_B):
        return block(x, past, key_B, pos_BT, attend, config.dropout)

    pasts = None if cache is None else list(zip(cache.k, cache.v, strict=True))
    x_BTD, pasts = fold(layer, x_BTD, model.blocks, pasts, keys_LB, remat)
    if cache is not None:
        k, v = zip(*pasts, strict=True)
        cache = replace(cache, k=k, v=v)
    return model.final_norm(x_BTD), cache


def split_rows(key_B: jax.Array, n: int) -> jax.Array:
    """`n` keys for each row's key, [n, B]."""
    return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(key_B)


def embed(config: ModelConfig, model: GPT, tokens_BT: jax.Array, pos_BT) -> jax.Array:
    """Token plus learned position embeddings, x_BTD in the compute type."""
    # Gathered over fsdp first: else the partitioner rebuilds the whole table on every device.
    table_VD = constrain(model.tokens[...], "vocab", None)
    T = tokens_BT.shape[1]
    positions = model.positions[:T] if pos_BT is None else model.positions[pos_BT]
    x_BTD = (table_VD[tokens_BT] + positions).astype(config.compute_dtype or "float32")
    return constrain(x_BTD, "batch", None, None)


def unembed_rows(config: ModelConfig, x_MD: jax.Array, rows_CD: jax.Array, ids_C) -> jax.Array:
    """float32 logits of the vocabulary rows `ids_C`; padding rows get a logit no softmax sees."""
    rows_CD = rows_CD.astype(x_MD.dtype)
    logits_MC = jnp.einsum("MD,CD->MC", x_MD, rows_CD, preferred_element_type=jnp.float32)
    return jnp.where(ids_C < config.vocab_size, logits_MC, MASKED)


def unembed(config: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]; the head is tied to the embedding."""
    rows = x.reshape(-1, x.shape[-1])
    table_VD = head_table(params)
    logits = unembed_rows(config, rows, table_VD, jnp.arange(len(table_VD)))
    logits = constrain(logits[:, : config.vocab_size], "batch", None)
    return logits.reshape(*x.shape[:-1], config.vocab_size)


def head_table(params: dict) -> jax.Array:
    """The head's table, [padded V, D]: the token embedding itself."""
    return params["tokens"]


def forward(config: ModelConfig, params: dict, tokens_BT: jax.Array, **options) -> jax.Array:
    """logits_BTV of whole sequences, in one pass and without a cache. `options`: as `hidden`."""
    return unembed(config, params, hidden(config, params, tokens_BT, **options)[0])


def count_parameters(config: ModelConfig) -> int:
    """Weights of the model, vocabulary padding left out."""
    padding = (config.padded_vocab - config.vocab_size) * config.d_model
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config))) - padding
