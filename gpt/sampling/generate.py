"""The generation driver: prompts in, completions out, streamed or collected.

`stream` reads the prompts (prefill), then runs chunks of decode steps on the device
(decode_loop.py). Between chunks the host yields text, ends rows at stop strings, and grows or
slides the cache. `complete` collects what `stream` yields.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from gpt.compile_log import RecompilationCheck, Stopwatch, compilations
from gpt.config import ModelConfig
from gpt.errors import require
from gpt.sampling import engine
from gpt.sampling.completion import Completion, Piece, Row
from gpt.sampling.decode_loop import (
    DecodeState,
    SampledTokens,
    decode_chunk,
    reread,
    start_decoding,
)
from gpt.sampling.prompts import Prompt, make_rows, pad_prompts
from gpt.sampling.sampler import SamplingParams, logit_bias, sampling_params
from gpt.sampling.settings import Settings
from gpt.sampling.speculation import run_speculative_chunk
from gpt.sharding import on_mesh, platform


def chunk_size(device: str) -> int:
    """Decode steps per device call, and so between pieces of text, on this platform.

    Each call costs a GPU's host about 2 ms, during which the GPU is idle: the time of five gpt2
    steps.
    """
    return 16 if device == "cpu" else 64


def steps_ahead(device: str, chunk: int) -> int:
    """Steps that the cache must have room for before a chunk begins.

    A CPU reads all slots in each step and ends a chunk when the cache is full. An accelerator reads
    only the filled slots and runs all of a chunk's steps even if the cache is full.
    """
    return 1 if device == "cpu" else chunk


def stream(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    chunk: int | None = None,
    top: int = 0,
    hints: Sequence[Sequence[int]] | None = None,
) -> Iterator[Piece]:
    """Complete `prompts`, texts or token ids, in one batch; yield each row's text as it appears.

    `model` is a LanguageModel. `settings`: one for all prompts, or one per prompt. `chunk`: decode
    steps per device call, by default `chunk_size`; it changes no token. `top`: number of likeliest
    tokens to report at each step. `hints`: for each row, token ids that its text may resemble, for
    speculation to search too.
    Raises UserError immediately, not at the first piece, if a prompt exceeds the context or the
    settings cannot be used with this model; and later, if the context fills up and
    `on_context_full` is "error".
    """
    rows = make_rows(model, prompts, settings, top)
    windows = [row.window for row in rows if row.completion.sample == 0]
    padded = pad_prompts(windows, model.config.context_length)
    sampling = sampling_params(
        [row.settings for row in rows],
        [logit_bias(model, row.settings) for row in rows],
        [row.prompt for row in rows],
        [row.completion.sample for row in rows],
    )
    for row, hint in zip(rows, hints or [], strict=hints is not None):
        row.hint = list(hint)
    return _stream(model, rows, padded, sampling, chunk, top)


def _stream(
    model,
    rows: list[Row],
    padded: tuple[np.ndarray, np.ndarray],
    sampling: SamplingParams,
    chunk: int | None,
    top: int,
) -> Iterator[Piece]:
    """`stream` after its checks, which a generator would defer until its first piece is
    requested."""
    prefill_timer, decode_timer = Stopwatch(), Stopwatch()
    with prefill_timer, on_mesh(model.mesh):
        chunk = chunk or chunk_size(platform())
        n_ahead = steps_ahead(platform(), chunk)
        state, sampled = prefill_and_sample(model, rows, padded, sampling, top)
        found = sampled, state.cache.length_B, state.remaining_B
        sampled, length_B, remaining_B = jax.device_get(found)

    speculates = any(row.settings.speculate for row in rows)
    speculation = None
    proposed_B = accepted_B = np.zeros(len(rows), np.int32)
    recompilations = RecompilationCheck()
    while True:
        # Collect what each row has gained.
        pieces = []
        for index, row in enumerate(rows):
            if not row.has_ended:
                text = row.add(
                    sampled.tokens_BC[index],
                    sampled.logprobs_BC[index],
                    sampled.top_ids_BCK[index],
                    sampled.top_probs_BCK[index],
                )
                row.completion.prefill_seconds = prefill_timer.seconds
                row.completion.decode_seconds = decode_timer.seconds
                row.completion.proposed = int(proposed_B[index])
                row.completion.accepted = int(accepted_B[index])
                pieces.append(Piece(index, text, row.completion))
        if all(row.has_ended for row in rows):
            yield from pieces
            break

        # Decode up to `chunk` more tokens for each row that has not ended. The device works on them
        # while the previous text is yielded, so that time counts as decoding.
        with decode_timer:
            recompilations.begin()
            capacity = state.cache.capacity
            n_slots = count_slots(length_B, remaining_B, n_ahead)
            full_B = (remaining_B > 0) & (length_B >= capacity)
            must_make_room = bool(n_slots > capacity or full_B.any())
            draft_has_read = speculation is not None and speculation.draft_cache is not None
            with on_mesh(model.mesh), compilations.of(batch=len(rows)):
                state = make_room(model, state, rows, n_slots, full_B)
                if speculates:
                    state, speculation, sampled = run_speculative_chunk(
                        model, rows, state, speculation, sampling, chunk, top
                    )
                    proposed_B, accepted_B = speculation.proposed_B, speculation.accepted_B
                else:
                    active_B = np.array([not row.has_ended for row in rows])
                    with compilations.of(capacity=state.cache.capacity, top=top):
                        state, sampled = decode_chunk(
                            model.config, model.params, state, sampling, active_B, chunk, top
                        )
            found = sampled, state.cache.length_B, state.remaining_B, proposed_B, accepted_B
            shape = capacity, must_make_room, draft_has_read, sampled.tokens_BC.shape
            recompilations.end(shape, state.cache.capacity)
            yield from pieces
            sampled, length_B, remaining_B, proposed_B, accepted_B = jax.device_get(found)

    for row in rows:
        require(
            row.settings.on_context_full != "error" or row.completion.finish_reason != "context",
            f"the context of {model.config.context_length} tokens is full: expected the text to "
            "end within it; ask for fewer tokens, or choose auto or stop",
        )


def complete(
    model, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings], **options
) -> list[Completion]:
    """Run `stream` to the end; return the completions in row order. `options`: as in `stream`."""
    completions = {}
    for piece in stream(model, prompts, settings, **options):
        completions[piece.row] = piece.completion
    return [completions[row] for row in sorted(completions)]


# Prefill, and room in the cache between chunks.


def prefill_and_sample(
    model,
    rows: Sequence[Row],
    padded: tuple[np.ndarray, np.ndarray],
    sampling: SamplingParams,
    top: int,
) -> tuple[DecodeState, SampledTokens]:
    """Read each prompt once and sample each row's first token."""
    config = model.config
    tokens_BT, n_B = padded
    with compilations.of(batch=len(n_B), bucket=tokens_BT.shape[1]):
        cache, logits_BV = engine.prefill_in_pieces(config, model.params, tokens_BT, n_B)
    # A prompt's samples are consecutive rows.
    prompt_of_row = np.cumsum([row.completion.sample == 0 for row in rows]) - 1
    if len(rows) > len(n_B):
        cache, logits_BV = engine.fork(cache, logits_BV, prompt_of_row)

    seen_BV = np.zeros((len(rows), config.vocab_size), bool)
    for index, row in enumerate(rows):
        seen_BV[index, row.prompt.ids] = True
    n_prompt_B = np.array([len(row.prompt.ids) for row in rows], np.int32)
    remaining_B = np.array([min(row.settings.max_new_tokens, row.room) for row in rows], np.int32)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(len(rows), jnp.int32),
        remaining_B=jnp.asarray(remaining_B),
        seen_BV=jnp.asarray(seen_BV),
        dropped_B=jnp.asarray(n_prompt_B - n_B[prompt_of_row]),
        end_ids=jnp.array(model.special_ids.ends, jnp.int32),
    )
    with compilations.of(batch=len(rows), top=top):
        return start_decoding(state, logits_BV, sampling, top)


def count_slots(length_B: np.ndarray, remaining_B: np.ndarray, n_steps: int) -> int:
    """Cache slots needed for the next `n_steps` steps: enough for the row that will be longest,
    counting only tokens that it may still gain; 0 if all rows are done."""
    gained_B = np.minimum(remaining_B, n_steps)
    return int(np.max(np.where(gained_B > 0, length_B + gained_B, 0)))


def make_room(
    model, state: DecodeState, rows: Sequence[Row], n_slots: int, full_B: np.ndarray
) -> DecodeState:
    """Make room for each row's next token: grow the cache to `n_slots`, but at most to the context,
    and reset rows that have filled it, `full_B`, to its last half."""
    config = model.config
    if state.cache.capacity < min(n_slots, config.context_length):
        return grow(config, state, n_slots)
    if not full_B.any():
        return state

    kept = config.context_length // 2
    windows = []
    for row, is_full in zip(rows, full_B, strict=True):
        ids = row.prompt.ids + row.completion.token_ids
        windows.append(ids[-kept - 1 : -1] if is_full else [])
    tokens_BT, _ = pad_prompts(windows, config.context_length)
    with compilations.of(bucket=tokens_BT.shape[1], capacity=state.cache.capacity):
        return reread(config, model.params, state, tokens_BT, full_B, kept)


def grow(config: ModelConfig, state: DecodeState, n_slots: int) -> DecodeState:
    """Grow the cache to at least `n_slots`, up to the context."""
    capacity = engine.bucket(min(n_slots, config.context_length), config.context_length)
    with compilations.of(capacity=capacity):
        return replace(state, cache=engine.grow(state.cache, capacity))
