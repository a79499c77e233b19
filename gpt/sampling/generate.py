"""The one driver: chunks of decode steps on the device, streamed or collected.

`stream` prefills, then runs up to `CHUNK` steps a call in a loop on the device; between calls the
host hands out text and grows the cache. `complete` is `stream` drained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model.cache import KVCache
from gpt.sampling import draw, engine
from gpt.sampling.completion import NO_TOKEN, Completion, Piece
from gpt.sampling.draw import Draw
from gpt.sampling.settings import Settings
from gpt.stopwatch import Stopwatch

CHUNK = 16  # steps between looks at the host: text appears this often


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loop:
    """What the device carries between chunks. `token_B` is drawn but not yet in the cache."""

    cache: KVCache
    token_B: jax.Array
    left_B: jax.Array  # tokens that each row may still draw; 0: the row is done


def settle(token_B: jax.Array, left_B: jax.Array, eot: jax.Array) -> jax.Array:
    """Tokens left to draw after `token_B`: none after end-of-text."""
    return jnp.where(token_B == eot, 0, left_B - 1)


@partial(jax.jit, donate_argnames="cache")
def begin(cache: KVCache, logits_BV: jax.Array, rows: Draw, left_B: jax.Array, eot: jax.Array):
    """The loop after the prefill, its first tokens drawn, and their logprob_B."""
    token_B = draw.sample(logits_BV, rows, cache.length_B)
    return Loop(cache, token_B, settle(token_B, left_B, eot)), draw.logprob(logits_BV, token_B)


@partial(jax.jit, static_argnames=("config", "size"), donate_argnames="loop")
def decode_chunk(config: ModelConfig, params: dict, loop: Loop, rows: Draw, eot, size: int):
    """Up to `size` decode steps, until every row is done or one has filled the cache.

    Returns the loop, tokens_BC (NO_TOKEN where a row drew none) and their logprobs_BC.
    """
    B, capacity = len(loop.token_B), loop.cache.capacity
    tokens_BC = jnp.full((B, size), NO_TOKEN, jnp.int32)
    logprobs_BC = jnp.zeros((B, size), jnp.float32)

    def going(carry):
        i, loop, _, _ = carry
        running_B = loop.left_B > 0
        fits = jnp.max(jnp.where(running_B, loop.cache.length_B, 0)) < capacity
        return (i < size) & jnp.any(running_B) & fits

    def step(carry):
        i, loop, tokens_BC, logprobs_BC = carry
        running_B = loop.left_B > 0
        cache, logits_BV = engine.decode_step(config, params, loop.cache, loop.token_B, running_B)
        token_B = draw.sample(logits_BV, rows, cache.length_B)
        logprob_B = draw.logprob(logits_BV, token_B)
        left_B = jnp.where(running_B, settle(token_B, loop.left_B, eot), 0)
        tokens_BC = tokens_BC.at[:, i].set(jnp.where(running_B, token_B, NO_TOKEN))
        logprobs_BC = logprobs_BC.at[:, i].set(logprob_B)
        return i + 1, Loop(cache, token_B, left_B), tokens_BC, logprobs_BC

    return jax.lax.while_loop(going, step, (0, loop, tokens_BC, logprobs_BC))[1:]


def pad_prompts(prompts: Sequence[Sequence[int]], context_length: int):
    """Prompts as tokens_BT, padded on the right to their bucket, and their lengths n_B."""
    require(len(prompts) > 0, "there are no prompts: expected at least one, which may be empty")
    n_B = np.array([len(p) for p in prompts], np.int32)
    require(
        n_B.max() <= context_length,
        f"the prompt has {n_B.max()} tokens: expected at most the model's context of "
        f"{context_length}; shorten it",
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(int(n_B.max()), context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, n_B


def row_settings(settings: Settings, n_prompts: int) -> Draw:
    """Each row's settings; row p * num_samples + s is sample s of prompt p."""
    B = n_prompts * settings.num_samples
    return Draw(
        temperature=jnp.full(B, settings.temperature, jnp.float32),
        top_k=jnp.full(B, settings.top_k, jnp.int32),
        seed=jnp.full(B, settings.seed, jnp.uint32),
        sample=jnp.tile(jnp.arange(settings.num_samples, dtype=jnp.uint32), n_prompts),
    )


def with_room(config: ModelConfig, loop: Loop) -> Loop:
    """The loop, its cache doubled if a running row has filled it."""
    running_B, length_B = np.asarray(loop.left_B) > 0, np.asarray(loop.cache.length_B)
    if np.max(length_B, where=running_B, initial=0) < loop.cache.capacity:
        return loop
    capacity = engine.bucket(loop.cache.capacity + 1, config.context_length)
    return replace(loop, cache=engine.grow(loop.cache, capacity))


def start(model, ids: Sequence[Sequence[int]], settings: Settings, rows: Draw):
    """The prompts read and a first token drawn after each: the loop, and what was drawn."""
    config = model.config
    tokens_BT, n_B = pad_prompts(ids, config.context_length)
    allowed_B = config.context_length + 1 - np.repeat(n_B, settings.num_samples)
    most = min(settings.max_new_tokens, config.context_length + 1)
    left_B = np.minimum(most, allowed_B).astype(np.int32)
    cache, logits_BV = engine.prefill(config, model.params, tokens_BT, n_B)
    if settings.num_samples > 1:
        cache, logits_BV = engine.fork(cache, logits_BV, settings.num_samples)
    loop, logprob_B = begin(cache, logits_BV, rows, left_B, model.tokenizer.eot_token)
    return loop, (np.asarray(loop.token_B)[:, None], np.asarray(logprob_B)[:, None])


def advance(model, loop: Loop, rows: Draw, chunk: int):
    """Up to `chunk` more tokens a row: the loop, and what was drawn."""
    loop = with_room(model.config, loop)
    eot = model.tokenizer.eot_token
    loop, *drawn = decode_chunk(model.config, model.params, loop, rows, eot, chunk)
    return loop, jax.device_get(drawn)


def stream(
    model, prompts: Sequence[str], settings: Settings, chunk: int = CHUNK
) -> Iterator[Piece]:
    """Complete `prompts` together, handing out each row's text as it is drawn.

    `model` has `config`, `params` (unstacked) and `tokenizer`. An empty prompt stands for
    end-of-text, which is how every document began. `chunk`: steps between looks at the host; it
    changes no token. UserError if a prompt exceeds the context.
    """
    eot = model.tokenizer.eot_token
    ids = [model.tokenizer.encode_ordinary(prompt) or [eot] for prompt in prompts]
    rows = row_settings(settings, len(prompts))
    done = [
        Completion.blank(model, prompt, len(prompt_ids), sample, settings)
        for prompt, prompt_ids in zip(prompts, ids, strict=True)
        for sample in range(settings.num_samples)
    ]
    prefilling, decoding = Stopwatch(), Stopwatch()
    with prefilling:
        loop, drawn = start(model, ids, settings, rows)
    while running := [row for row, completion in enumerate(done) if not completion.finish_reason]:
        for row in running:
            text = done[row].record(*(array[row] for array in drawn))
            done[row].prefill_seconds, done[row].decode_seconds = (
                prefilling.seconds,
                decoding.seconds,
            )
            yield Piece(row, text, done[row])
        if any(not completion.finish_reason for completion in done):
            with decoding:
                loop, drawn = advance(model, loop, rows, chunk)


def complete(model, prompts: Sequence[str], settings: Settings) -> list[Completion]:
    """`stream` drained: the finished completions, row by row."""
    rows = {piece.row: piece.completion for piece in stream(model, prompts, settings)}
    return [rows[row] for row in sorted(rows)]
