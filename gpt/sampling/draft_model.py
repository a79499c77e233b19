"""Proposals by a draft: a smaller model with the same tokenizer, which runs ahead of the model.

It draws with the settings and the noise of the model, so where both find the same tokens likely it
draws the same ones. Its cache holds the tokens that the model's holds, slot by slot.
Shape letters: see speculation.py.
"""

from collections.abc import Sequence

import jax
import numpy as np

from gpt.config import ModelConfig
from gpt.data import tokenizers
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.sampling import decode_loop, engine, sampler
from gpt.sampling.completion import Row
from gpt.sampling.decode_loop import DecodeState
from gpt.sampling.sampler import SamplingParams


def require_usable(model, draft) -> None:
    """UserError unless `draft` can propose tokens to `model`, both as `gpt.load` returns them."""
    require(
        tokenizers.to_json(model.tokenizer) == tokenizers.to_json(draft.tokenizer),
        "the draft has a different tokenizer: expected a model with the same one, such as a "
        "smaller model trained on the same data",
    )
    wanted, found = model.config.context_length, draft.config.context_length
    require(
        found >= wanted,
        f"the draft has a context of {found} tokens: expected at least the model's, {wanted}",
    )


def catch_up(
    draft, cache: kv.KVCache | None, rows: Sequence[Row], state: DecodeState
) -> kv.KVCache:
    """The draft's cache before a chunk: with as many slots as the model's, and the same tokens.
    The draft reads them again at the start, after a slide, and after chunks without proposals."""
    length_B = np.asarray(state.cache.length_B)
    active_B = np.array([not row.has_ended for row in rows])
    if cache is not None and np.all((np.asarray(cache.length_B) == length_B)[active_B]):
        if cache.capacity < state.cache.capacity:
            cache = engine.grow(cache, state.cache.capacity)
        return cache

    tokens_BT = np.zeros((len(rows), state.cache.capacity), np.int32)
    for b, (row, n) in enumerate(zip(rows, length_B, strict=True)):
        # The last token is in no cache yet. A row that has ended may have fewer than its cache.
        ids = (row.prompt.ids + row.completion.token_ids)[-n - 1 : -1]
        tokens_BT[b, : len(ids)] = ids
    cache, _ = engine.prefill_in_pieces(draft.config, draft.params, tokens_BT, length_B)
    return cache


def propose(
    config: ModelConfig,
    params: dict,
    cache: kv.KVCache,
    state: DecodeState,
    sampling: SamplingParams,
    n: int,
) -> tuple[jax.Array, kv.KVCache]:
    """proposals_BN, what the draft draws after the last token of each row, and its cache.

    It reads the last proposal too, in case the model keeps it. The caller sets the lengths of
    the cache when it knows what has been kept.
    """
    running_B = (state.remaining_B > 0) & ~decode_loop.find_full_rows(state)

    def step(carry, _):
        cache, token_B, seen_BV = carry
        cache, logits_BV = engine.decode_step(config, params, cache, token_B, running_B)
        position_B = cache.length_B + state.dropped_B
        token_B = sampler.sample(logits_BV, sampling, seen_BV, position_B)
        return (cache, token_B, decode_loop.mark_seen(seen_BV, token_B)), token_B

    start = cache, state.token_B, state.seen_BV
    (cache, _, _), drawn_TB = jax.lax.scan(step, start, length=n + 1)
    return drawn_TB[:n].T, cache
