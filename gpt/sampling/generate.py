"""The one driver of generation: prompts in, completions out, streamed or collected.

`stream` reads the prompts (prefill), then runs chunks of decode steps on the device
(decode_loop.py). Between chunks the host hands out text, ends rows at stop strings, and grows or
slides the cache. `complete` is `stream` drained.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from gpt import flops, hardware
from gpt.compile_log import Stopwatch, compilations
from gpt.config import ModelConfig
from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require
from gpt.model.attention import MASKED
from gpt.sampling import engine
from gpt.sampling.completion import Completion, Piece, PromptTokens, Row
from gpt.sampling.decode_loop import (
    DecodeState,
    SampledTokens,
    decode_chunk,
    reread,
    start_decoding,
)
from gpt.sampling.sampler import SamplingParams
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import split_end
from gpt.sharding import on_mesh

CHUNK = 16  # decode steps between looks at the host: text appears this often
MAX_INT32 = 2**31 - 1
Prompt = str | Sequence[int]


def stream(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    chunk: int = CHUNK,
    top: int = 0,
) -> Iterator[Piece]:
    """Complete `prompts`, texts or token ids, together; hand out each row's text as it appears.

    `model` has `config`, `params` (unstacked), `tokenizer` and `mesh` (or None). `settings`: for
    all prompts, or one for each. `chunk`: decode steps between looks at the host; it changes no
    token. `top`: likeliest tokens to report at each step. Raises UserError here, not at the first
    piece, if a prompt exceeds the context or the settings cannot be used with this model; and
    later, if the text exceeds the context where the settings say that this is an error.
    """
    settings = settings_per_prompt(prompts, settings)
    require_usable(model, settings, top)
    rows = make_rows(model, prompts, settings)
    sampling = sampling_params(settings, model.config.vocab_size, model.tokenizer.eot_token)
    batch = pad_prompts(windows_to_read(model, rows, settings), model.config.context_length)
    return _stream(model, rows, settings, sampling, batch, chunk, top)


def _stream(model, rows, settings, sampling, batch, chunk, top) -> Iterator[Piece]:
    prefill_timer, decode_timer = Stopwatch(), Stopwatch()
    with prefill_timer, on_mesh(model.mesh):
        state, sampled = start(model, rows, settings, sampling, batch, top)
        sampled = jax.device_get(sampled)

    shapes_seen = set()
    while True:
        for index, row in enumerate(rows):
            if not row.has_ended:
                text = add_sampled(row, sampled, index)
                row.completion.prefill_seconds = prefill_timer.seconds
                row.completion.decode_seconds = decode_timer.seconds
                yield Piece(index, text, row.completion)
        if all(row.has_ended for row in rows):
            break

        shape = state.cache.capacity, bool(has_filled_cache(state).any())
        n_programs = decode_timer.programs
        with decode_timer, on_mesh(model.mesh), compilations.of(batch=len(rows)):
            state, sampled = advance(model, state, sampling, rows, chunk, top)
        if shape in shapes_seen:
            warn_of_recompilation(state.cache.capacity, decode_timer.programs - n_programs)
        shapes_seen.add(shape)
    require_ends_in_context(model, rows, settings)


def complete(
    model, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings], top: int = 0
) -> list[Completion]:
    """`stream` drained: the finished completions, row by row."""
    completions = {}
    for piece in stream(model, prompts, settings, top=top):
        completions[piece.row] = piece.completion
    return [completions[row] for row in sorted(completions)]


# Before the device is used: prompts, settings, room.


def settings_per_prompt(
    prompts: Sequence[Prompt], settings: Settings | Sequence[Settings]
) -> Sequence[Settings]:
    """One Settings for each prompt."""
    require(len(prompts) > 0, "there are no prompts: expected at least one, which may be empty")
    if isinstance(settings, Settings):
        return [settings] * len(prompts)
    require(
        len(settings) == len(prompts),
        f"{len(settings)} settings for {len(prompts)} prompts: expected one for each",
    )
    return settings


def require_usable(model, settings: Sequence[Settings], top: int = 0) -> None:
    """Raise UserError if this model cannot complete any prompt with these settings."""
    vocab_size = model.config.vocab_size
    require(
        0 <= top <= vocab_size,
        f"show_probs is {top}: expected 0 to {vocab_size}, the size of the vocabulary",
    )
    for one in settings:
        logit_bias(one, vocab_size, model.tokenizer.eot_token)
        require(
            one.on_context_full != "slide" or model.config.context_length > 1,
            "a context of one token cannot slide: choose stop",
        )
    require_room(model, settings, [1] * len(settings))


def make_rows(
    model, prompts: Sequence[Prompt], settings: Sequence[Settings], beam_width: int = 1
) -> list[Row]:
    """A row for each sample of each prompt, with nothing generated yet. Raises UserError if they do
    not fit in memory; `beam_width`: texts that beam search follows for each row."""
    read = [read_prompt(model, prompt) for prompt in prompts]
    require_room(model, settings, [len(prompt.ids) for prompt in read], beam_width)
    rows = []
    for prompt, one in zip(read, settings, strict=True):
        for sample in range(one.num_samples):
            rows.append(Row(model, prompt, sample, one))
    return rows


def read_prompt(model, prompt: Prompt) -> PromptTokens:
    """A prompt, text or token ids, as both. An empty one stands for end-of-text, with which every
    document began."""
    tokenizer, vocab_size = model.tokenizer, model.config.vocab_size
    if isinstance(prompt, str):
        text, unfinished = without_lone_surrogates(prompt), b""
        ids = tokenizer.encode_ordinary(text)
    else:
        for token in prompt:
            require(
                isinstance(token, (int, np.integer)) and 0 <= token < vocab_size,
                f"token id {token!r} in the prompt: expected an integer from 0 to {vocab_size - 1}",
            )
        ids = [int(token) for token in prompt]
        text, unfinished = split_end(tokenizer.decode_bytes(ids))
    if not ids:
        require(
            0 <= tokenizer.eot_token < vocab_size,
            "the prompt is empty, and the model has no end-of-text to start from: give at least "
            "one id",
        )
        ids = [tokenizer.eot_token]
    return PromptTokens(text, ids, unfinished)


def windows_to_read(
    model, rows: Sequence[Row], settings: Sequence[Settings]
) -> list[Sequence[int]]:
    """The tokens of each prompt that are read: the last of them, where the context may slide."""
    windows = []
    first_row = 0
    for one in settings:
        ids = rows[first_row].completion.prompt_ids
        if one.on_context_full == "slide":
            ids = ids[-model.config.context_length :]
        windows.append(ids)
        first_row += one.num_samples
    return windows


def pad_prompts(
    prompts: Sequence[Sequence[int]], context_length: int, may_slide: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens_BT, padded on the right to their bucket, and their lengths n_B.

    Raises UserError if one is too long; `may_slide`: whether to advise to let the context slide.
    """
    n_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(n_B.argmax())
    advice = ", or let the context slide (--on-context-full slide)" if may_slide else ""
    require(
        n_B[longest] <= context_length,
        f"prompt {longest + 1} has {n_B[longest]} tokens, which exceeds the model's context of "
        f"{context_length}: shorten it{advice}",
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(int(n_B[longest]), context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, n_B


def sampling_params(settings: Sequence[Settings], vocab_size: int, eot: int) -> SamplingParams:
    """The settings as arrays; the samples of a prompt are consecutive rows."""
    rows = [(one, sample) for one in settings for sample in range(one.num_samples)]

    def column(name: str, dtype) -> jax.Array:
        return jnp.array([getattr(one, name) for one, _ in rows], dtype)

    return SamplingParams(
        bias_BV=jnp.asarray(np.stack([logit_bias(one, vocab_size, eot) for one, _ in rows])),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        temperature=column("temperature", jnp.float32),
        top_k=jnp.array([min(one.top_k, vocab_size) for one, _ in rows], jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        seed=column("seed", jnp.uint32),
        sample=jnp.array([sample for _, sample in rows], jnp.uint32),
    )


def logit_bias(settings: Settings, vocab_size: int, eot: int) -> np.ndarray:
    """What is added to each logit: the user's bias, and a mask on end-of-text if it is ignored.
    Raises UserError if this leaves no token."""
    bias_V = np.zeros(vocab_size, np.float32)
    for token, value in settings.logit_bias.items():
        require(
            0 <= token < vocab_size,
            f"logit_bias names token {token}: expected 0 to {vocab_size - 1}",
        )
        bias_V[token] = min(max(value, MASKED), -MASKED)
    if settings.ignore_eos and 0 <= eot < vocab_size:
        bias_V[eot] = MASKED
    require(bias_V.max() > MASKED, "logit_bias forbids every token: expected one that may follow")
    return bias_V


def require_room(
    model, settings: Sequence[Settings], n_prompt_tokens: Sequence[int], beam_width: int = 1
) -> None:
    """Raise UserError if weights, KV cache and per-token buffers of these requests exceed the
    memory of a device."""
    config, vocab_size = model.config, model.config.vocab_size
    require(
        beam_width * vocab_size <= MAX_INT32,
        f"a beam of {beam_width:,} texts: expected at most {MAX_INT32 // vocab_size:,}",
    )
    n_rows = sum(one.num_samples for one in settings) * beam_width
    # Keys and values of the last token are not kept.
    longest = max(
        n + one.max_new_tokens - 1 for n, one in zip(n_prompt_tokens, settings, strict=True)
    )
    slots = engine.bucket(min(longest, config.context_length), config.context_length)
    # Per row and token of the vocabulary: bias, logit, and whether it was seen.
    shared = flops.cache_bytes(config, n_rows, slots) + 9 * n_rows * vocab_size
    n_devices = model.mesh.size if model.mesh else 1
    need = weight_bytes_on_device(model.params) + shared // n_devices
    have, source = hardware.memory()
    require(
        need <= have,
        f"{n_rows:,} rows of {slots:,} tokens take {need / 1e9:,.1f} GB with the weights, and "
        f"{source} is {have / 1e9:,.1f} GB: ask for fewer samples, beams or prompts",
    )


def weight_bytes_on_device(params: dict) -> int:
    """Bytes of the weights on the first of their devices: its part of those that are split, and the
    whole of those that are not."""
    total = 0
    for leaf in jax.tree.leaves(params):
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


# On the device: prefill, then chunk after chunk.


def start(
    model, rows: Sequence[Row], settings: Sequence[Settings], sampling, batch, top: int
) -> tuple[DecodeState, SampledTokens]:
    """Read each prompt once, and sample the first token of each row. `batch`: see pad_prompts."""
    config = model.config
    tokens_BT, n_B = batch
    with compilations.of(batch=len(n_B), bucket=tokens_BT.shape[1]):
        cache, logits_BV = engine.read(config, model.params, tokens_BT, n_B)
    prompt_of_row = np.repeat(np.arange(len(n_B)), [one.num_samples for one in settings])
    if len(rows) > len(n_B):
        cache, logits_BV = engine.fork(cache, logits_BV, prompt_of_row)

    seen_BV = np.zeros((len(rows), config.vocab_size), bool)
    for index, row in enumerate(rows):
        seen_BV[index, row.completion.prompt_ids] = True
    n_prompt_B = np.array([len(row.completion.prompt_ids) for row in rows], np.int32)
    remaining_B = np.array([min(row.max_tokens, row.room, MAX_INT32) for row in rows], np.int32)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(len(rows), jnp.int32),
        remaining_B=jnp.asarray(remaining_B),
        seen_BV=jnp.asarray(seen_BV),
        dropped_B=jnp.asarray(n_prompt_B - n_B[prompt_of_row]),
        eot=jnp.int32(model.tokenizer.eot_token),
    )
    with compilations.of(batch=len(rows), capacity=cache.capacity, top=top):
        return start_decoding(state, logits_BV, sampling, top)


def advance(
    model, state: DecodeState, sampling, rows: Sequence[Row], chunk: int, top: int
) -> tuple[DecodeState, SampledTokens]:
    """Up to `chunk` more tokens for each row that has not ended."""
    state = slide_full_rows(model, grow_if_full(model.config, state), rows)
    active_B = np.array([not row.has_ended for row in rows])
    with compilations.of(capacity=state.cache.capacity, top=top):
        state, sampled = decode_chunk(
            model.config, model.params, state, sampling, active_B, chunk, top
        )
    return state, jax.device_get(sampled)


def has_filled_cache(state: DecodeState) -> np.ndarray:
    """Which running rows have filled the cache, bool [B]."""
    running_B = np.asarray(state.remaining_B) > 0
    return running_B & (np.asarray(state.cache.length_B) >= state.cache.capacity)


def grow_if_full(config: ModelConfig, state: DecodeState) -> DecodeState:
    """The state with a cache of the next size, up to the context, if a row has filled it."""
    capacity = state.cache.capacity
    if capacity == config.context_length or not has_filled_cache(state).any():
        return state
    capacity = engine.bucket(capacity + 1, config.context_length)
    with compilations.of(capacity=capacity):
        return replace(state, cache=engine.grow(state.cache, capacity))


def slide_full_rows(model, state: DecodeState, rows: Sequence[Row]) -> DecodeState:
    """The state with each row that has filled the context set back to the last half of it."""
    full_B = has_filled_cache(state)
    if not full_B.any():
        return state
    kept = model.config.context_length // 2
    windows = []
    for row, is_full in zip(rows, full_B, strict=True):
        ids = row.completion.prompt_ids + row.completion.token_ids
        windows.append(ids[-kept - 1 : -1] if is_full else [])
    tokens_BT, _ = pad_prompts(windows, model.config.context_length)
    with compilations.of(bucket=tokens_BT.shape[1], capacity=state.cache.capacity):
        return reread(model.config, model.params, state, tokens_BT, full_B, kept)


def add_sampled(row: Row, sampled: SampledTokens, index: int) -> str:
    """Add what row `index` of the batch has gained; returns the text."""
    top = []
    for ids_K, probs_K in zip(
        sampled.top_ids_BCK[index], sampled.top_probs_BCK[index], strict=True
    ):
        top.append(list(zip(ids_K.tolist(), probs_K.tolist(), strict=True)))
    return row.add(sampled.tokens_BC[index], sampled.logprobs_BC[index], top)


def warn_of_recompilation(capacity: int, n_programs: int) -> None:
    """Warn if a chunk has compiled something though its shape was seen before."""
    if n_programs:
        warnings.warn(
            f"{n_programs} programs were compiled in the middle of decoding at an unchanged shape "
            f"(capacity {capacity}): this costs time and should not happen; please report it",
            stacklevel=3,
        )


def require_ends_in_context(model, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
    """Raise UserError if a text filled the context whose settings say that this is an error."""
    per_row = [one for one in settings for _ in range(one.num_samples)]
    for row, one in zip(rows, per_row, strict=True):
        require(
            one.on_context_full != "error" or row.completion.finish_reason != "context",
            f"the context of {model.config.context_length} tokens is full: expected the text to "
            "end within it; ask for fewer tokens, or choose stop or slide",
        )
