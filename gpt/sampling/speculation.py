"""Speculative decoding: several tokens per pass over the weights, with exactly the same text.

A decode step reads all weights to sample one token per row; sampling five in the same pass takes
little longer. So proposed tokens are read together with the last one, and the model samples a token
after each. Proposals are kept up to the first that differs from the sampled token, which is kept in
its place. Proposals are looked up in the text so far, or sampled by a draft, a smaller model with
the same tokenizer. With three proposals, two of them right:

    text so far         a b c d e f . . . a b c            "a b c" occurred before
    proposed                                    d e f
    read in one step                          c d e f
    sampled after each                          d e x y
    kept                                        d e x      three tokens in one pass

The token sampled at a position depends only on the text before it, the seed, the sample and the
position, so a proposal is accepted exactly when plain decoding would have sampled it. (Up to
rounding: a step that reads several tokens adds the same numbers in another order.)

The draft samples with the model's settings and noise, so when both find the same tokens likely,
they sample the same ones. Its cache holds the same tokens as the model's, slot by slot.

Reading a proposal that is then rejected wastes time. So every row tracks how often its proposals
are right, whether they are read or not, and none are read while they would cost more time than they
save.
Shape letters are defined in gpt/model/transformer.py; C as in decode_loop.py; N proposals,
T = N + 1 tokens read, R tokens of text searched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt import flops
from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.sampling import decode_loop, engine, sampler
from gpt.sampling.completion import NO_TOKEN, Row
from gpt.sampling.decode_loop import DecodeState, SampledTokens
from gpt.sampling.sampler import SamplingParams
from gpt.sharding import platform

LONGEST_MATCH = 4  # latest tokens of the text to match; longer matches count as this long
NEWEST_WEIGHT = 1 / 16  # of the newest token in the moving average `agreement_B`
IDLE_GAIN = 1 / 1024  # added to a draft's agreement at each step in which it does not run
N_JUDGED = 16  # last tokens of the prompt, to initialize `agreement_B`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculation:
    """State of the proposals, kept on the device from one chunk to the next.

    `text_BR`: each row's last R tokens, prompt included, newest on the right; NO_TOKEN before the
    first. `limit_B`: maximum proposals per step. `agreement_B`: the share of recent tokens that
    were or would have been proposed, as a moving average. `proposed_B`, `accepted_B`: how many
    proposals were read, and how many were right. `draft_cache`: the draft's keys and values; None
    without a draft and while it does not run.
    """

    text_BR: jax.Array
    limit_B: jax.Array
    agreement_B: jax.Array
    proposed_B: jax.Array
    accepted_B: jax.Array
    draft_cache: kv.KVCache | None = None


class ChunkShape(NamedTuple):
    """What a chunk is compiled for: `size` steps, `n_proposals` per step, the `top` likeliest
    tokens to report, and the draft that proposes (None: look proposals up in the text)."""

    size: int
    n_proposals: int
    top: int
    draft: ModelConfig | None


# On the host: how much to propose.


def run_speculative_chunk(
    model,
    rows: Sequence[Row],
    state: DecodeState,
    speculation: Speculation | None,
    sampling: SamplingParams,
    chunk: int,
    top: int,
) -> tuple[DecodeState, Speculation, SampledTokens]:
    """Run up to `chunk` steps for the rows that have not ended, with proposals if they should pay.
    `state` and `speculation` (None for the first chunk) are consumed."""
    limit_B = np.array([row.settings.speculate for row in rows], np.int32)
    active_B = np.array([not row.has_ended for row in rows])
    if speculation is None:
        R = model.config.context_length + max(len(row.hint) for row in rows)
        text_BR = np.full((len(rows), R), NO_TOKEN, np.int32)
        for b, row in enumerate(rows):
            text = (row.hint + row.prompt.ids + row.completion.token_ids)[-R:]
            text_BR[b, R - len(text) :] = text
        speculation = start_speculation(
            state.remaining_B, text_BR, limit_B, model.draft is not None
        )

    draft = model.draft
    draft_config = None if draft is None else draft.config
    draft_params = None if draft is None else draft.params
    draft_cost = cost_of_draft(draft_config, model.config)
    agreement_B = np.asarray(speculation.agreement_B)
    n_proposals = choose_n_proposals(limit_B * active_B, agreement_B, draft_cost)
    # An accelerator runs all of a chunk's steps, even if no row needs them, so run only as many as
    # gain `chunk` tokens when all proposals are right.
    if platform() != "cpu":
        chunk = max(chunk // (n_proposals + 1), 1)

    with compilations.of(capacity=state.cache.capacity, top=top, proposals=n_proposals):
        if draft is not None and n_proposals == 0:
            # The draft does not run. Whether it would have been right is unknown, so it is tried
            # again later.
            state, sampled = decode_loop.decode_chunk(
                model.config, model.params, state, sampling, active_B, chunk, top
            )
            agreement_B = speculation.agreement_B + IDLE_GAIN * chunk
            return state, replace(speculation, agreement_B=agreement_B, draft_cache=None), sampled

        draft_cache = None
        if draft is not None:
            draft_cache = catch_up_draft(draft, speculation.draft_cache, rows, state)
        return speculate_chunk(
            model.config,
            (model.params, draft_params),
            state,
            replace(speculation, draft_cache=draft_cache),
            sampling,
            active_B,
            ChunkShape(chunk, n_proposals, top, draft_config),
        )


def catch_up_draft(
    draft, cache: kv.KVCache | None, rows: Sequence[Row], state: DecodeState
) -> kv.KVCache:
    """The draft's cache before a chunk, with as many slots as the model's and the same tokens. The
    draft rereads them at the start, after a slide and after chunks without proposals."""
    length_B = np.asarray(state.cache.length_B)
    active_B = np.array([not row.has_ended for row in rows])
    if cache is not None and np.all((np.asarray(cache.length_B) == length_B)[active_B]):
        if cache.capacity < state.cache.capacity:
            cache = engine.grow(cache, state.cache.capacity)
        return cache

    tokens_BT = np.zeros((len(rows), state.cache.capacity), np.int32)
    for b, (row, n) in enumerate(zip(rows, length_B, strict=True)):
        # The last token is not cached yet. A row that has ended may have fewer than its cache.
        ids = (row.prompt.ids + row.completion.token_ids)[-n - 1 : -1]
        tokens_BT[b, : len(ids)] = ids
    cache, _ = engine.prefill_in_pieces(draft.config, draft.params, tokens_BT, length_B)
    return cache


def cost_of_draft(draft: ModelConfig | None, model: ModelConfig) -> float:
    """The time of a draft step as a fraction of a plain model step."""
    if draft is None:
        return 0.0
    share_of_bytes = flops.weight_bytes(draft) / flops.weight_bytes(model)
    if platform() == "cpu":
        return share_of_bytes
    # A small model's step takes as long as launching its kernels, of which each layer has the same
    # number.
    return max(share_of_bytes, draft.n_layers / model.n_layers)


def choose_n_proposals(
    limit_B: np.ndarray, agreement_B: np.ndarray, draft_cost: float = 0.0
) -> int:
    """Proposals to read per step: the largest row limit, or 0 if they would not pay.

    `limit_B`: 0 for rows that have ended. `draft_cost`: see `cost_of_draft`.
    """
    N = int(limit_B.max())
    if N == 0 or not proposals_pay(np, N, limit_B, agreement_B, draft_cost):
        return 0
    return N


def proposals_pay(numpy, N: int, limit_B, agreement_B, draft_cost: float):
    """Whether steps with `N` proposals would save more time than they cost. `numpy`: NumPy on the
    host, jax.numpy in a program."""
    is_on_B = limit_B > 0
    n_rows = numpy.sum(is_on_B)
    # If each proposal is right with probability p, a step gains 1 + p + ... + p^N tokens.
    is_allowed_BN = np.arange(N) < limit_B[:, None]
    gain_B = numpy.sum(is_allowed_BN * agreement_B[:, None] ** np.arange(1, N + 1), axis=1)
    if platform() == "cpu":
        # Each token read takes time to compute, and the row that gains least waits longest for its
        # text, so that row decides. The cost, in plain steps, was measured with small models; large
        # ones cost less.
        gain = numpy.min(numpy.where(is_on_B, gain_B, np.inf))
        cost = 1.5 + n_rows * N / 16
    else:
        # A step takes as long as reading the weights, however many tokens it reads, plus a few more
        # kernel launches: expected for gpt2 on an H100, see docs/sampling.md.
        gain = numpy.sum(gain_B) / n_rows
        cost = 1.2
    return 1 + gain > cost + (N + 1) * draft_cost


# On the device: proposals, and which of them to keep.


@partial(jax.jit, static_argnames="has_draft")
def start_speculation(
    remaining_B: jax.Array, text_BR: jax.Array, limit_B: jax.Array, has_draft: bool
) -> Speculation:
    """The state before the first chunk. `agreement_B` is the share of the text's last N_JUDGED
    tokens that would have been proposed, or 1 for a draft, which is trusted until it is tried."""
    # Computed from the state, so that it is placed on the devices like the state: otherwise the
    # second chunk, which takes the result of the first, would recompile.
    limit_B = jnp.where(remaining_B > 0, limit_B, 0)
    R = text_BR.shape[1]

    def agrees(age: jax.Array) -> jax.Array:
        """Whether the token `age` places from the right end would have been proposed."""
        is_earlier_R = jnp.arange(R) >= age
        earlier_BR = jnp.where(is_earlier_R, jnp.roll(text_BR, age, axis=1), NO_TOKEN)
        token_B = jnp.take(text_BR, R - age, axis=1)
        return (look_up(earlier_BR, 1)[:, 0] == token_B) & (token_B != NO_TOKEN)

    ages = jnp.arange(1, min(N_JUDGED, R) + 1)
    agreement_B = jnp.mean(jax.lax.map(agrees, ages), axis=0, dtype=jnp.float32)
    if has_draft:
        agreement_B = jnp.ones_like(agreement_B)
    none_B = jnp.zeros_like(limit_B)
    speculation = Speculation(text_BR, limit_B, agreement_B, none_B, none_B)
    return decode_loop.constrain_rows(speculation)


def look_up(text_BR: jax.Array, n: int) -> jax.Array:
    """proposals_BN: the `n` tokens that followed an earlier occurrence of the text's last tokens;
    NO_TOKEN in a row whose last token is new.

    The longest match wins, and among equally long ones the latest. If fewer than `n` tokens follow
    it, the text is assumed to repeat with the same period.
    """
    R = text_BR.shape[1]
    # At each place, how many tokens up to it equal the last ones of the text.
    n_equal_BR = jnp.zeros_like(text_BR)
    is_equal_BR = text_BR != NO_TOKEN
    for age in range(min(LONGEST_MATCH, R)):
        shifted_BR = jnp.pad(text_BR[:, : R - age], [(0, 0), (age, 0)], constant_values=NO_TOKEN)
        is_equal_BR &= shifted_BR == text_BR[:, R - 1 - age][:, None]
        n_equal_BR += is_equal_BR
    places_R = jnp.arange(R)
    n_equal_BR = jnp.where(places_R < R - 1, n_equal_BR, 0)  # the end itself does not count

    # One number orders places by match length, then by lateness: finding the largest is several
    # times faster than argmax on a CPU.
    best_B1 = jnp.max(n_equal_BR * R + places_R, axis=-1, keepdims=True)
    longest_B1, place_B1 = jnp.divmod(best_B1, R)
    period_B1 = jnp.maximum(R - 1 - place_B1, 1)
    place_BN = place_B1 + 1 + jnp.arange(n) % period_B1
    return jnp.where(longest_B1 > 0, jnp.take_along_axis(text_BR, place_BN, axis=-1), NO_TOKEN)


def propose_by_draft(
    config: ModelConfig,
    params: dict,
    cache: kv.KVCache,
    state: DecodeState,
    sampling: SamplingParams,
    n: int,
) -> tuple[jax.Array, kv.KVCache]:
    """proposals_BN, sampled by the draft after each row's last token, and the draft's cache.

    The draft reads the last proposal too, in case the model keeps it. The caller sets the cache
    lengths once it knows what was kept.
    """
    running_B = decode_loop.find_running_rows(state)

    def step(carry, _):
        cache, token_B, seen_BV = carry
        cache, logits_BV = engine.decode_step(config, params, cache, token_B, running_B)
        position_B = cache.length_B + state.dropped_B
        token_B = sampler.sample(logits_BV, sampling, seen_BV, position_B)
        return (cache, token_B, decode_loop.mark_seen(seen_BV, token_B)), token_B

    start = cache, state.token_B, state.seen_BV
    (cache, _, _), drawn_TB = jax.lax.scan(step, start, length=n + 1)
    return drawn_TB[:n].T, cache


@partial(
    jax.jit,
    static_argnames=("config", "shape"),
    donate_argnames=("state", "speculation"),
)
def speculate_chunk(
    config: ModelConfig,
    weights: tuple[dict, dict | None],
    state: DecodeState,
    speculation: Speculation,
    sampling: SamplingParams,
    active_B: jax.Array,
    shape: ChunkShape,
) -> tuple[DecodeState, Speculation, SampledTokens]:
    """Like `decode_chunk`, but each step reads `n_proposals`, and a row gains at most one token
    more than that. With 0 and no draft, it decodes plainly and counts how many proposals would have
    been right. `weights`: the model's and the draft's. `state` and `speculation` are consumed."""
    params, draft_params = weights
    size, n_proposals, top, draft_config = shape
    state = replace(state, remaining_B=jnp.where(active_B, state.remaining_B, 0))

    def step(state: DecodeState, speculation: Speculation):
        # Propose. A plain step looks up one token to count whether it would have been right.
        draft_cache = speculation.draft_cache
        if draft_config is None:
            proposals_BN = look_up(speculation.text_BR, max(n_proposals, 1))
        else:
            proposals_BN, draft_cache = propose_by_draft(
                draft_config, draft_params, draft_cache, state, sampling, n_proposals
            )
        is_allowed_BN = jnp.arange(proposals_BN.shape[1]) < speculation.limit_B[:, None]
        proposals_BN = jnp.where(is_allowed_BN, proposals_BN, NO_TOKEN)

        # Read and sample.
        if n_proposals == 0:
            state, new = decode_loop.decode_and_sample(config, params, state, sampling, top)
        else:
            state, new = read_and_accept(config, params, state, sampling, proposals_BN, top)
        if draft_cache is not None:
            draft_cache = replace(draft_cache, length_B=state.cache.length_B)

        # Keep count.
        speculation = replace(
            count_right(speculation, proposals_BN, new.tokens_BC),
            text_BR=append(speculation.text_BR, new.tokens_BC),
            draft_cache=draft_cache,
        )
        return state, speculation, new

    draft_cost = cost_of_draft(draft_config, config)

    def pays(state: DecodeState, speculation: Speculation):
        """If not, the rest of the chunk is left to the program that reads no proposals."""
        if n_proposals == 0:
            return True
        limit_B = jnp.where(state.remaining_B > 0, speculation.limit_B, 0)
        return proposals_pay(jnp, n_proposals, limit_B, speculation.agreement_B, draft_cost)

    state, speculation, sampled = decode_loop.run_steps(
        step, state, speculation, size, width=n_proposals + 1, top=top, pays=pays
    )
    return decode_loop.constrain_state(state), decode_loop.constrain_rows(speculation), sampled


def read_and_accept(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    sampling: SamplingParams,
    proposals_BN: jax.Array,
    top: int,
) -> tuple[DecodeState, SampledTokens]:
    """Read each row's last token and proposals in one step; return the tokens each row gains, in T
    columns. A proposal of NO_TOKEN is never right."""
    running_B = decode_loop.find_running_rows(state)
    read_BT = jnp.concatenate([state.token_B[:, None], jnp.maximum(proposals_BN, 0)], axis=1)
    B, T = read_BT.shape
    model = transformer.bind(config, params)
    x_BTD, cache = model.hidden(read_BT, state.cache)
    logits_MV = model.unembed(x_BTD).reshape(B * T, -1)

    # Sample after each one as if all before it were right: at its position, after its text.
    seen_BV = state.seen_BV
    seen_TBV = [seen_BV]
    for proposal_B in read_BT[:, 1:].T:
        seen_BV = decode_loop.mark_seen(seen_BV, proposal_B)
        seen_TBV.append(seen_BV)
    position_BT = cache.length_B[:, None] + state.dropped_B[:, None] + 1 + jnp.arange(T)
    drawn_M = sampler.sample(
        logits_MV,
        jax.tree.map(lambda setting_B: jnp.repeat(setting_B, T, axis=0), sampling),
        jnp.stack(seen_TBV, axis=1).reshape(logits_MV.shape),
        position_BT.reshape(B * T),
    )
    drawn_BT = drawn_M.reshape(B, T)

    # Keep sampled tokens up to the first that differs from its proposal, the last token that the
    # row may have, or the last slot of the cache.
    is_right_BN = drawn_BT[:, :-1] == proposals_BN
    goes_on_BT = jnp.pad(is_right_BN, [(0, 0), (1, 0)], constant_values=True)  # up to each draw
    room_B = jnp.minimum(state.remaining_B, cache.capacity - cache.length_B)
    is_kept_BT = jnp.cumprod(goes_on_BT, axis=1, dtype=jnp.bool_) & running_B[:, None]
    is_kept_BT &= jnp.arange(T) < room_B[:, None]
    n_kept_B = jnp.sum(is_kept_BT, axis=1)

    # The last kept token is not yet in the cache; slots read after the others are overwritten.
    last_B = jnp.take_along_axis(drawn_BT, jnp.maximum(n_kept_B - 1, 0)[:, None], axis=1)[:, 0]
    # End-of-text may be among those kept; the host drops what follows it.
    is_end_BT = jnp.any(drawn_BT[..., None] == state.end_ids, axis=-1)
    has_ended_B = jnp.any(is_end_BT & is_kept_BT, axis=1)
    state = replace(
        state,
        cache=cache.advanced(n_kept_B),
        token_B=jnp.where(running_B, last_B, state.token_B),
        remaining_B=jnp.where(has_ended_B, 0, state.remaining_B - n_kept_B),
        seen_BV=state.seen_BV.at[jnp.arange(B)[:, None], drawn_BT].max(is_kept_BT),
    )
    sampled = decode_loop.as_sampled_tokens(logits_MV, drawn_M, top)
    sampled = jax.tree.map(lambda a: a.reshape(B, T, *a.shape[2:]), sampled)
    return state, replace(sampled, tokens_BC=jnp.where(is_kept_BT, drawn_BT, NO_TOKEN))


def count_right(
    speculation: Speculation, proposals_BN: jax.Array, tokens_BT: jax.Array
) -> Speculation:
    """Update the counts after a step in which each row gained `tokens_BT`, NO_TOKEN after its last.
    Proposals were read if a row could gain more than one token."""
    N, T = proposals_BN.shape[1], tokens_BT.shape[1]
    is_kept_BT = tokens_BT != NO_TOKEN
    is_right_BN = is_kept_BT[:, :N] & (tokens_BT[:, :N] == proposals_BN)

    agreement_B = speculation.agreement_B
    for is_kept_B, is_right_B in zip(is_kept_BT.T[:N], is_right_BN.T, strict=True):
        newer_B = (1 - NEWEST_WEIGHT) * agreement_B + NEWEST_WEIGHT * is_right_B
        agreement_B = jnp.where(is_kept_B, newer_B, agreement_B)
    speculation = replace(speculation, agreement_B=agreement_B)
    if T > 1:
        was_running_B1 = is_kept_BT[:, :1]
        was_read_BN = (proposals_BN != NO_TOKEN) & was_running_B1
        speculation = replace(
            speculation,
            proposed_B=speculation.proposed_B + jnp.sum(was_read_BN, axis=1),
            accepted_B=speculation.accepted_B + jnp.sum(is_right_BN, axis=1),
        )
    return speculation


def append(text_BR: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Each row's last R tokens after it gained `tokens_BT`, NO_TOKEN after its last."""
    n_gained_B = jnp.sum(tokens_BT != NO_TOKEN, axis=1)
    longer = jnp.concatenate([text_BR, tokens_BT], axis=1)
    slice_row = partial(jax.lax.dynamic_slice_in_dim, slice_size=text_BR.shape[1])
    return jax.vmap(slice_row)(longer, n_gained_B)
