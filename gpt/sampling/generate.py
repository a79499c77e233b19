"""The one driver: chunks of decode steps on the device, streamed or collected.

`stream` prefills, then runs up to `CHUNK` steps a call in a loop on the device; between calls the
host hands out text and grows the cache. `complete` is `stream` drained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model.cache import KVCache
from gpt.sampling import draw, engine
from gpt.sampling.draw import Draw
from gpt.sampling.settings import Settings
from gpt.sampling.text import TextStream
from gpt.stopwatch import Stopwatch

CHUNK = 16  # steps between looks at the host: text appears this often
NO_TOKEN = -1


@dataclass
class Completion:
    """One row: its prompt, and what has been drawn after it so far.

    `logprobs`: the model's own, in nats, before temperature and filters. `finish_reason`: "eos",
    "length" or "context" (None while it runs). `prefill_seconds` and `decode_seconds` are those of
    the whole batch until this row ended, compilation left out.
    """

    prompt: str
    sample: int
    seed: int
    stream: TextStream = field(repr=False)
    allowed: int  # tokens until the context is full
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this row per second of decoding; the first token is the prefill's."""
        decoded = len(self.token_ids) - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds else None

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Piece:
    """Text that one completion has just gained, whole characters only."""

    row: int
    text: str
    completion: Completion


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


def record(done: Completion, tokens, logprobs, eot: int, max_new_tokens: int) -> str:
    """Append a chunk's tokens to a completion; the whole characters it gained."""
    if done.finish_reason:
        return ""
    drawn = [(int(t), float(p)) for t, p in zip(tokens, logprobs, strict=True) if t != NO_TOKEN]
    new = [pair for pair in drawn if pair[0] != eot]
    done.token_ids += [token for token, _ in new]
    done.logprobs += [logprob for _, logprob in new]
    if len(new) < len(drawn):
        done.finish_reason = "eos"
    elif len(done.token_ids) == max_new_tokens:
        done.finish_reason = "length"
    elif len(done.token_ids) == done.allowed:
        done.finish_reason = "context"
    gained = done.stream.push([token for token, _ in new])
    gained += done.stream.finish() if done.finish_reason else ""
    done.text += gained
    return gained


def stream(
    model, prompts: Sequence[str], settings: Settings, chunk: int = CHUNK
) -> Iterator[Piece]:
    """Complete `prompts` together, handing out each row's text as it is drawn.

    `model` has `config`, `params` (unstacked) and `tokenizer`. An empty prompt stands for
    end-of-text, which is how every document began. `chunk`: steps between looks at the host; it
    changes no token. UserError if a prompt exceeds the context.
    """
    config, eot = model.config, model.tokenizer.eot_token
    ids = [model.tokenizer.encode_ordinary(prompt) or [eot] for prompt in prompts]
    tokens_BT, n_B = pad_prompts(ids, config.context_length)
    rows = row_settings(settings, len(prompts))
    # A token may be drawn at the context's end, but none after it: it would have no position.
    allowed_B = config.context_length + 1 - np.repeat(n_B, settings.num_samples)
    left_B = np.minimum(settings.max_new_tokens, allowed_B).astype(np.int32)
    prefilling, decoding = Stopwatch(), Stopwatch()
    with prefilling:
        cache, logits_BV = engine.prefill(config, model.params, tokens_BT, n_B)
        if settings.num_samples > 1:
            cache, logits_BV = engine.fork(cache, logits_BV, settings.num_samples)
        loop, logprob_B = begin(cache, logits_BV, rows, left_B, eot)
        tokens_BC, logprobs_BC = np.asarray(loop.token_B)[:, None], np.asarray(logprob_B)[:, None]
    done = [
        Completion(
            prompts[row // settings.num_samples],
            row % settings.num_samples,
            settings.seed,
            TextStream(model.tokenizer.decode_bytes),
            int(allowed),
        )
        for row, allowed in enumerate(allowed_B)
    ]
    while True:
        for row, completion in enumerate(done):
            ran = not completion.finish_reason
            text = record(
                completion, tokens_BC[row], logprobs_BC[row], eot, settings.max_new_tokens
            )
            if ran:
                completion.prefill_seconds = prefilling.seconds
                completion.decode_seconds = decoding.seconds
                yield Piece(row, text, completion)
        if all(completion.finish_reason for completion in done):
            return
        with decoding:
            loop = with_room(config, loop)
            loop, tokens_BC, logprobs_BC = decode_chunk(
                config, model.params, loop, rows, eot, chunk
            )
            tokens_BC, logprobs_BC = np.asarray(tokens_BC), np.asarray(logprobs_BC)


def complete(model, prompts: Sequence[str], settings: Settings) -> list[Completion]:
    """`stream` drained: the finished completions, row by row."""
    rows = {piece.row: piece.completion for piece in stream(model, prompts, settings)}
    return [rows[row] for row in sorted(rows)]
