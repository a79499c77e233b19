"""Beam search: the likeliest texts, found by extending several at once on the device.

Each prompt has `width` live texts, one cache row each, and a pool of the `width` best ended texts.
A step scores all continuations of the live texts. Of the `2 * width` likeliest (more if several ids
end a text), those that end and are among the first `width` move to the pool, and the first `width`
that do not end stay live, so that endings do not crowd out live texts.

A text's score is the sum of the log-probabilities used in the search (the model's own unless bias,
penalty or `ignore_eos` changed them), divided by length ** length_penalty. The length counts the
generated tokens, including end-of-text, as in Hugging Face transformers (generation/utils.py,
`_update_finished_beams`).

Shape letters are defined in gpt/model/transformer.py; P prompts, W width, C candidates; S is also
the maximum length of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gpt.compile_log import Stopwatch, compilations
from gpt.config import ModelConfig
from gpt.errors import positive, require
from gpt.model import kv_cache as kv
from gpt.model.attention import MASKED
from gpt.sampling import engine, sampler
from gpt.sampling.completion import Completion, Row
from gpt.sampling.prompts import Prompt, make_rows, pad_prompts
from gpt.sampling.sampler import SamplingParams
from gpt.sampling.settings import Settings
from gpt.sharding import on_mesh

CHUNK = 64  # steps per device call; Ctrl-C is noticed between calls
FORBIDDEN = MASKED * 1e-6  # adjusted logits below this mark forbidden tokens


@dataclass(frozen=True)
class BeamSettings:
    """Settings of a beam search.

    `early_stopping` sets when a prompt's search ends, as in Hugging Face transformers. True: as
    soon as `width` texts have ended; a width of 1 is then greedy decoding. False: when `width`
    texts have ended and the best live one, if it ended now, would not beat the worst of them; a
    longer text may still have scored better if `length_penalty` is above 0. "never": when no live
    text can still become one of the `n_best`. This is exact: a text's summed log-probability only
    falls as the text grows, so it bounds the sums of all continuations; divided by the length that
    favours it most (the longest allowed if `length_penalty` is above 0, else the next) it bounds
    their scores. A positive penalty makes this bound loose and the search long.
    """

    width: int = 4
    """Live texts per prompt. The only setting that recompiles when changed."""
    n_best: int = 1
    """Texts returned per prompt."""
    length_penalty: float = 1.0
    """Divide a text's summed log-probability by its length to this power (above 0: favour long)."""
    early_stopping: bool | Literal["never"] = False
    """When to stop; see above."""
    max_new_tokens: int = 200  # this and the rest as in Settings
    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self):
        require(
            self.early_stopping in (True, False, "never"),
            f'early_stopping is {self.early_stopping!r}: expected True, False or "never"',
        )
        positive("width", self.width)
        positive("n_best", self.n_best)
        require(
            self.n_best <= self.width,
            f"n_best is {self.n_best}: it must not exceed the width, {self.width}",
        )
        # In this range, powers of any length stay far from the limits of float32.
        require(
            -5 <= self.length_penalty <= 5,
            f"length_penalty is {self.length_penalty}: expected a number from -5 to 5",
        )
        self.as_settings()

    def as_settings(self) -> Settings:
        """The settings shared with sampling, validated by `Settings`."""
        return Settings(
            on_context_full="stop",
            temperature=0,
            max_new_tokens=self.max_new_tokens,
            logit_bias=self.logit_bias,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Each prompt's W or C generated texts, best first.

    `value_PW`: a live text's summed log-probability, or an ended text's score; -inf if there is no
    text. `logprobs_PWS`: the model's own. Entries past the end of a text are meaningless.
    """

    value_PW: jax.Array
    tokens_PWS: jax.Array
    logprobs_PWS: jax.Array

    def best(self, n: int) -> tuple["Texts", jax.Array]:
        """The `n` texts of largest value, with ties kept in order, and their indices."""
        value_PW, index_PW = jax.lax.top_k(self.value_PW, n)
        tokens_PWS, logprobs_PWS = pick((self.tokens_PWS, self.logprobs_PWS), index_PW)
        return Texts(value_PW, tokens_PWS, logprobs_PWS), index_PW


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """The search settings, traced. `max_tokens_P`: maximum tokens per text. `sampling` has one row,
    shared by all texts."""

    max_tokens_P: jax.Array
    sampling: SamplingParams
    end_ids: jax.Array
    length_penalty: jax.Array
    n_best: jax.Array
    stops_early: jax.Array
    is_exact: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchState:
    """State kept on the device. Each live text has `n_tokens`, the last not yet in the cache.

    Row p * W + w of the cache and of `seen_BV` (tokens in prompt or text) is live text w of
    prompt p. A prompt without live texts is done.
    """

    cache: kv.KVCache
    seen_BV: jax.Array
    live: Texts
    ended: Texts
    n_tokens: jax.Array

    @property
    def running_P(self) -> jax.Array:
        """Prompts that are not done. One with NaN keeps running, so that the result shows it."""
        return self.live.value_PW[:, 0] != -jnp.inf

    @property
    def running_B(self) -> jax.Array:
        """The same, per cache row."""
        return jnp.repeat(self.running_P, self.live.value_PW.shape[1])


def search(model, prompts: Sequence[Prompt], settings: BeamSettings) -> list[list[Completion]]:
    """Find the `n_best` likeliest texts for each prompt (text or token ids), best first; or
    as many as exist. Each one's times are those of the whole search.

    `model`: as in `generate.stream`. Raises UserError if a prompt exceeds the context, every token
    is forbidden, or the model's output is NaN.
    """
    rows = make_rows(model, prompts, settings.as_settings(), beam_width=settings.width)
    prefill_timer, decode_timer = Stopwatch(), Stopwatch()
    sizes = {"prompts": len(rows), "width": settings.width}

    with prefill_timer, on_mesh(model.mesh), compilations.of(**sizes):
        state, rules = start_search(model, rows, settings)
    with decode_timer, on_mesh(model.mesh), compilations.of(**sizes):
        while np.any(state.running_P):
            with compilations.of(capacity=state.cache.capacity):
                state = search_chunk(model.config, model.params, state, rules, CHUNK)
        ended = jax.device_get(state.ended)

    # Each prompt's best `n_best` ended texts, or all if there are fewer.
    found = []
    for p, row in enumerate(rows):
        n = min(settings.n_best, np.sum(ended.value_PW[p] != -np.inf))
        require(n > 0, "logit_bias forbids every token: leave at least one allowed")
        found.append([])
        for rank in range(n):
            text = Row(model, row.prompt, rank, row.settings)
            text.add(ended.tokens_PWS[p, rank], ended.logprobs_PWS[p, rank])
            text.completion.score = float(ended.value_PW[p, rank])
            text.completion.prefill_seconds = prefill_timer.seconds
            text.completion.decode_seconds = decode_timer.seconds
            found[-1].append(text.completion)
    return found


def start_search(model, rows: Sequence[Row], settings: BeamSettings) -> tuple[SearchState, Rules]:
    """Read each prompt once and find the first tokens of its texts."""
    config = model.config
    shared = settings.as_settings()
    rules = Rules(
        max_tokens_P=np.array([min(settings.max_new_tokens, row.room) for row in rows], np.int32),
        sampling=sampler.sampling_params([shared], [sampler.logit_bias(model, shared)]),
        end_ids=np.array(model.special_ids.ends, np.int32),
        length_penalty=float(settings.length_penalty),
        n_best=settings.n_best,
        stops_early=settings.early_stopping is True,
        is_exact=settings.early_stopping == "never",
    )
    prompts = [row.prompt.ids for row in rows]
    tokens_PT, n_P = pad_prompts(prompts, config.context_length)
    with compilations.of(bucket=tokens_PT.shape[1]):
        cache, logits_PV = engine.prefill_in_pieces(config, model.params, tokens_PT, n_P)
    longest = int((n_P + rules.max_tokens_P).max()) - 1  # the last token of a text is not read
    cache = engine.grow(cache, engine.bucket(longest, config.context_length))
    seen_PV = np.zeros(logits_PV.shape, bool)
    for p, prompt in enumerate(prompts):
        seen_PV[p, prompt] = True
    with compilations.of(capacity=cache.capacity):
        state = begin(cache, logits_PV, seen_PV, rules, settings.width)
        return jax.block_until_ready(state), rules


@partial(jax.jit, static_argnames="width")
def begin(cache: kv.KVCache, logits_PV, seen_PV, rules: Rules, width: int) -> SearchState:
    """The search state after the first token, from a prefill shared by each prompt's texts."""
    P, W, S = len(logits_PV), width, cache.capacity
    cache, logits_BV = engine.fork(cache, logits_PV, jnp.repeat(jnp.arange(P), W))
    tokens_PWS = jnp.zeros((P, W, S), jnp.int32)
    logprobs_PWS = jnp.zeros((P, W, S))
    none = Texts(jnp.full((P, W), -jnp.inf), tokens_PWS, logprobs_PWS)
    # Start with one live text, empty: several would all have the same continuations.
    live = replace(none, value_PW=none.value_PW.at[:, 0].set(0.0))
    seen_BV = jnp.repeat(seen_PV, W, axis=0)
    return advance(SearchState(cache, seen_BV, live, none, jnp.int32(0)), logits_BV, rules)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def search_chunk(
    config: ModelConfig, params: dict, state: SearchState, rules: Rules, size
) -> SearchState:
    """Continue the search for up to `size` tokens, until every prompt is done."""

    def goes_on(carry):
        i, state = carry
        return (i < size) & jnp.any(state.running_P)

    def step(carry):
        i, state = carry
        token_B = state.live.tokens_PWS[:, :, state.n_tokens - 1].reshape(-1)
        cache, logits_BV = engine.decode_step(config, params, state.cache, token_B, state.running_B)
        return i + 1, advance(replace(state, cache=cache), logits_BV, rules)

    return jax.lax.while_loop(goes_on, step, (0, state))[1]


def advance(state: SearchState, logits_BV: jax.Array, rules: Rules) -> SearchState:
    """Extend every live text by one token, from the logits after its last."""
    P, W = state.live.value_PW.shape
    last = state.n_tokens  # the index of the new token
    n_tokens = state.n_tokens + 1

    # Score all continuations of the live texts and keep the best.
    candidates, parent_PC = find_candidates(state, logits_BV, rules)
    token_PC = candidates.tokens_PWS[:, :, last]
    is_end_PC = jnp.any(token_PC[..., None] == rules.end_ids, axis=-1)

    # Move those that end here and are among the first W to the pool of ended texts.
    is_last_PC = is_end_PC | (n_tokens >= rules.max_tokens_P)[:, None]
    ends_PC = is_last_PC & (jnp.arange(token_PC.shape[1]) < W)
    score_PC = candidates.value_PW / n_tokens**rules.length_penalty
    ending = replace(candidates, value_PW=jnp.where(ends_PC, score_PC, -jnp.inf))
    pool = jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), state.ended, ending)
    ended, _ = pool.best(W)

    # Keep the best of the others alive, unless their prompt is done.
    going_on_PC = jnp.where(is_end_PC, -jnp.inf, candidates.value_PW)
    live, index_PW = replace(candidates, value_PW=going_on_PC).best(W)
    done_P = is_done(rules, live.value_PW[:, 0], ended, n_tokens)
    live = replace(live, value_PW=jnp.where(done_P[:, None], -jnp.inf, live.value_PW))

    # Give each live text the cache of its parent.
    parent_B = (jnp.arange(P)[:, None] * W + pick(parent_PC, index_PW)).reshape(-1)
    token_B = live.tokens_PWS[:, :, last].reshape(-1)
    seen_BV = state.seen_BV[parent_B].at[jnp.arange(P * W), token_B].set(True)
    return SearchState(kv.select(state.cache, parent_B), seen_BV, live, ended, n_tokens)


def find_candidates(
    state: SearchState, logits_BV: jax.Array, rules: Rules
) -> tuple[Texts, jax.Array]:
    """The likeliest continuations of each prompt's live texts, and parent_PC, what they extend.

    There are enough that `width` of them can go on, however many ids end a text.
    """
    live, V = state.live, logits_BV.shape[-1]
    P, W = live.value_PW.shape
    adjusted_BV = sampler.adjust_logits(logits_BV, rules.sampling, state.seen_BV)
    logprob_BV = jnp.where(adjusted_BV < FORBIDDEN, -jnp.inf, jax.nn.log_softmax(adjusted_BV))
    sum_PWV = live.value_PW[..., None] + logprob_BV.reshape(P, W, V)
    n_candidates = min((1 + len(rules.end_ids)) * W, W * V)
    value_PC, index_PC = jax.lax.top_k(sum_PWV.reshape(P, W * V), n_candidates)
    parent_PC, token_PC = index_PC // V, index_PC % V

    own_logprob_PC = pick(jax.nn.log_softmax(logits_BV).reshape(P, W * V), index_PC)
    tokens_PCS, logprobs_PCS = pick((live.tokens_PWS, live.logprobs_PWS), parent_PC)
    tokens_PCS = tokens_PCS.at[:, :, state.n_tokens].set(token_PC)
    logprobs_PCS = logprobs_PCS.at[:, :, state.n_tokens].set(own_logprob_PC)
    return Texts(value_PC, tokens_PCS, logprobs_PCS), parent_PC


def is_done(rules: Rules, best_P: jax.Array, ended: Texts, n_tokens: jax.Array) -> jax.Array:
    """Whether each prompt is done; `best_P` is the best sum of its live texts of `n_tokens`."""
    longest_P = jnp.where(rules.length_penalty > 0, rules.max_tokens_P, n_tokens + 1)
    length_P = jnp.where(rules.is_exact, longest_P, n_tokens)
    bound_P = best_P / length_P**rules.length_penalty  # see BeamSettings
    worst_P = jnp.where(rules.is_exact, ended.value_PW[:, rules.n_best - 1], ended.value_PW[:, -1])
    pool_is_full_P = ended.value_PW[:, -1] > -jnp.inf
    stops_early_P = rules.stops_early & pool_is_full_P
    return (worst_P >= bound_P) | stops_early_P | (n_tokens >= rules.max_tokens_P)


def pick(tree, index_PC: jax.Array):
    """Entries `index_PC` along axis 1 of each [P, W, ...] array in `tree`."""
    prompt_P1 = jnp.arange(len(index_PC))[:, None]
    return jax.tree.map(lambda a: a[prompt_P1, index_PC], tree)
