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
from rich import filesize

from gpt import flops, hardware
from gpt.compile_log import Stopwatch, compilations
from gpt.config import ModelConfig
from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require
from gpt.model.attention import MASKED
from gpt.sampling import engine, sampler
from gpt.sampling import speculation as speculating
from gpt.sampling.completion import Completion, Piece, PromptTokens, Row, split_end
from gpt.sampling.decode_loop import (
    DecodeState,
    SampledTokens,
    decode_chunk,
    find_full_rows,
    reread,
    start_decoding,
)
from gpt.sampling.sampler import SamplingParams
from gpt.sampling.settings import Settings
from gpt.sharding import on_mesh, platform
from gpt.wording import counted

CHUNK = 16  # decode steps per call of the device: text appears this often
MAX_INT32 = 2**31 - 1
Prompt = str | Sequence[int]


def stream(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    chunk: int = CHUNK,
    top: int = 0,
    hints: Sequence[Sequence[int]] | None = None,
) -> Iterator[Piece]:
    """Complete `prompts`, texts or token ids, together; hand out each row's text as it appears.

    `model` is a LanguageModel. `settings`: for all prompts, or one for each. `chunk`: decode steps
    per call of the device; it changes no token. `top`: likeliest tokens to report at each step.
    `hints`: for each row, token ids that its text may resemble; speculation looks through them
    too.
    Raises UserError here, not at the first piece, if a prompt exceeds the context or the settings
    cannot be used with this model; and later, if the text exceeds the context where the settings
    say that this is an error.
    """
    rows = make_rows(model, prompts, settings, top)
    windows = [row.window for row in rows if row.completion.sample == 0]
    batch = pad_prompts(windows, model.config.context_length)
    sampling = sampling_params(
        [row.settings for row in rows],
        [logit_bias(model, row.settings) for row in rows],
        [row.prompt for row in rows],
        [row.completion.sample for row in rows],
    )
    for row, hint in zip(rows, hints or [], strict=hints is not None):
        row.hint = list(hint)
    return _stream(model, rows, sampling, batch, chunk, top)


def _stream(
    model, rows: list[Row], sampling: SamplingParams, batch: tuple, chunk: int, top: int
) -> Iterator[Piece]:
    prefill_timer, decode_timer = Stopwatch(), Stopwatch()
    with prefill_timer, on_mesh(model.mesh):
        state, sampled = start(model, rows, sampling, batch, top)
        sampled, full_B = jax.device_get((sampled, find_full_rows(state)))

    speculates = any(row.settings.speculate for row in rows)
    speculation = None
    record = None
    shapes_seen = set()
    while True:
        # What each row has gained.
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
                if record is not None:
                    row.completion.proposed = int(record.proposed_B[index])
                    row.completion.accepted = int(record.accepted_B[index])
                pieces.append(Piece(index, text, row.completion))
        if all(row.has_ended for row in rows):
            yield from pieces
            break

        # Up to `chunk` more tokens for each row that has not ended. The device is at work on them
        # while the text of the last ones is handed out, so that counts as time of decoding.
        with decode_timer:
            capacity, any_full = state.cache.capacity, bool(full_B.any())
            draft_has_read = speculation is not None and speculation.draft_cache is not None
            n_programs = compilations.programs
            with on_mesh(model.mesh), compilations.of(batch=len(rows)):
                state = make_room(model, state, rows, full_B)
                if speculates:
                    state, speculation, sampled = speculating.run_chunk(
                        model, rows, state, speculation, sampling, chunk, top
                    )
                else:
                    active_B = np.array([not row.has_ended for row in rows])
                    with compilations.of(capacity=state.cache.capacity, top=top):
                        state, sampled = decode_chunk(
                            model.config, model.params, state, sampling, active_B, chunk, top
                        )
                record = speculation.record if speculates else None
                found = sampled, find_full_rows(state), record
            shape = capacity, any_full, draft_has_read, sampled.tokens_BC.shape
            if shape in shapes_seen and compilations.programs > n_programs:
                warnings.warn(
                    f"a program was compiled in the middle of decoding at an unchanged shape "
                    f"(capacity {state.cache.capacity}): this costs time and should not happen; "
                    "please report it",
                    stacklevel=2,
                )
            shapes_seen.add(shape)
            yield from pieces
            sampled, full_B, record = jax.device_get(found)

    for row in rows:
        require(
            row.settings.on_context_full != "error" or row.completion.finish_reason != "context",
            f"the context of {model.config.context_length} tokens is full: expected the text to "
            "end within it; ask for fewer tokens, or choose auto or stop",
        )


def complete(
    model, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings], **options
) -> list[Completion]:
    """`stream` drained: the finished completions, row by row. `options`: those of `stream`."""
    completions = {}
    for piece in stream(model, prompts, settings, **options):
        completions[piece.row] = piece.completion
    return [completions[row] for row in sorted(completions)]


# Before the device is used: prompts, settings, room.


def make_rows(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    top: int = 0,
    beam_width: int = 1,
) -> list[Row]:
    """A row for each sample of each prompt, with nothing generated yet, those of a prompt together.

    Raises UserError unless they can be completed by this model on this machine. `beam_width`: texts
    that beam search follows for each row.
    """
    require(len(prompts) > 0, "there are no prompts: expected at least one, which may be empty")
    if isinstance(settings, Settings):
        settings = [settings] * len(prompts)
    require(
        len(settings) == len(prompts),
        f"{len(settings)} settings for {len(prompts)} prompts: expected one for each",
    )
    require_usable(model, settings, top)
    read = [read_prompt(model, prompt) for prompt in prompts]

    # Keys and values of the last token are not kept.
    pairs = list(zip(read, settings, strict=True))
    longest = max(len(prompt.ids) + one.max_new_tokens - 1 for prompt, one in pairs)
    n_rows = sum(one.num_samples for one in settings) * beam_width
    n_read = 1 + max(one.speculate for one in settings)
    require_room(model, n_rows, longest, n_read)
    return [
        Row(model, prompt, sample, one)
        for prompt, one in pairs
        for sample in range(one.num_samples)
    ]


def require_usable(model, settings: Sequence[Settings], top: int = 0) -> None:
    """Raise UserError if this model cannot complete any prompt with these settings."""
    config = model.config
    require(
        0 <= top <= config.vocab_size,
        f"show_probs is {top}: expected 0 to {config.vocab_size}, the size of the vocabulary",
    )
    for one in settings:
        logit_bias(model, one)
        require(
            one.on_context_full != "slide" or config.context_length > 1,
            "a context of one token cannot slide: choose stop",
        )
    require_room(model, sum(one.num_samples for one in settings), longest=1)


def read_prompt(model, prompt: Prompt) -> PromptTokens:
    """A prompt, text or token ids, as both, after what stands before it (`model.prefix`)."""
    tokenizer, vocab_size = model.tokenizer, model.config.vocab_size
    if isinstance(prompt, str):
        text, unfinished = without_lone_surrogates(prompt), b""
        own_ids = tokenizer.encode_ordinary(text)
    else:
        for token in prompt:
            require(
                isinstance(token, (int, np.integer)) and 0 <= token < vocab_size,
                f"token id {token!r} in the prompt: expected an integer from 0 to {vocab_size - 1}",
            )
        own_ids = [int(token) for token in prompt]
        text, unfinished = split_end(tokenizer.decode_bytes(own_ids))
    are_ids = len(own_ids) > 0 and not isinstance(prompt, str)
    before = model.special_ids.prefix(model.prefix, are_ids, is_needed=not own_ids)
    require(
        bool(before or own_ids),
        "the prompt is empty, and no end-of-text stands before it: give at least one token",
    )
    return PromptTokens(text, own_ids, before + own_ids, unfinished)


def pad_prompts(
    prompts: Sequence[Sequence[int]], context_length: int, may_slide: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens_BT, padded on the right to their bucket, and their lengths n_B.

    Raises UserError if one is too long; `may_slide`: whether to advise to let the context slide.
    """
    n_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(n_B.argmax())
    advice = ", or let the context slide (on_context_full slide)" if may_slide else ""
    require(
        n_B[longest] <= context_length,
        f"prompt {longest + 1} has {n_B[longest]} tokens, which exceeds the model's context of "
        f"{context_length}: shorten it{advice}",
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(int(n_B[longest]), context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, n_B


def sampling_params(
    settings: Sequence[Settings],
    bias_BV: Sequence[np.ndarray],
    prompts: Sequence[PromptTokens] | None = None,
    samples: Sequence[int] | None = None,
) -> SamplingParams:
    """The settings of each row as arrays. `bias_BV`: see logit_bias. The numbers of the `samples`
    and the ids of the `prompts` enter the noise: without the latter all prompts of one length would
    share one random number per step."""

    def column(name: str, dtype) -> jax.Array:
        return jnp.array([getattr(one, name) for one in settings], dtype)

    seed = column("seed", jnp.uint32)
    if prompts is not None:
        seed ^= jnp.array([prompt.checksum for prompt in prompts], jnp.uint32)
    vocab_size = len(bias_BV[0])
    params = SamplingParams(
        bias_BV=jnp.asarray(np.stack(bias_BV)),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        temperature=column("temperature", jnp.float32),
        top_k=jnp.array([min(one.top_k, vocab_size) for one in settings], jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        seed=seed,
        sample=jnp.array(samples or [0] * len(settings), jnp.uint32),
    )
    # A CPU finds out while it decodes which steps are needed, and so has one program for all.
    return params if platform() == "cpu" else sampler.with_known_stages(params)


def logit_bias(model, settings: Settings) -> np.ndarray:
    """What is added to each logit: the user's bias, and a mask on ids without a token, and on those
    that end a text if they are ignored. Raises UserError if this leaves no token."""
    vocab_size = model.config.vocab_size
    bias_V = np.zeros(vocab_size, np.float32)
    for token, value in settings.logit_bias.items():
        require(
            0 <= token < vocab_size,
            f"logit_bias names token {token}: expected 0 to {vocab_size - 1}",
        )
        bias_V[token] = min(max(value, MASKED), -MASKED)
    bias_V[list(model.special_ids.unused)] = MASKED
    if settings.ignore_eos:
        bias_V[list(model.special_ids.ends)] = MASKED
    require(bias_V.max() > MASKED, "logit_bias forbids every token: expected one that may follow")
    return bias_V


def require_room(model, n_rows: int, longest: int, n_read: int = 1) -> None:
    """Raise UserError if weights, KV cache and per-token buffers of `n_rows` of up to `longest`
    tokens exceed the memory of a device. `n_read`: tokens of a row that a step reads."""
    config = model.config
    slots = engine.bucket(min(longest, config.context_length), config.context_length)
    # Per token read and token of the vocabulary: bias, logit, and whether it was seen.
    shared = flops.cache_bytes(config, n_rows, slots) + 9 * n_rows * n_read * config.vocab_size
    if model.draft is not None:
        shared += flops.cache_bytes(model.draft.config, n_rows, slots)
    require_memory(
        model,
        shared,
        f"{counted(n_rows, 'row')} of {slots:,} tokens",
        "ask for fewer samples, beams or prompts",
    )


def require_memory(model, shared: int, what: str, advice: str) -> None:
    """Raise UserError if the weights, and `shared` bytes that all devices hold together, exceed the
    memory of a device."""
    weights = 0  # on the first device: its part of those that are split, the whole of the others
    draft_params = None if model.draft is None else model.draft.params
    for leaf in jax.tree.leaves((model.params, draft_params)):
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
        weights += int(np.prod(shape)) * leaf.dtype.itemsize
    n_devices = model.mesh.size if model.mesh else 1
    need = weights + shared // n_devices
    have, source = hardware.memory()
    require(
        need <= have,
        f"{what} take {filesize.decimal(need)} with the weights, and {source} is "
        f"{filesize.decimal(have)}: {advice}",
    )


# On the device: prefill, then chunk after chunk.


def start(
    model, rows: Sequence[Row], sampling: SamplingParams, batch: tuple, top: int
) -> tuple[DecodeState, SampledTokens]:
    """Read each prompt once, and sample the first token of each row. `batch`: see pad_prompts."""
    config = model.config
    tokens_BT, n_B = batch
    with compilations.of(batch=len(n_B), bucket=tokens_BT.shape[1]):
        cache, logits_BV = engine.prefill_in_pieces(config, model.params, tokens_BT, n_B)
    # The samples of a prompt are consecutive rows.
    prompt_of_row = np.cumsum([row.completion.sample == 0 for row in rows]) - 1
    if len(rows) > len(n_B):
        cache, logits_BV = engine.fork(cache, logits_BV, prompt_of_row)

    seen_BV = np.zeros((len(rows), config.vocab_size), bool)
    for index, row in enumerate(rows):
        seen_BV[index, row.prompt.ids] = True
    n_prompt_B = np.array([len(row.prompt.ids) for row in rows], np.int32)
    remaining_B = np.array([min(row.max_tokens, row.room, MAX_INT32) for row in rows], np.int32)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(len(rows), jnp.int32),
        remaining_B=jnp.asarray(remaining_B),
        seen_BV=jnp.asarray(seen_BV),
        dropped_B=jnp.asarray(n_prompt_B - n_B[prompt_of_row]),
        eot=jnp.array(model.special_ids.ends, jnp.int32),
    )
    with compilations.of(batch=len(rows), top=top):
        return start_decoding(state, logits_BV, sampling, top)


def make_room(model, state: DecodeState, rows: Sequence[Row], full_B: np.ndarray) -> DecodeState:
    """The state with room for the next token of each row, of which `full_B` have filled the cache:
    the cache grows up to the context, and then these rows slide."""
    if not full_B.any():
        return state
    if state.cache.capacity < model.config.context_length:
        return grow(model.config, state)
    return slide(model, state, rows, full_B)


def grow(config: ModelConfig, state: DecodeState) -> DecodeState:
    """The state with a cache of the next size, up to the context."""
    capacity = engine.bucket(state.cache.capacity + 1, config.context_length)
    with compilations.of(capacity=capacity):
        return replace(state, cache=engine.grow(state.cache, capacity))


def slide(model, state: DecodeState, rows: Sequence[Row], full_B: np.ndarray) -> DecodeState:
    """The state with the rows that have filled the context set back to the last half of it."""
    kept = model.config.context_length // 2
    windows = []
    for row, is_full in zip(rows, full_B, strict=True):
        ids = row.prompt.ids + row.completion.token_ids
        windows.append(ids[-kept - 1 : -1] if is_full else [])
    tokens_BT, _ = pad_prompts(windows, model.config.context_length)
    with compilations.of(bucket=tokens_BT.shape[1], capacity=state.cache.capacity):
        return reread(model.config, model.params, state, tokens_BT, full_B, kept)
