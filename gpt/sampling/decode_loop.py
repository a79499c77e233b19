"""The loop on the device: decode a token a row, draw the next, several times a call.

Programs: one `begin` and one `decode_chunk` per (batch, capacity); lengths, settings and what has
ended are traced. Shape letters: see model/transformer.py; C counts the steps of a chunk.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.sampling import engine, sampler
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.sampler import Draw
from gpt.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loop:
    """What the device carries between chunks. `token_B` is drawn but not yet in the cache.

    `seen_BV`: tokens of the text so far. `dropped_B`: tokens of it no longer in the cache.
    """

    cache: kv.KVCache
    token_B: jax.Array
    left_B: jax.Array  # tokens that each row may still draw; 0: the row is done
    seen_BV: jax.Array
    dropped_B: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What was drawn, NO_TOKEN where a row drew none, and the model's own log-probabilities.

    `top_BCK` ids and `top_probs_BCK`: the likeliest tokens before each draw, K of them (or none).
    """

    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    top_BCK: jax.Array
    top_probs_BCK: jax.Array


def pin(loop: Loop) -> Loop:
    """The loop laid out on the mesh by the table: left to the compiler, the layout might change
    from one program to the next, and each change compile the next one again."""
    cache = loop.cache
    k, v = jax.tree.map(lambda a: constrain(a, *kv.AXES), (cache.k, cache.v))
    cache = replace(cache, k=k, v=v, length_B=constrain(cache.length_B, "batch"))
    token_B, left_B, dropped_B = (
        constrain(a, "batch") for a in (loop.token_B, loop.left_B, loop.dropped_B)
    )
    return Loop(cache, token_B, left_B, constrain(loop.seen_BV, "batch", None), dropped_B)


def describe(logits_BV: jax.Array, token_B: jax.Array, top: int) -> Drawn:
    """The draw of `token_B` as a chunk of one step."""
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    likeliest_BK, ids_BK = jax.lax.top_k(logits_BV, top)
    parts = token_B, sampler.logprob(logits_BV, token_B), ids_BK, jnp.exp(likeliest_BK - total_B1)
    return Drawn(*(part[:, None] for part in parts))


def settle(token_B: jax.Array, left_B: jax.Array, eot: jax.Array) -> jax.Array:
    """Tokens left to draw after `token_B`: none after end-of-text."""
    return jnp.where(token_B == eot, 0, left_B - 1)


@partial(jax.jit, static_argnames="top", donate_argnames=("cache", "seen_BV"))
def begin(cache, logits_BV, rows: Draw, left_B, seen_BV, dropped_B, eot, top: int = 0):
    """The loop after a prefill, its first tokens drawn, and these."""
    token_B = sampler.sample(logits_BV, rows, seen_BV, cache.length_B + dropped_B)
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    loop = Loop(cache, token_B, settle(token_B, left_B, eot), seen_BV, dropped_B)
    return pin(loop), describe(logits_BV, token_B, top)


def step(config: ModelConfig, params: dict, loop: Loop, rows: Draw, eot, top: int):
    """One decode step of all rows, and what it drew. Rows that are done draw NO_TOKEN."""
    running_B = loop.left_B > 0
    cache, logits_BV = engine.decode_step(config, params, loop.cache, loop.token_B, running_B)
    token_B = sampler.sample(logits_BV, rows, loop.seen_BV, cache.length_B + loop.dropped_B)
    left_B = jnp.where(running_B, settle(token_B, loop.left_B, eot), 0)
    seen_BV = loop.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    drawn = describe(logits_BV, token_B, top)
    drawn = replace(drawn, tokens_BC=jnp.where(running_B[:, None], drawn.tokens_BC, NO_TOKEN))
    return Loop(cache, token_B, left_B, seen_BV, loop.dropped_B), drawn


@partial(jax.jit, static_argnames=("config", "size", "top"), donate_argnames="loop")
def decode_chunk(
    config: ModelConfig, params: dict, loop: Loop, rows: Draw, going_B, eot, size: int, top: int = 0
):
    """Up to `size` decode steps, until every row is done or one has filled the cache.

    Rows not in `going_B` are done from here on. Returns the loop, which is consumed, and Drawn.
    """
    B, capacity = len(loop.token_B), loop.cache.capacity
    loop = replace(loop, left_B=jnp.where(going_B, loop.left_B, 0))
    ids, number = partial(jnp.full, fill_value=NO_TOKEN, dtype=jnp.int32), jnp.zeros
    drawn = Drawn(ids((B, size)), number((B, size)), ids((B, size, top)), number((B, size, top)))

    def going(carry):
        i, loop, _ = carry
        running_B = loop.left_B > 0
        fits = jnp.max(jnp.where(running_B, loop.cache.length_B, 0)) < capacity
        return (i < size) & jnp.any(running_B) & fits

    def advance(carry):
        i, loop, drawn = carry
        loop, new = step(config, params, loop, rows, eot, top)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=1)
        return i + 1, loop, jax.tree.map(put, drawn, new)

    _, loop, drawn = jax.lax.while_loop(going, advance, (0, loop, drawn))
    return pin(loop), drawn


@partial(jax.jit, static_argnames=("config", "kept"), donate_argnames="loop")
def reread(config: ModelConfig, params: dict, loop: Loop, tokens_BT, slid_B, kept: int) -> Loop:
    """The loop, consumed, with the cache of the rows `slid_B` made anew from their last tokens.

    Dropping cached positions instead would change what the rest of them mean. `tokens_BT` holds
    `kept` tokens a row, padded; the other rows are computed too and thrown away.
    """
    n_B = jnp.full(len(tokens_BT), kept, jnp.int32)
    fresh = kv.grow(engine.prefill(config, params, tokens_BT, n_B)[0], loop.cache.capacity)

    def merge(new, old):
        return jnp.where(slid_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    lost_B = jnp.where(slid_B, loop.cache.length_B - kept, 0)
    cache = jax.tree.map(merge, fresh, loop.cache)
    return pin(replace(loop, cache=cache, dropped_B=loop.dropped_B + lost_B))
