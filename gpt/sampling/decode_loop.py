"""Decoding on the device: one token per row and step, several steps per call.

One step, end to end. `decode_chunk` is the program, `run_steps` its loop, `decode_and_sample` the
loop body:
1. `engine.decode_step` binds the weights to the model (`transformer.bind`) and calls `GPT.hidden`
   with `token_B`, the last token sampled for each row. It is not yet in the cache, which holds
   `length_B` tokens per row, so its position is `length_B`.
2. In each layer (`loop_blocks`, `Block`), `Attention` computes the token's query, key and value.
   `kv_cache.write` puts the key and value in slot `length_B`, and `decode_attention` attends to all
   slots up to that one.
3. `GPT.unembed` gives the next token's logits_BV, and `KVCache.advanced` adds 1 to the length of
   each running row.
4. `draw` samples each row's next token (sampler.py), which becomes the next step's `token_B`.
Before the first step, `start_decoding` samples a token from the prefill's logits.

`sample_first` compiles once per batch size, and `decode_chunk` once per batch size and cache
capacity; lengths, settings and which rows have ended are traced. (On an accelerator, both also
compile once per set of sampling stages; see sampler.py.)
Shape letters are defined in gpt/model/transformer.py; C steps of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.sampling import engine, sampler
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.sampler import SamplingParams
from gpt.sharding import constrain, platform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State kept on the device from one chunk to the next."""

    cache: kv.KVCache
    token_B: jax.Array  # each row's last token, not yet in the cache
    remaining_B: jax.Array  # tokens each row may still gain; 0 if done
    seen_BV: jax.Array  # tokens in the prompt or the text so far
    dropped_B: jax.Array  # tokens of each row no longer in the cache
    end_ids: jax.Array  # tokens that end a text: one, several or none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTokens:
    """The tokens each row gained in a chunk; NO_TOKEN where it gained none.

    `logprobs_BC`: the model's own log-probabilities. `top_ids_BCK`, `top_probs_BCK`: the K
    likeliest tokens at each step and the model's own probabilities of them.
    """

    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    top_ids_BCK: jax.Array
    top_probs_BCK: jax.Array


def find_running_rows(state: DecodeState) -> jax.Array:
    """Rows that gain a token in the next step, bool [B]: those that are not done and have not
    filled the cache."""
    return (state.remaining_B > 0) & (state.cache.length_B < state.cache.capacity)


def start_decoding(
    state: DecodeState, logits_BV: jax.Array, sampling: SamplingParams, top: int = 0
) -> tuple[DecodeState, SampledTokens]:
    """Sample each row's first token from the prefill's logits.

    `state` is consumed; its `token_B` is not set yet. `top`: number of likeliest tokens to report.
    """
    # Without keys and values, one program serves every capacity.
    k, v = state.cache.k, state.cache.v
    state = replace(state, cache=replace(state.cache, k=(), v=()))
    state, sampled = sample_first(state, logits_BV, sampling, top)
    return replace(state, cache=replace(state.cache, k=k, v=v)), sampled


@partial(jax.jit, static_argnames="top", donate_argnames="state")
def sample_first(
    state: DecodeState, logits_BV: jax.Array, sampling: SamplingParams, top: int
) -> tuple[DecodeState, SampledTokens]:
    """The compiled part of `start_decoding`."""
    running_B = jnp.ones(len(logits_BV), bool)
    state, sampled = draw(state, logits_BV, running_B, sampling, top)
    return constrain_state(state), sampled


@partial(jax.jit, static_argnames=("config", "size", "top"), donate_argnames="state")
def decode_chunk(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    sampling: SamplingParams,
    active_B: jax.Array,
    size: int,
    top: int = 0,
) -> tuple[DecodeState, SampledTokens]:
    """Decode up to `size` tokens per row, until it is done or has filled the cache.

    `state` is consumed. Inactive rows become done. A CPU stops early when every row is done or one
    has filled the cache. An accelerator always runs `size` steps, because deciding from its own
    results would need a round trip to the host.
    """
    state = replace(state, remaining_B=jnp.where(active_B, state.remaining_B, 0))

    def step(state: DecodeState, _) -> tuple[DecodeState, None, SampledTokens]:
        state, sampled = decode_and_sample(config, params, state, sampling, top)
        return state, None, sampled

    state, _, sampled = run_steps(step, state, None, size, width=1, top=top)
    return constrain_state(state), sampled


def run_steps(
    step: Callable,
    state: DecodeState,
    carried,
    size: int,
    width: int,
    top: int,
    pays: Callable = lambda state, carried: True,
) -> tuple[DecodeState, Any, SampledTokens]:
    """Run a chunk's loop: up to `size` steps, each adding up to `width` tokens per row.

    `step(state, carried)` returns both and a SampledTokens of `width` columns. `carried` is any
    other state passed between steps. A CPU also stops early once `pays(state, carried)` is False.
    """
    B, C = len(state.token_B), size * width
    sampled = SampledTokens(
        tokens_BC=jnp.full((B, C), NO_TOKEN, jnp.int32),
        logprobs_BC=jnp.zeros((B, C)),
        top_ids_BCK=jnp.full((B, C, top), NO_TOKEN, jnp.int32),
        top_probs_BCK=jnp.zeros((B, C, top)),
    )

    def goes_on(carry):
        i, state, carried, _ = carry
        running_B = find_running_rows(state)
        none_is_full = jnp.all(running_B == (state.remaining_B > 0))
        goes_on = (i < size) & jnp.any(running_B) & none_is_full
        return goes_on & ((i == 0) | pays(state, carried))

    def advance(carry):
        i, state, carried, sampled = carry
        state, carried, new = step(state, carried)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * width, axis=1)
        return i + 1, state, carried, jax.tree.map(write, sampled, new)

    start = 0, state, carried, sampled
    if platform() == "cpu":
        return jax.lax.while_loop(goes_on, advance, start)[1:]
    return jax.lax.fori_loop(0, size, lambda _, carry: advance(carry), start)[1:]


def decode_and_sample(
    config: ModelConfig, params: dict, state: DecodeState, sampling: SamplingParams, top: int
) -> tuple[DecodeState, SampledTokens]:
    """Run one decode step for all rows and sample a token for each running row."""
    running_B = find_running_rows(state)
    cache, logits_BV = engine.decode_step(config, params, state.cache, state.token_B, running_B)
    return draw(replace(state, cache=cache), logits_BV, running_B, sampling, top)


def draw(
    state: DecodeState,
    logits_BV: jax.Array,
    running_B: jax.Array,
    sampling: SamplingParams,
    top: int,
) -> tuple[DecodeState, SampledTokens]:
    """Sample a token for each running row from the logits after its cached tokens."""
    position_B = state.cache.length_B + state.dropped_B
    token_B = sampler.sample(logits_BV, sampling, state.seen_BV, position_B)
    token_B = jnp.where(running_B, token_B, state.token_B)
    sampled = as_sampled_tokens(logits_BV, token_B, top)
    tokens_BC = jnp.where(running_B[:, None], sampled.tokens_BC, NO_TOKEN)
    state = replace(
        state,
        token_B=token_B,
        remaining_B=jnp.where(running_B, count_remaining(state, token_B), state.remaining_B),
        seen_BV=mark_seen(state.seen_BV, token_B),
    )
    return state, replace(sampled, tokens_BC=tokens_BC)


def count_remaining(state: DecodeState, token_B: jax.Array) -> jax.Array:
    """Tokens each row may still gain after `token_B`; 0 after end-of-text."""
    has_ended_B = jnp.any(token_B[:, None] == state.end_ids, axis=-1)
    return jnp.where(has_ended_B, 0, state.remaining_B - 1)


def mark_seen(seen_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def as_sampled_tokens(logits_BV: jax.Array, token_B: jax.Array, top: int) -> SampledTokens:
    """`token_B` as a one-step chunk, with its log-probabilities and the likeliest tokens."""
    log_total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    top_logits_BK, top_ids_BK = jax.lax.top_k(logits_BV, top)
    return SampledTokens(
        tokens_BC=token_B[:, None],
        logprobs_BC=sampler.token_logprob(logits_BV, token_B)[:, None],
        top_ids_BCK=top_ids_BK[:, None],
        top_probs_BCK=jnp.exp(top_logits_BK - log_total_B1)[:, None],
    )


@partial(jax.jit, static_argnames=("config", "kept"), donate_argnames="state")
def reread(
    config: ModelConfig, params: dict, state: DecodeState, tokens_BT, slid_B, kept: int
) -> DecodeState:
    """Recompute the cache of rows `slid_B` from their last `kept` tokens, given padded in
    `tokens_BT`. `state` is consumed.

    Just dropping cached positions would change what the remaining ones mean. The other rows are
    computed too and discarded.
    """
    n_B = jnp.full(len(tokens_BT), kept, jnp.int32)
    fresh, _ = engine.prefill(config, params, tokens_BT, n_B)
    fresh = kv.grow(fresh, state.cache.capacity)

    def merge(new, old):
        return jnp.where(slid_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    newly_dropped_B = jnp.where(slid_B, state.cache.length_B - kept, 0)
    cache = jax.tree.map(merge, fresh, state.cache)
    state = replace(state, cache=cache, dropped_B=state.dropped_B + newly_dropped_B)
    return constrain_state(state)


def constrain_state(state: DecodeState) -> DecodeState:
    """The state laid out on the mesh by `constrain_rows`."""
    return replace(constrain_rows(state), end_ids=state.end_ids)


def constrain_rows(tree):
    """Lay out caches, and arrays whose first axis is rows, on the mesh by the sharding table. Left
    to the compiler, the layout could differ between programs, and each change would recompile the
    next program."""

    def lay_out(a: jax.Array) -> jax.Array:
        names = kv.AXES if a.ndim == len(kv.AXES) else ("batch", None)[: a.ndim]
        return constrain(a, *names)

    return jax.tree.map(lay_out, tree)
