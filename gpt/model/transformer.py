"""The decoder-only Transformer: embedding, blocks, head.

Shape letters, used everywhere as array suffixes and in einsum strings:
  B batch   T query time   S cache slots   D model width   N query heads   K key/value heads
  G = N/K   H head width   F MLP width     V vocabulary    L layers        M = B*T tokens

`GPT` is a Flax NNX module: `GPT(config, rngs=nnx.Rngs(0))(tokens)` returns logits. Compiled code is
functional: weights are passed as a nested dict of arrays (`params`), and `bind(config, params)`
rebuilds the model at trace time, which costs nothing at run time.

Weights have two layouts. *Stacked*, for training and on disk: each block weight is one array
[L, ...], and one program scans over the layers. *Unstacked*, for decoding: a subtree per layer,
because slicing stacked weights at every token would copy them.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model.attention import MASKED, Attend, Attention
from gpt.model.flash_attention import fused_attention
from gpt.model.int8 import Int8
from gpt.model.layers import (
    MLP,
    NORMS,
    dropout,
    exact_products,
    normal,
    softcap,
    table_product,
    weight,
)
from gpt.model.positions import Positions, positions_of, sinusoids
from gpt.sharding import constrain


class Block(nnx.Module):
    """Attention, then the MLP, each preceded by a norm and added to the residual stream (GPT-2)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.dropout = config.dropout
        self.attention_norm = NORMS[config.norm](config, config.d_model)
        self.attention = Attention(config, attention_key)
        self.mlp_norm = NORMS[config.norm](config, config.d_model)
        self.mlp = MLP(config, mlp_key)

    def __call__(
        self,
        x_BTD: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        dropout_key_B: jax.Array | None,
        positions: Positions,
        attend: Attend,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The residual stream after this block, and the layer's keys and values, if cached."""
        y_BTD = self.attention_norm(x_BTD)
        y_BTD, past = self.attention(y_BTD, past, dropout_key_B, positions, attend)
        x_BTD = x_BTD + dropout(y_BTD, dropout_key_B, self.dropout, site="attention")
        x_BTD = constrain(x_BTD, "batch", None, None)

        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + dropout(y_BTD, dropout_key_B, self.dropout, site="mlp")
        return constrain(x_BTD, "batch", None, None), past


class PostNormBlock(Block):
    """The same with a norm after each residual sum (Vaswani et al. 2017, section 3.1)."""

    def __call__(self, x_BTD, past, dropout_key_B, positions, attend):
        y_BTD, past = self.attention(x_BTD, past, dropout_key_B, positions, attend)
        y_BTD = dropout(y_BTD, dropout_key_B, self.dropout, site="attention")
        x_BTD = constrain(self.attention_norm(x_BTD + y_BTD), "batch", None, None)

        y_BTD = dropout(self.mlp(x_BTD), dropout_key_B, self.dropout, site="mlp")
        return constrain(self.mlp_norm(x_BTD + y_BTD), "batch", None, None), past


BLOCKS = {"pre": Block, "post": PostNormBlock}


class GPT(nnx.Module):
    """The model: `GPT(config, rngs=nnx.Rngs(0))(tokens_BT)` returns float32 logits_BTV.

    Weights are sampled from N(0, init_std²), those that write to the residual stream with init_std
    divided by sqrt(2L) (GPT-2, section 2.3). `stacked`: the layout of the block weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = True):
        self.config, self.stacked = config, stacked
        D, V = config.d_model, config.padded_vocab
        draw, dtype = normal(config.init_std), config.param_dtype
        token_key, position_key, block_key, head_key = jax.random.split(rngs.params.key[...], 4)

        # Weight tables with a row per token and per position, under their names in checkpoints.
        # (Token ids are `tokens_BT`, and a batch's positions `Positions`.)
        self.tokens = weight(draw(token_key, (V, D), dtype), ("vocab", "embed"))
        learned = config.positions == "learned"
        table_SD = draw(position_key, (config.context_length, D), dtype) if learned else None
        self.positions = weight(table_SD, (None, "embed")) if learned else None

        block_keys = jax.random.split(block_key, config.n_layers)
        make_block = functools.partial(BLOCKS[config.norm_place], config)
        if stacked:
            self.blocks = jax.vmap(make_block)(block_keys)
            # vmap gives the arrays a layer axis, which the metadata still lacks.
            for _, node in nnx.iter_graph(self.blocks):
                if isinstance(node, nnx.Param):
                    node.set_metadata(out_sharding=(None, *node.out_sharding))
        else:
            self.blocks = nnx.List(map(make_block, block_keys))

        pre_norm = config.norm_place == "pre"
        self.final_norm = NORMS[config.norm](config, D) if pre_norm else None
        head_VD = None if config.tied else draw(head_key, (V, D), dtype)
        self.head = None if config.tied else weight(head_VD, ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array, **options) -> jax.Array:
        """logits_BTV for whole sequences, without a cache. `options` are passed to `hidden`."""
        x_BTD, _ = self.hidden(tokens_BT, **options)
        return self.unembed(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: kv.KVCache | None = None,
        *,
        dropout_key_B: jax.Array | None = None,
        attend: Attend = fused_attention,
        remat: str = "blocks",
        unroll: bool = False,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        """The residual stream after the last block and norm, and the cache including these tokens.

        Without a cache, token t of each row is at position t. With one (unstacked weights only),
        row b's tokens continue at position `cache.length_B[b]`. The returned cache holds their keys
        and values, but its lengths are unchanged: only the caller knows how many of the T tokens
        are real. `dropout_key_B`, one key per row, turns dropout on. `scan_blocks` explains `remat`
        and `unroll`. Returns x_BTD in the compute dtype. Raises ValueError for a cache with stacked
        weights.
        """
        config, T = self.config, tokens_BT.shape[1]
        if self.stacked and cache is not None:
            raise ValueError(
                "a KV cache needs unstacked weights, and these are stacked: "
                "pass transformer.unstack(params)"
            )
        pos_BT = None  # token t at position t: without a cache, or with an empty one
        if cache is not None and cache.capacity:
            pos_BT = cache.length_B[:, None] + jnp.arange(T)
        positions = positions_of(config, pos_BT, T)
        dropout_keys_LB = None
        if dropout_key_B is not None:
            split_row = functools.partial(jax.random.split, num=config.n_layers)
            dropout_keys_LB = jax.vmap(split_row, out_axes=1)(dropout_key_B)

        with exact_products(config.compute_dtype):
            x_BTD = self.embed(tokens_BT, pos_BT)
            x_BTD = dropout(x_BTD, dropout_key_B, config.dropout, site="embedding")
            if self.stacked:
                x_BTD = scan_blocks(
                    self.blocks,
                    x_BTD,
                    dropout_keys_LB,
                    positions,
                    attend,
                    remat=remat,
                    unroll=unroll,
                )
            else:
                x_BTD, cache = loop_blocks(
                    self.blocks, x_BTD, cache, dropout_keys_LB, positions, attend
                )
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD, cache

    def embed(self, tokens_BT: jax.Array, pos_BT: jax.Array | None = None) -> jax.Array:
        """Token embeddings plus any additive positions; x_BTD in the compute dtype."""
        config, table_VD = self.config, self.tokens[...]
        if isinstance(table_VD, Int8):
            x_BTD = table_VD.rows(tokens_BT)
        else:
            # Gather over fsdp first, or the partitioner rebuilds the whole table everywhere.
            x_BTD = constrain(table_VD, "vocab", None)[tokens_BT].astype("float32")

        pos = jnp.arange(tokens_BT.shape[1]) if pos_BT is None else pos_BT
        if config.positions == "learned":
            x_BTD = x_BTD + self.positions[...][pos]
        elif config.positions == "sinusoidal":
            # Scale by sqrt(D) before adding the sinusoids (Vaswani et al. 2017, section 3.4).
            x_BTD = x_BTD * config.d_model**0.5 + sinusoids(pos, config.d_model)
        return constrain(x_BTD.astype(config.compute_dtype or "float32"), "batch", None, None)

    def unembed(self, x: jax.Array) -> jax.Array:
        """float32 logits [..., V] for hidden states [..., D]."""
        config, table_VD = self.config, self.head_table
        x_MD = x.reshape(-1, x.shape[-1])
        logits_MV = table_logits(config, x_MD, table_VD, jnp.arange(len(table_VD)))
        logits_MV = constrain(logits_MV[:, : config.vocab_size], "batch", None)
        return logits_MV.reshape(*x.shape[:-1], config.vocab_size)

    @property
    def head_table(self) -> jax.Array | Int8:
        """The head, [padded V, D]: the token embedding itself if they are tied."""
        return self.tokens[...] if self.head is None else self.head[...]


def table_logits(config: ModelConfig, x_MD: jax.Array, rows_CD, ids_C: jax.Array) -> jax.Array:
    """float32 logits [M, C] of the tokens `ids_C`, whose rows in the head's table are `rows_CD`.

    Padding rows get a logit too low for any softmax to notice.
    """
    with exact_products(config.compute_dtype):
        logits_MC = softcap(table_product(x_MD, rows_CD), config.logit_softcap)
    return jnp.where(ids_C < config.vocab_size, logits_MC, MASKED)


def scan_blocks(
    blocks: Block,
    x_BTD: jax.Array,
    dropout_keys_LB: jax.Array | None,
    positions: Positions,
    attend: Attend,
    *,
    remat: str,
    unroll: bool,
) -> jax.Array:
    """The residual stream after stacked blocks, for training: one program for all layers.

    `remat` is what the backward pass recomputes instead of storing. "none": nothing; "products":
    all but products with weights and the outputs of fused attention; "blocks": each block from its
    input.
    `unroll` compiles the layers one after another. That takes longer to compile, but runs faster on
    a CPU that stores activations, because a scan copies them into stacked arrays and out again.
    """

    def body(x_BTD, block_and_key):
        block, dropout_key_B = block_and_key
        x_BTD, _ = block(x_BTD, None, dropout_key_B, positions, attend)
        return x_BTD, None

    if remat != "none":
        policy = keep_products if remat == "products" else None
        # In a loop nothing can merge the two computations; unrolled, the compiler would.
        body = jax.checkpoint(body, prevent_cse=unroll, policy=policy)
    x_BTD, _ = jax.lax.scan(body, x_BTD, (blocks, dropout_keys_LB), unroll=unroll)
    return x_BTD


def keep_products(primitive, *avals, **params) -> bool:
    """A jax.checkpoint policy: save products with weights and the outputs of fused attention."""
    if "dot_product_attention_fwd" in primitive.name or primitive.name == "pallas_call":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


def loop_blocks(
    blocks: nnx.List,
    x_BTD: jax.Array,
    cache: kv.KVCache | None,
    dropout_keys_LB: jax.Array | None,
    positions: Positions,
    attend: Attend,
) -> tuple[jax.Array, kv.KVCache | None]:
    """The residual stream after a list of blocks, for decoding, and the cache they wrote to."""
    written = []
    for i, block in enumerate(blocks):
        past = None if cache is None else (cache.k[i], cache.v[i])
        dropout_key_B = None if dropout_keys_LB is None else dropout_keys_LB[i]
        x_BTD, past = block(x_BTD, past, dropout_key_B, positions, attend)
        written.append(past)
    if cache is not None:
        k, v = zip(*written, strict=True)
        cache = replace(cache, k=k, v=v)
    return x_BTD, cache


# From weights to a model and back.


def init(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh stacked weights: those of `GPT(config, rngs=nnx.Rngs(key))`."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key))))


def bind(config: ModelConfig, params: dict) -> GPT:
    """The model with these weights, stacked or not; called at trace time."""
    stacked = "attention" in params["blocks"]  # else one subtree per layer
    return nnx.merge(nnx.graphdef(abstract_model(config, stacked)), params)


def forward(config: ModelConfig, params: dict, tokens_BT: jax.Array, **options) -> jax.Array:
    """logits_BTV, in a form that can be jitted over `params`; `options` as in `GPT.hidden`."""
    return bind(config, params)(tokens_BT, **options)


@functools.cache
def abstract_model(config: ModelConfig, stacked: bool) -> GPT:
    """The model with shapes instead of arrays; nothing is computed."""
    # Not nnx.eval_shape, which under a mesh would mistake the logical axes for mesh axes.
    return jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), stacked=stacked))


def abstract(config: ModelConfig) -> dict:
    """Shapes and dtypes of the stacked weights; nothing is computed."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: ModelConfig, stacked: bool = True) -> dict:
    """A PartitionSpec of logical axis names for each weight, in the same tree."""
    specs = nnx.get_partition_spec(nnx.state(abstract_model(config, stacked)))
    return nnx.to_pure_dict(specs)


def cast(params: dict, dtype: str) -> dict:
    """The weights in `dtype`, except int8 ones."""

    def convert(leaf: jax.Array | Int8) -> jax.Array | Int8:
        return leaf if isinstance(leaf, Int8) else leaf.astype(dtype)

    return jax.tree.map(convert, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


def unstack(params: dict) -> dict:
    """Stacked weights as one subtree per layer, for decoding."""
    n_layers = len(jax.tree.leaves(params["blocks"])[0])

    def layer(i: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[i], params["blocks"])

    return params | {"blocks": {i: layer(i) for i in range(n_layers)}}


def require_even_split(config: ModelConfig, mesh: Mesh, fsdp: bool = True) -> list[str]:
    """Raise UserError unless the mesh divides the weights; return notes on what is kept whole.

    `fsdp`: weights are also split over that axis, as in training.
    """
    tensor = mesh.shape["tensor"]
    for name, size, axis, parts in (
        ("model.n_heads", config.n_heads, "tensor", tensor),
        ("the MLP's width", config.ff_width, "tensor", tensor),
        ("the padded vocabulary", config.padded_vocab, "tensor", tensor),
        ("model.d_model", config.d_model, "fsdp", mesh.shape["fsdp"] if fsdp else 1),
    ):
        require(
            size % parts == 0,
            f"{name} is {size}, which --mesh.{axis} {parts} does not divide: choose a divisor",
        )
    if config.kv_heads % tensor == 0:
        return []
    return [
        f"{config.kv_heads} key/value heads do not divide evenly among {tensor} devices, so each "
        "keeps them all"
    ]
