"""Beam search: the likeliest texts found by following several at once, on the device.

Every prompt keeps `width` live texts, one row of the cache each, and a pool of the `width` best
that have ended. A step weighs all continuations of the live texts: of the `2 * width` likeliest,
those that end and stand among the first `width` go to the pool, and the first `width` that go on
live on, so that endings starve no live text.

Shape letters: see model/transformer.py; P prompts, W width, C candidates, S also room for tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from gpt.compile_log import Stopwatch, compilations
from gpt.config import ModelConfig
from gpt.errors import positive, require
from gpt.model import kv_cache as kv
from gpt.model.attention import MASKED
from gpt.sampling import engine, generate, sampler
from gpt.sampling.completion import Completion
from gpt.sampling.generate import Prompt
from gpt.sampling.sampler import Draw
from gpt.sampling.settings import Settings
from gpt.sharding import on_mesh

CHUNK = 64  # steps between looks at the host, where Ctrl-C is heard
FORBIDDEN = MASKED * 1e-6  # adjusted logits below it are those of forbidden tokens


@dataclass(frozen=True)
class BeamSettings:
    """How to search.

    With `early_stopping` a width of 1 is greedy decoding. Without it the search of a prompt ends
    when no live text can come among the `n_best`. That is exact, not a guess: log-probabilities
    only fall, so a live text's sum bounds the sums of all its continuations; divided by the length
    that suits it best (the longest allowed where `length_penalty` is above 0, else the next) it
    bounds their scores. A positive penalty makes this bound loose and the search long.
    """

    width: int = 4
    """Texts followed at once for each prompt. The only setting that compiles anew."""
    n_best: int = 1
    """Texts handed out for each prompt."""
    length_penalty: float = 1.0
    """Exponent of the length that divides a sum of log-probabilities (above 0: favour long)."""
    early_stopping: bool = True
    """Stop as soon as `width` texts have ended, and not only when no live one can beat them."""
    max_new_tokens: int = 200  # this and the rest as in Settings
    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self):
        positive("width", self.width)
        positive("n_best", self.n_best)
        n, penalty = self.n_best, self.length_penalty
        require(n <= self.width, f"n_best is {n}: expected at most the width, {self.width}")
        # Within these the powers of any length stay far from the ends of float32.
        good = -5 <= penalty <= 5
        require(good, f"length_penalty is {penalty}: expected a number from -5 to 5")
        self.as_settings()

    def as_settings(self) -> Settings:
        """What is common to all ways of completing a prompt; checked there."""
        names = ("max_new_tokens", "logit_bias", "repetition_penalty", "ignore_eos")
        return Settings(temperature=0, **{name: getattr(self, name) for name in names})


@dataclass
class Hypothesis(Completion):
    """A text that was found; `sample` is its rank, 0 the best. Its seconds are the whole search's.

    `score` is the sum of the log-probabilities by which the search went (the model's own unless
    bias, penalty or `ignore_eos` changed them) over length ** length_penalty. The length is that
    of what was generated, end-of-text included: the convention of Hugging Face transformers
    (generation/utils.py, `_update_finished_beams`).
    """

    score: float = -math.inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Generated texts of each prompt, best first, W or C of them; what follows their ends is void.

    `value_PW`: sum of log-probabilities of a live text, score of an ended one; -inf: no text.
    `logprobs_PWS`: the model's own.
    """

    value_PW: jax.Array
    tokens_PWS: jax.Array
    logprobs_PWS: jax.Array

    def best(self, n: int) -> tuple["Texts", jax.Array]:
        """The `n` texts of largest value, earlier ones first among equals, and where they stood."""
        value_PW, index_PW = jax.lax.top_k(self.value_PW, n)
        tokens_PWS, logprobs_PWS = pick((self.tokens_PWS, self.logprobs_PWS), index_PW)
        return Texts(value_PW, tokens_PWS, logprobs_PWS), index_PW


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What decides a search, traced. `most_P`: tokens that a text may have; `rows` has one row."""

    most_P: jax.Array
    rows: Draw
    eot: jax.Array
    length_penalty: jax.Array
    n_best: jax.Array
    early_stopping: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Search:
    """What the device carries. The last of the `n_tokens` of each live text is not yet cached.

    Row p * W + w of the cache and of `seen_BV` (tokens of prompt and text) is live text w of
    prompt p. A prompt without live texts is done.
    """

    cache: kv.KVCache
    seen_BV: jax.Array
    live: Texts
    ended: Texts
    n_tokens: jax.Array

    @property
    def running_P(self) -> jax.Array:
        """Prompts not done. NaN runs on, to be found among the results."""
        return self.live.value_PW[:, 0] != -jnp.inf

    @property
    def running_B(self) -> jax.Array:
        """The same for each row of the cache."""
        return jnp.repeat(self.running_P, self.live.value_PW.shape[1])

    @property
    def fits(self) -> jax.Array:
        """Whether the cache has room for one more token of each live text."""
        return jnp.max(self.cache.length_B, where=self.running_B, initial=0) < self.cache.capacity


def pick(tree, index_PC: jax.Array):
    """Of each [P, W, ...] array in `tree` the entries `index_PC` of axis 1."""
    P_ = jnp.arange(len(index_PC))[:, None]
    return jax.tree.map(lambda a: a[P_, index_PC], tree)


def candidates(search: Search, logits_BV: jax.Array, rules: Rules) -> tuple[Texts, jax.Array]:
    """The likeliest continuations of each prompt's live texts, and parent_PC, what they continue.

    Twice the width: at least half of them go on, since each live text ends in one way only.
    """
    live, V = search.live, logits_BV.shape[-1]
    P, W = live.value_PW.shape
    adjusted_BV = sampler.adjust(logits_BV, rules.rows, search.seen_BV)
    step_BV = jnp.where(adjusted_BV < FORBIDDEN, -jnp.inf, jax.nn.log_softmax(adjusted_BV))
    sum_PWV = live.value_PW[..., None] + step_BV.reshape(P, W, V)
    value_PC, index_PC = jax.lax.top_k(sum_PWV.reshape(P, W * V), min(2 * W, W * V))
    parent_PC, token_PC = index_PC // V, index_PC % V
    own_PC = pick(jax.nn.log_softmax(logits_BV).reshape(P, W * V), index_PC)
    tokens_PCS, logprobs_PCS = pick((live.tokens_PWS, live.logprobs_PWS), parent_PC)
    tokens_PCS = tokens_PCS.at[:, :, search.n_tokens].set(token_PC)
    logprobs_PCS = logprobs_PCS.at[:, :, search.n_tokens].set(own_PC)
    return Texts(value_PC, tokens_PCS, logprobs_PCS), parent_PC


def over(rules: Rules, best_P: jax.Array, ended: Texts, n_tokens: jax.Array) -> jax.Array:
    """Whether each prompt is done; its live texts of `n_tokens` have sums of at most `best_P`."""
    length_P = jnp.where(rules.length_penalty > 0, rules.most_P, n_tokens + 1)
    bound_P = best_P / length_P**rules.length_penalty  # see BeamSettings
    settled_P = ended.value_PW[:, rules.n_best - 1] >= bound_P
    full_P = ended.value_PW[:, -1] > -jnp.inf
    return settled_P | (rules.early_stopping & full_P) | (n_tokens >= rules.most_P)


def advance(search: Search, logits_BV: jax.Array, rules: Rules) -> Search:
    """One more token for every live text, from the logits after its last."""
    P, W = search.live.value_PW.shape
    found, parent_PC = candidates(search, logits_BV, rules)
    token_PC, n_tokens = found.tokens_PWS[:, :, search.n_tokens], search.n_tokens + 1
    last_PC = (token_PC == rules.eot) | (n_tokens >= rules.most_P)[:, None]
    ends_PC = last_PC & (jnp.arange(token_PC.shape[1]) < W)
    score_PC = found.value_PW / n_tokens**rules.length_penalty
    ending = replace(found, value_PW=jnp.where(ends_PC, score_PC, -jnp.inf))
    pool = jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), search.ended, ending)
    ended, _ = pool.best(W)
    on_PC = jnp.where(token_PC == rules.eot, -jnp.inf, found.value_PW)
    live, index_PW = replace(found, value_PW=on_PC).best(W)
    over_P = over(rules, live.value_PW[:, 0], ended, n_tokens)
    live = replace(live, value_PW=jnp.where(over_P[:, None], -jnp.inf, live.value_PW))
    parent_B = (jnp.arange(P)[:, None] * W + pick(parent_PC, index_PW)).reshape(-1)
    token_B = live.tokens_PWS[:, :, search.n_tokens].reshape(-1)
    seen_BV = search.seen_BV[parent_B].at[jnp.arange(P * W), token_B].set(True)
    return Search(kv.select(search.cache, parent_B), seen_BV, live, ended, n_tokens)


@partial(jax.jit, static_argnames="width")
def begin(cache: kv.KVCache, logits_PV: jax.Array, seen_PV: jax.Array, rules: Rules, width: int):
    """The search after a prefill of the prompts, which is shared by their texts, one token on."""
    P, W, S = len(logits_PV), width, cache.capacity
    cache, logits_BV = engine.fork(cache, logits_PV, jnp.repeat(jnp.arange(P), W))
    tokens_PWS, logprobs_PWS = jnp.zeros((P, W, S), jnp.int32), jnp.zeros((P, W, S))
    nothing = Texts(jnp.full((P, W), -jnp.inf), tokens_PWS, logprobs_PWS)
    live = replace(nothing, value_PW=nothing.value_PW.at[:, 0].set(0.0))
    seen_BV = jnp.repeat(seen_PV, W, axis=0)
    return advance(Search(cache, seen_BV, live, nothing, jnp.int32(0)), logits_BV, rules)


@partial(jax.jit, static_argnames="config", donate_argnames="search")
def search_chunk(config: ModelConfig, params: dict, search: Search, rules: Rules, size) -> Search:
    """Up to `size` more tokens, until every prompt is done or one has filled the cache."""

    def going(carry):
        i, search = carry
        return (i < size) & jnp.any(search.running_P) & search.fits

    def step(carry):
        i, search = carry
        token_B = search.live.tokens_PWS[:, :, search.n_tokens - 1].reshape(-1)
        rows = search.cache, token_B, search.running_B
        cache, logits_BV = engine.decode_step(config, params, *rows)
        return i + 1, advance(replace(search, cache=cache), logits_BV, rules)

    return jax.lax.while_loop(going, step, (0, search))[1]


@partial(jax.jit, static_argnames="capacity")
def grow(search: Search, capacity: int) -> Search:
    """The search with room for `capacity` tokens a text."""
    more = [(0, 0), (0, 0), (0, capacity - search.cache.capacity)]
    texts = search.live, search.ended
    live, ended = jax.tree.map(lambda a: jnp.pad(a, more) if a.ndim == 3 else a, texts)
    return replace(search, cache=kv.grow(search.cache, capacity), live=live, ended=ended)


def start(model, blanks: Sequence[Completion], settings: BeamSettings) -> tuple[Search, Rules]:
    """The prompts read, each once, and the first tokens of their texts."""
    config, eot = model.config, model.tokenizer.eot_token
    ids = [one.prompt_ids for one in blanks]
    most_P = np.array([min(one.most, one.allowed) for one in blanks], np.int32)
    rows = generate.row_settings([settings.as_settings()], config.vocab_size, eot)
    penalty = float(settings.length_penalty)
    rules = Rules(most_P, rows, eot, penalty, settings.n_best, settings.early_stopping)
    tokens_PT, n_P = generate.pad_prompts(ids, config.context_length, slides=False)
    with compilations.of(bucket=tokens_PT.shape[1]):
        cache, logits_PV = engine.read(config, model.params, tokens_PT, n_P)
    seen_PV = np.zeros(logits_PV.shape, bool)
    for row, prompt in enumerate(ids):
        seen_PV[row, prompt] = True
    with compilations.of(capacity=cache.capacity):
        return jax.block_until_ready(begin(cache, logits_PV, seen_PV, rules, settings.width)), rules


def tell(model, blanks: Sequence[Completion], ended: Texts, settings: BeamSettings, p: int):
    """The best of the ended texts of prompt `p`; fewer where there are no more."""
    n = min(settings.n_best, np.sum(ended.value_PW[p] != -np.inf))
    require(n > 0, "logit_bias forbids every token: expected one that may follow")
    *read, before = blanks[p].prompt, blanks[p].prompt_ids, blanks[p].stream.before
    told = [Hypothesis.blank(model, *read, i, settings.as_settings(), before) for i in range(n)]
    for rank, one in enumerate(told):
        one.record(ended.tokens_PWS[p, rank], ended.logprobs_PWS[p, rank])
        one.score = float(ended.value_PW[p, rank])
    return told


def search(model, prompts: Sequence[Prompt], settings: BeamSettings) -> list[list[Hypothesis]]:
    """The `n_best` likeliest texts after each prompt (text or token ids), best first.

    `model` as in `generate.stream`. A prompt has fewer texts where no more are possible. UserError
    if a prompt exceeds the context, if every token is forbidden, or if the model gives no numbers.
    """
    config, each = model.config, generate.settings_of(prompts, settings.as_settings())
    blanks = generate.blank_rows(model, prompts, each, settings.width)
    prefilling, decoding = Stopwatch(), Stopwatch()
    sizes = {"prompts": len(blanks), "width": settings.width}
    with prefilling, on_mesh(model.mesh), compilations.of(**sizes):
        found, rules = start(model, blanks, settings)
    with decoding, on_mesh(model.mesh), compilations.of(**sizes):
        while np.any(found.running_P):
            if not found.fits:
                found = grow(found, engine.bucket(found.cache.capacity + 1, config.context_length))
            with compilations.of(capacity=found.cache.capacity):
                found = search_chunk(config, model.params, found, rules, CHUNK)
        ended = jax.device_get(found.ended)
    told = [tell(model, blanks, ended, settings, p) for p in range(len(blanks))]
    for one in chain.from_iterable(told):
        one.prefill_seconds, one.decode_seconds = prefilling.seconds, decoding.seconds
    return told
