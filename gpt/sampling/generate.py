"""The one driver: prompts in, streamed or collected completions out.

`stream` prefills, then runs chunks of decode steps on the device (loop.py); between chunks the
host hands out text, ends rows at stop strings, and grows or slides the cache. `complete` is
`stream` drained.
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
from gpt.sampling.completion import Completion, Piece
from gpt.sampling.decode_loop import Drawn, Loop, begin, decode_chunk, reread
from gpt.sampling.sampler import Draw
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import split_end
from gpt.sharding import on_mesh

CHUNK = 16  # steps between looks at the host: text appears this often
MOST = 2**31 - 1  # tokens that the device can count
Prompt = str | Sequence[int]


def read_prompt(model, prompt: Prompt) -> tuple[str, list[int], bytes]:
    """A prompt, text or token ids, as both, and the bytes of a character that it breaks off in.

    An empty one stands for end-of-text, which is how every document began.
    """
    tokenizer, V = model.tokenizer, model.config.vocab_size
    if isinstance(prompt, str):
        prompt = without_lone_surrogates(prompt)
        return prompt, tokenizer.encode_ordinary(prompt) or beginning(model), b""
    for token in prompt:
        good = isinstance(token, (int, np.integer)) and 0 <= token < V
        require(
            good, f"token id {token!r} in the prompt: expected a whole number from 0 to {V - 1}"
        )
    ids = [int(token) for token in prompt]
    text, rest = split_end(tokenizer.decode_bytes(ids))
    return text, ids or beginning(model), rest


def beginning(model) -> list[int]:
    """What an empty prompt stands for: end-of-text; UserError if the model has none."""
    eot = model.tokenizer.eot_token
    require(
        0 <= eot < model.config.vocab_size,
        "the prompt is empty, and the model has no end-of-text to start from: give at least one id",
    )
    return [eot]


def settings_of(prompts: Sequence[Prompt], settings: Settings | Sequence[Settings]):
    """One Settings for each prompt."""
    require(len(prompts) > 0, "there are no prompts: expected at least one, which may be empty")
    if isinstance(settings, Settings):
        return [settings] * len(prompts)
    n, n_prompts = len(settings), len(prompts)
    require(n == n_prompts, f"{n} settings for {n_prompts} prompts: expected one for each")
    return settings


def pad_prompts(prompts: Sequence[Sequence[int]], context_length: int, slides: bool = True):
    """Prompts as tokens_BT, padded on the right to their bucket, and their lengths n_B. UserError
    if one is too long; `slides`: whether the context could slide."""
    n_B = np.array([len(p) for p in prompts], np.int32)
    longest = int(n_B.argmax())
    more = ", or let the context slide (--on-context-full slide)" * slides
    require(
        n_B[longest] <= context_length,
        f"prompt {longest + 1} has {n_B[longest]} tokens: expected at most the model's context of "
        f"{context_length}; shorten it{more}",
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(int(n_B[longest]), context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, n_B


def row_settings(each: Sequence[Settings], vocab_size: int, eot: int) -> Draw:
    """The settings as arrays; sample s of a prompt is row s of its `num_samples` in a row."""
    rows = [(one, sample) for one in each for sample in range(one.num_samples)]
    kinds = {"seed": jnp.uint32}
    kinds |= dict.fromkeys(("repetition_penalty", "temperature", "top_p", "min_p"), jnp.float32)
    sample_B = jnp.array([sample for _, sample in rows], jnp.uint32)
    top_k_B = jnp.array([min(one.top_k, vocab_size) for one, _ in rows], jnp.int32)
    bias_BV = np.stack([bias(one, vocab_size, eot) for one, _ in rows])
    values = {name: [getattr(one, name) for one, _ in rows] for name in kinds}
    columns = {name: jnp.array(values[name], kind) for name, kind in kinds.items()}
    return Draw(jnp.asarray(bias_BV), top_k=top_k_B, sample=sample_B, **columns)


def bias(settings: Settings, vocab_size: int, eot: int) -> np.ndarray:
    """What is added to each logit: the user's bias, and end-of-text forbidden where it is so.
    UserError if this leaves no token."""
    bias_V = np.zeros(vocab_size, np.float32)
    for token, value in settings.logit_bias.items():
        good = 0 <= token < vocab_size
        require(good, f"logit_bias names token {token}: expected 0 to {vocab_size - 1}")
        bias_V[token] = min(max(value, MASKED), -MASKED)
    if settings.ignore_eos and 0 <= eot < vocab_size:
        bias_V[eot] = MASKED
    some = bias_V.max() > MASKED
    require(some, "logit_bias forbids every token: expected one that may follow")
    return bias_V


def require_room(model, each: Sequence[Settings], lengths: Sequence[int], width: int) -> None:
    """UserError if what rows of `each`, or beams of `width` texts, after prompts of so many tokens
    may come to need is more than there is: keys and values (of the last token none are kept), and
    of each token in the vocabulary bias, logit and mark."""
    c, V = model.config, model.config.vocab_size
    require(width * V <= MOST, f"a beam of {width:,} texts: expected at most {MOST // V:,}")
    rows = sum(one.num_samples for one in each) * width
    longest = max(n + one.max_new_tokens - 1 for n, one in zip(lengths, each, strict=True))
    slots = engine.bucket(min(longest, c.context_length), c.context_length)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    need = weights + flops.cache_bytes(c, rows, slots) + 9 * rows * V
    have, whose = hardware.memory()
    devices = model.mesh.size if model.mesh else 1
    require(
        need <= have * devices,
        f"{rows:,} rows of {slots:,} tokens take {need / 1e9:,.1f} GB with the weights, and "
        f"{whose} is {have * devices / 1e9:,.1f} GB: ask for fewer samples, beams or prompts",
    )


def require_usable(model, each: Sequence[Settings], top: int = 0) -> None:
    """UserError if this model could follow no prompt by settings such as `each`."""
    V, C = model.config.vocab_size, model.config.context_length
    require(0 <= top <= V, f"show_probs is {top}: expected 0 to {V}, the tokens that there are")
    for one in each:
        bias(one, V, model.tokenizer.eot_token)
        good = one.on_context_full != "slide" or C > 1
        require(good, "a context of one token cannot slide: choose stop")
    require_room(model, each, [1] * len(each), width=1)


def blank_rows(
    model, prompts: Sequence[Prompt], each: Sequence[Settings], width: int = 1
) -> list[Completion]:
    """A completion with nothing drawn yet for each sample of each prompt; `width` as for beams.
    UserError if they do not fit in memory."""
    read = [read_prompt(model, prompt) for prompt in prompts]
    require_room(model, each, [len(ids) for _, ids, _ in read], width)
    return [
        Completion.blank(model, text, ids, sample, one, rest)
        for (text, ids, rest), one in zip(read, each, strict=True)
        for sample in range(one.num_samples)
    ]


def start(model, done: Sequence[Completion], each: Sequence[Settings], rows: Draw, top: int):
    """The prompts read, each once, and a first token drawn for each row: the loop, and Drawn."""
    config, C = model.config, model.config.context_length
    row_B = np.repeat(np.arange(len(each)), [one.num_samples for one in each])
    firsts = [done[int(np.argmax(row_B == prompt))] for prompt in range(len(each))]
    slides = [one.on_context_full == "slide" for one in each]
    windows = [
        row.prompt_ids[-C:] if slide else row.prompt_ids
        for row, slide in zip(firsts, slides, strict=True)
    ]
    tokens_BT, n_B = pad_prompts(windows, C)
    with compilations.of(batch=len(each), bucket=tokens_BT.shape[1]):
        cache, logits_BV = engine.read(config, model.params, tokens_BT, n_B)
    if len(done) > len(each):
        cache, logits_BV = engine.fork(cache, logits_BV, row_B)
    seen_BV = np.zeros((len(done), config.vocab_size), bool)
    for row, completion in enumerate(done):
        seen_BV[row, completion.prompt_ids] = True
    dropped_B = np.array([len(one.prompt_ids) for one in done], np.int32) - n_B[row_B]
    left_B = np.array([min(one.most, one.allowed, MOST) for one in done], np.int32)
    eot = model.tokenizer.eot_token
    with compilations.of(batch=len(done), capacity=cache.capacity, top=top):
        return begin(cache, logits_BV, rows, left_B, jnp.asarray(seen_BV), dropped_B, eot, top)


def with_room(config: ModelConfig, loop: Loop) -> Loop:
    """The loop, its cache of the next size (up to the context) if a running row has filled it."""
    if not filled(loop).any() or loop.cache.capacity == config.context_length:
        return loop
    capacity = engine.bucket(loop.cache.capacity + 1, config.context_length)
    with compilations.of(capacity=capacity):
        return replace(loop, cache=engine.grow(loop.cache, capacity))


def filled(loop: Loop) -> np.ndarray:
    """Which running rows have filled the cache."""
    return (np.asarray(loop.left_B) > 0) & (np.asarray(loop.cache.length_B) >= loop.cache.capacity)


def slide(model, loop: Loop, done: Sequence[Completion]) -> Loop:
    """The loop, rows that have filled the context set back to the last half of what they read."""
    full_B, kept = filled(loop), model.config.context_length // 2
    if not full_B.any():
        return loop
    windows = [
        (one.prompt_ids + one.token_ids)[-kept - 1 : -1] if full else []
        for one, full in zip(done, full_B, strict=True)
    ]
    tokens_BT, _ = pad_prompts(windows, model.config.context_length)
    with compilations.of(bucket=tokens_BT.shape[1], capacity=loop.cache.capacity):
        return reread(model.config, model.params, loop, tokens_BT, full_B, kept)


def advance(model, loop: Loop, rows: Draw, done: Sequence[Completion], chunk: int, top: int):
    """Up to `chunk` more tokens for each row that has not ended: the loop, and Drawn."""
    loop = slide(model, with_room(model.config, loop), done)
    going_B = np.array([not completion.finish_reason for completion in done])
    eot = model.tokenizer.eot_token
    with compilations.of(capacity=loop.cache.capacity, top=top):
        loop, drawn = decode_chunk(model.config, model.params, loop, rows, going_B, eot, chunk, top)
    return loop, jax.device_get(drawn)


def record(done: Completion, drawn: Drawn, row: int, watches: Sequence[Stopwatch]) -> str:
    """Note what the device drew for one row, and when; the text that it gained."""
    done.prefill_seconds, done.decode_seconds = (watch.seconds for watch in watches)
    ids_CK, probs_CK = np.asarray(drawn.top_BCK[row]), np.asarray(drawn.top_probs_BCK[row])
    top = [
        list(zip(ids_K.tolist(), probs_K.tolist(), strict=True))
        for ids_K, probs_K in zip(ids_CK, probs_CK, strict=True)
    ]
    return done.record(np.asarray(drawn.tokens_BC[row]), np.asarray(drawn.logprobs_BC[row]), top)


def stream(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    chunk: int = CHUNK,
    top: int = 0,
) -> Iterator[Piece]:
    """Complete `prompts` (texts or token ids) together, handing out each row's text as it comes.

    `model` has `config`, `params` (unstacked), `tokenizer` and `mesh` (or None). `settings`: for
    all prompts or one for each. `chunk`: steps between looks at the host; it changes no token.
    `top`: likeliest tokens to note at each step. UserError if a prompt exceeds the context, or the
    text does where the settings say that this is an error.
    """
    each = settings_of(prompts, settings)
    require_usable(model, each, top)
    done = blank_rows(model, prompts, each)
    rows = row_settings(each, model.config.vocab_size, model.tokenizer.eot_token)
    watches = prefilling, decoding = Stopwatch(), Stopwatch()
    with prefilling, on_mesh(model.mesh):
        loop, drawn = start(model, done, each, rows, top)
        drawn = jax.device_get(drawn)
    steady: set[tuple[int, bool]] = set()
    while running := [row for row, completion in enumerate(done) if not completion.finish_reason]:
        for row in running:
            yield Piece(row, record(done[row], drawn, row, watches), done[row])
        if any(not completion.finish_reason for completion in done):
            shapes, before = (loop.cache.capacity, bool(filled(loop).any())), decoding.programs
            with decoding, on_mesh(model.mesh), compilations.of(batch=len(done)):
                loop, drawn = advance(model, loop, rows, done, chunk, top)
            guard(shapes, steady, decoding.programs - before)
    require_end(model, done, each)


def require_end(model, done: Sequence[Completion], each: Sequence[Settings]) -> None:
    """UserError if a text that must end within the context did not. Others have ended by now."""
    fails = [one.on_context_full == "error" for one in each for _ in range(one.num_samples)]
    require(
        not any(f and one.finish_reason == "context" for f, one in zip(fails, done, strict=True)),
        f"the context of {model.config.context_length} tokens is full: expected the text to end "
        f"within it; ask for fewer tokens, or choose stop or slide",
    )


def guard(shapes: tuple[int, bool], steady: set, programs: int) -> None:
    """Warn if a chunk in shapes (capacity, filled or not) that have been seen compiled something
    (invariant 3)."""
    if shapes in steady and programs:
        warnings.warn(
            f"{programs} programs were compiled in the middle of decoding at an unchanged shape "
            f"(capacity {shapes[0]}): this costs time and should not happen; please report it",
            stacklevel=3,
        )
    steady.add(shapes)


def complete(
    model, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings], top: int = 0
) -> list[Completion]:
    """`stream` drained: the finished completions, row by row."""
    rows = {piece.row: piece.completion for piece in stream(model, prompts, settings, top=top)}
    return [rows[row] for row in sorted(rows)]
