"""Turn prompts into token ids and rows of a batch, checked before the device is used.

Shape letters are defined in gpt/model/transformer.py.
"""

from collections.abc import Sequence

import jax
import numpy as np
from rich import filesize

from gpt import flops, hardware
from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require
from gpt.sampling import engine
from gpt.sampling.completion import PromptTokens, Row, split_end
from gpt.sampling.settings import Settings
from gpt.wording import counted

Prompt = str | Sequence[int]


def make_rows(
    model,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings],
    top: int = 0,
    beam_width: int = 1,
) -> list[Row]:
    """Make an empty row for each sample of each prompt, grouped by prompt.

    Raises UserError if this model cannot complete them on this machine. `beam_width`: live texts
    per row in beam search.
    """
    require(len(prompts) > 0, "no prompts were given: expected at least one, which may be empty")
    if isinstance(settings, Settings):
        settings = [settings] * len(prompts)
    require(
        len(settings) == len(prompts),
        f"{len(settings)} settings for {len(prompts)} prompts: expected one for each",
    )
    config = model.config
    require(
        0 <= top <= config.vocab_size,
        f"show_probs is {top}: expected 0 to {config.vocab_size}, the size of the vocabulary",
    )
    for one in settings:
        require(
            one.on_context_full != "slide" or config.context_length > 1,
            "a context of one token cannot slide: choose stop",
        )
    read = [read_prompt(model, prompt) for prompt in prompts]

    # The last token's keys and values are not kept.
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


def read_prompt(model, prompt: Prompt) -> PromptTokens:
    """A prompt (text or token ids) as both, preceded by what `model.prefix` puts before it."""
    own_ids = to_ids(model, prompt)
    if isinstance(prompt, str):
        text, unfinished = without_lone_surrogates(prompt), b""
    else:
        text, unfinished = split_end(model.tokenizer.decode_bytes(own_ids))
    are_ids = len(own_ids) > 0 and not isinstance(prompt, str)
    before = model.special_ids.prefix(model.prefix, are_ids, is_needed=not own_ids)
    require(
        bool(before or own_ids),
        "the prompt is empty, and no end-of-text precedes it: give at least one token",
    )
    return PromptTokens(text, own_ids, before + own_ids, unfinished)


def to_ids(model, text: Prompt) -> list[int]:
    """The ids of a text, or the ids given instead; UserError if one does not exist."""
    if isinstance(text, str):
        return model.tokenizer.encode_ordinary(without_lone_surrogates(text))
    vocab_size = model.config.vocab_size
    for token in text:
        require(
            isinstance(token, (int, np.integer)) and 0 <= token < vocab_size,
            f"token id {token!r} does not exist: expected an integer from 0 to {vocab_size - 1}",
        )
    return [int(token) for token in text]


def pad_prompts(
    prompts: Sequence[Sequence[int]], context_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, n_B): the prompts, right-padded to their bucket, and their lengths. UserError if
    one is too long."""
    n_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(n_B.argmax())
    require(
        n_B[longest] <= context_length,
        f"prompt {longest + 1} has {n_B[longest]} tokens, which exceeds the model's context of "
        f"{context_length}: shorten it, or sample with on_context_full slide",
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(int(n_B[longest]), context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, n_B


def require_room(model, n_rows: int, longest: int, n_read: int = 1) -> None:
    """Raise UserError if weights, KV cache and per-token buffers for `n_rows` of up to `longest`
    tokens exceed a device's memory. `n_read`: tokens read per row in a step."""
    config = model.config
    slots = engine.bucket(min(longest, config.context_length), config.context_length)
    # Per token read and vocabulary entry: bias, logit, and whether it was seen.
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
    """Raise UserError if the weights plus a device's part of `shared` bytes exceed its memory."""
    weights = 0  # on the first device: its part of split arrays, plus all of the others
    draft_params = None if model.draft is None else model.draft.params
    for leaf in jax.tree.leaves((model.params, draft_params)):
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
        weights += int(np.prod(shape)) * leaf.dtype.itemsize
    n_devices = model.mesh.size if model.mesh else 1
    need = weights + shared // n_devices
    have, source = hardware.memory()
    require(
        need <= have,
        f"{what} take {filesize.decimal(need)} with the weights, but {source} is "
        f"{filesize.decimal(have)}: {advice}",
    )
