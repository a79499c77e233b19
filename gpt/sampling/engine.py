"""Prefill and decode, as functions of one model and one cache.

Prefill reads whole prompts in large matrix products and is bound by compute. Decode reads one token
per row, rereading every weight and the cache, and is bound by memory bandwidth. `extend` is in
between: several tokens per row on top of a cache.
Each compiles once per (batch, bucket, capacity); lengths and positions are traced.
Shape letters are defined in gpt/model/transformer.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.model import flash_attention, transformer
from gpt.model import kv_cache as kv
from gpt.sharding import platform

SMALLEST_BUCKET = 32
PIECE = 1024  # tokens per row read at once; a piece's attention scores are PIECE x capacity numbers


def bucket(n_tokens: int, context_length: int) -> int:
    """The smallest cache size that holds `n_tokens`: a power of two or, from 192 up, three quarters
    of one; at least 32 and at most the context.

    Fewer sizes mean fewer programs, but each decode step reads the unused slots too.
    """
    size = max(SMALLEST_BUCKET, 1 << (n_tokens - 1).bit_length())
    size = size * 3 // 4 if size >= 256 and n_tokens <= size * 3 // 4 else size
    return min(size, context_length)


def last_logits(model: transformer.GPT, x_BTD: jax.Array, n_B: jax.Array) -> jax.Array:
    """logits_BV after the last of each row's `n_B` real tokens."""
    last_B = jnp.maximum(n_B - 1, 0)
    last_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return model.unembed(last_BD)


@partial(jax.jit, static_argnames="config")
def prefill(config: ModelConfig, params: dict, tokens_BT: jax.Array, n_B: jax.Array):
    """Read prompts into a new cache of capacity T; returns it and the next tokens' logits_BV.

    `tokens_BT` is padded on the right; row b holds `n_B[b]` >= 1 tokens. `params` is unstacked.
    """
    empty = kv.empty(config, len(tokens_BT))
    model = transformer.bind(config, params)
    x_BTD, cache = model.hidden(tokens_BT, empty, attend=flash_attention.prompt_attention)
    return cache.advanced(n_B), last_logits(model, x_BTD, n_B)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(config: ModelConfig, params: dict, cache: kv.KVCache, tokens_BT, n_B: jax.Array):
    """Read `n_B` more tokens per row into `cache`, which is consumed; returns what `prefill` does.

    The caller ensures that they fit: tokens past the capacity are dropped. The logits of a row that
    reads none are meaningless.
    """
    model = transformer.bind(config, params)
    x_BTD, cache = model.hidden(tokens_BT, cache)
    return cache.advanced(n_B), last_logits(model, x_BTD, n_B)


def prefill_in_pieces(config: ModelConfig, params: dict, tokens_BT, n_B, piece: int = PIECE):
    """Like `prefill`, but prompts longer than `piece` tokens are read in pieces of that size.

    A host function over two programs; the pieces bound the memory for attention scores.
    """
    T = tokens_BT.shape[1]
    cache, logits_BV = prefill(config, params, tokens_BT[:, :piece], np.minimum(n_B, piece))
    if piece >= T:
        return cache, logits_BV
    cache = grow(cache, T)
    for start in range(piece, int(n_B.max()), piece):
        more_B = np.clip(n_B - start, 0, piece).astype(np.int32)
        tokens = tokens_BT[:, start : start + piece]
        cache, after_BV = extend(config, params, cache, tokens, more_B)
        logits_BV = jnp.where((more_B > 0)[:, None], after_BV, logits_BV)
    return cache, logits_BV


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(config: ModelConfig, params: dict, cache: kv.KVCache, token_B, running_B):
    """Read one token per row into `cache`, which is consumed. Returns the new cache and the next
    tokens' logits, [B, V].

    Rows that are not running are computed too, but keep their length.
    """
    model = transformer.bind(config, params)
    # On a GPU, XLA turns a one-row product into sums that copy whole matrices. So a batch of one
    # reads its token twice; the second result is dropped and its slot overwritten.
    n_times = 2 if len(token_B) == 1 and platform() == "gpu" else 1
    tokens_BT = jnp.repeat(token_B[:, None], n_times, axis=1)
    x_BTD, cache = model.hidden(tokens_BT, cache, attend=flash_attention.decode_attention)
    logits_BV = model.unembed(x_BTD)[:, 0]
    return cache.advanced(running_B.astype(jnp.int32)), logits_BV


grow = jax.jit(kv.grow, static_argnames="capacity")


@jax.jit
def fork(cache: kv.KVCache, logits_BV: jax.Array, row_R: jax.Array):
    """Rows `row_R` of a prefill, with repeats: several samples from one prefill."""
    return kv.select(cache, row_R), logits_BV[row_R]
