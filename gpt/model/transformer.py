"""The decoder-only Transformer: embedding, blocks, head.

Shape letters, used as suffixes of arrays and in einsum strings everywhere:
  B batch   T query time   S cache slots   D model width   N query heads   K key/value heads
  G = N/K   H head width   F MLP width     V vocabulary    L layers        M = B*T tokens

Flax NNX declares the weights; what leaves this file is a nested dict of arrays (`params`) and
functions over it. A `stacked` dict holds each block weight as [L, ...], scanned over in training;
an unstacked one holds a subtree per layer, which decoding reads faster, and the MLP's second matrix
the other way round.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model.attention import MASKED, Attend, Attention, Drop
from gpt.model.flash_attention import attend
from gpt.model.int8 import Int8
from gpt.model.layers import NORMS, drop, make_mlp, normal, transposed_product
from gpt.model.positions import ADD, Place, find_place
from gpt.sharding import constrain


class Block(nnx.Module):
    """Attention, then the MLP, each added to the residual stream after its own norm (GPT-2)."""

    def __init__(self, c: ModelConfig, key: jax.Array, stacked: bool = True):
        keys, norm = jax.random.split(key), NORMS[c.norm]
        self.dropout = c.dropout
        self.attention_norm, self.attention = norm(c, c.d_model), Attention(c, keys[0])
        self.mlp_norm, self.mlp = norm(c, c.d_model), make_mlp(c, keys[1], stacked)

    def weights_drop(self, key_B) -> Drop | None:
        """What drops attention weights; None where nothing does, which a fused kernel needs."""
        if key_B is None or not self.dropout:
            return None
        return functools.partial(drop, key_B, self.dropout, 0)

    def __call__(self, x_BTD, past, key_B, place: Place, attend: Attend):
        normed_BTD, weights_drop = self.attention_norm(x_BTD), self.weights_drop(key_B)
        y_BTD, past = self.attention(normed_BTD, past, place, attend, weights_drop)
        x_BTD = constrain(x_BTD + drop(key_B, self.dropout, 1, y_BTD), "batch", None, None)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + drop(key_B, self.dropout, 2, y_BTD)
        return constrain(x_BTD, "batch", None, None), past


class PostNormBlock(Block):
    """The norm after each sum (Vaswani et al. 2017, section 3.1)."""

    def __call__(self, x_BTD, past, key_B, place: Place, attend: Attend):
        y_BTD, past = self.attention(x_BTD, past, place, attend, self.weights_drop(key_B))
        x_BTD = x_BTD + drop(key_B, self.dropout, 1, y_BTD)
        x_BTD = constrain(self.attention_norm(x_BTD), "batch", None, None)
        x_BTD = self.mlp_norm(x_BTD + drop(key_B, self.dropout, 2, self.mlp(x_BTD)))
        return constrain(x_BTD, "batch", None, None), past


BLOCKS = {"pre": Block, "post": PostNormBlock}


class GPT(nnx.Module):
    """Every weight of the model, declared."""

    def __init__(self, c: ModelConfig, key: jax.Array, stacked: bool = True):
        keys = jax.random.split(key, 4)
        D, V, S = c.d_model, c.padded_vocab, c.context_length
        table = functools.partial(normal, std=c.init_std, dtype=c.param_dtype)
        self.tokens = table(keys[0], (V, D), ("vocab", "embed"))
        learned = c.positions == "learned"
        self.positions = table(keys[1], (S, D), (None, "embed")) if learned else None
        blocks = jax.random.split(keys[2], c.n_layers)
        block = functools.partial(BLOCKS[c.norm_place], c, stacked=stacked)
        self.blocks = jax.vmap(block)(blocks) if stacked else nnx.List(map(block, blocks))
        self.final_norm = NORMS[c.norm](c, D) if c.norm_place == "pre" else None
        self.head = None if c.tied else table(keys[3], (V, D), ("vocab", "embed"))


def init(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh stacked weights: N(0, init_std²), residual outputs over sqrt(2L) (GPT-2, 2.3)."""
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


def unstacked_axes(config: ModelConfig) -> dict:
    """As `logical_axes`, for unstacked weights."""
    axes = logical_axes(config)
    layer = jax.tree.map(lambda a: a[1:], axes["blocks"], is_leaf=lambda a: isinstance(a, tuple))
    layer["mlp"]["down"] = layer["mlp"]["down"][::-1]
    return axes | {"blocks": dict.fromkeys(range(config.n_layers), layer)}


def require_fit(config: ModelConfig, mesh: Mesh, fsdp: bool = True) -> list[str]:
    """UserError unless the mesh divides the weights; a line for what is kept whole instead.

    `fsdp`: weights are split over that axis too, as in training.
    """
    tensor, c = mesh.shape["tensor"], config
    for name, size, axis, parts in (
        ("model.n_heads", c.n_heads, "tensor", tensor),
        ("the MLP's width", c.ff_width, "tensor", tensor),
        ("the padded vocabulary", c.padded_vocab, "tensor", tensor),
        ("model.d_model", c.d_model, "fsdp", mesh.shape["fsdp"] if fsdp else 1),
    ):
        require(
            size % parts == 0,
            f"{name} is {size}, which --mesh.{axis} {parts} does not divide: choose a divisor",
        )
    kept = f"{c.kv_heads} key/value heads do not divide among {tensor} devices: each keeps them all"
    return [kept] if c.kv_heads % tensor else []


def unstack(params: dict) -> dict:
    """One subtree per layer, for decoding."""
    n_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    layers = {i: jax.tree.map(lambda a: a[i], params["blocks"]) for i in range(n_layers)}  # noqa: B023
    return params | {"blocks": {i: with_down_turned(layer) for i, layer in layers.items()}}


def with_down_turned(layer: dict) -> dict:
    """A block's weights with the MLP's second matrix, [out, in], as [in, out], or back."""
    mlp = layer["mlp"]
    return layer | {"mlp": mlp | {"down": mlp["down"].T}}


def stack(params: dict) -> dict:
    """The inverse of `unstack`."""
    layers = map(with_down_turned, params["blocks"].values())
    return params | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


@functools.cache
def graphdef(config: ModelConfig, stacked: bool) -> nnx.GraphDef:
    """The model's structure without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, jax.random.key(0), stacked)))


def fold(layer, x, blocks, pasts, keys_LB, remat: bool):
    """Run x through the blocks: the one place that knows both weight layouts."""
    if not isinstance(blocks, nnx.List):

        def body(x, block_and_key):
            block, key_B = block_and_key
            return layer(x, block, None, key_B)[0], None

        # Unrolled where nothing is computed again: what the backward pass needs of each block
        # would be copied into stacked arrays and out again, which takes longer than computing it.
        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        return jax.lax.scan(body, x, (blocks, keys_LB), unroll=not remat)
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

    place = find_place(config, pos_BT, T)

    def layer(x, block, past, key_B):
        return block(x, past, key_B, place, attend)

    pasts = None if cache is None else list(zip(cache.k, cache.v, strict=True))
    x_BTD, pasts = fold(layer, x_BTD, model.blocks, pasts, keys_LB, remat)
    if cache is not None:
        k, v = zip(*pasts, strict=True)
        cache = replace(cache, k=k, v=v)
    return x_BTD if model.final_norm is None else model.final_norm(x_BTD), cache


def split_rows(key_B: jax.Array, n: int) -> jax.Array:
    """`n` keys for each row's key, [n, B]."""
    return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(key_B)


def embed(config: ModelConfig, model: GPT, tokens_BT: jax.Array, pos_BT) -> jax.Array:
    """Token embeddings, and positions where they are added; x_BTD in the compute type."""
    # Gathered over fsdp first: else the partitioner rebuilds the whole table on every device.
    table_VD = model.tokens[...]
    if isinstance(table_VD, Int8):
        x_BTD = table_VD.rows(tokens_BT)
    else:
        x_BTD = constrain(table_VD, "vocab", None)[tokens_BT]
    pos = jnp.arange(tokens_BT.shape[1]) if pos_BT is None else pos_BT
    learned = None if model.positions is None else model.positions[...]
    x_BTD = ADD[config.positions](config, x_BTD, pos, learned)
    return constrain(x_BTD.astype(config.compute_dtype or "float32"), "batch", None, None)


def unembed_rows(config: ModelConfig, x_MD: jax.Array, rows_CD, ids_C) -> jax.Array:
    """float32 logits of the vocabulary rows `ids_C`; padding rows get a logit no softmax sees."""
    logits_MC = transposed_product(x_MD, rows_CD, jnp.float32)
    if config.logit_softcap:
        logits_MC = config.logit_softcap * jnp.tanh(logits_MC / config.logit_softcap)
    return jnp.where(ids_C < config.vocab_size, logits_MC, MASKED)


def unembed(config: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]."""
    rows = x.reshape(-1, x.shape[-1])
    table_VD = head_table(params)
    logits = unembed_rows(config, rows, table_VD, jnp.arange(len(table_VD)))
    logits = constrain(logits[:, : config.vocab_size], "batch", None)
    return logits.reshape(*x.shape[:-1], config.vocab_size)


def head_table(params: dict) -> jax.Array:
    """The head's table, [padded V, D]: the token embedding itself where they are tied."""
    return params.get("head", params["tokens"])


def forward(config: ModelConfig, params: dict, tokens_BT: jax.Array, **options) -> jax.Array:
    """logits_BTV of whole sequences, in one pass and without a cache. `options`: as `hidden`."""
    return unembed(config, params, hidden(config, params, tokens_BT, **options)[0])


def count_parameters(config: ModelConfig) -> int:
    """Weights of the model, vocabulary padding left out."""
    tables = 1 if config.tied else 2
    padding = (config.padded_vocab - config.vocab_size) * config.d_model * tables
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config))) - padding
