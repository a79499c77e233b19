"""From logits to a token: bias, penalty, temperature, filters, sampling.

Settings are traced arrays with one entry per row: no value recompiles anything, and the rows of a
batch may differ in all of them. Stages that no row needs are skipped. A CPU decides this while a
program runs. A GPU would need a round trip to the host for each token, so the host decides in
advance (`SamplingParams.stages`), and there is one program per set of stages in use.

The order follows Hugging Face transformers: logit bias (which also forbids end-of-text),
repetition penalty, temperature, top-k, top-p over what top-k kept, min-p over what both kept. Ties
at a threshold are all kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt.errors import require
from gpt.model.attention import MASKED
from gpt.sampling.completion import PromptTokens
from gpt.sampling.settings import Settings
from gpt.sharding import platform

BLOCK = 256  # tokens per block in `inverse_cdf`
DIGIT = 3  # bits of the threshold that an accelerator finds per step
PART = 1024  # row entries per partial sum on an accelerator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """How each row of a batch samples: the settings of the same names, one entry per row.

    `bias_BV` is added to the logits. `filters`: the setting for each of FILTERS. A row's noise
    depends only on its `seed`, its `sample` (the index among the prompt's completions) and the
    position. `stages`: the `needed_stages` of this batch; None to find out while the program runs.
    """

    bias_BV: jax.Array
    repetition_penalty: jax.Array
    temperature: jax.Array
    filters: dict[str, jax.Array]
    seed: jax.Array
    sample: jax.Array
    stages: frozenset[str] | None = field(default=None, metadata={"static": True})


def sampling_params(
    settings: Sequence[Settings],
    bias_BV: Sequence[np.ndarray],
    prompts: Sequence[PromptTokens] | None = None,
    samples: Sequence[int] | None = None,
) -> SamplingParams:
    """Each row's settings as arrays. `bias_BV`: see logit_bias. The noise depends on `samples` and
    on the ids of `prompts`; without the ids, all prompts of one length would share one random
    number per step."""

    def column(name: str) -> jax.Array:
        return jnp.array([float(getattr(one, name)) for one in settings], jnp.float32)

    seed = jnp.array([one.seed for one in settings], jnp.uint32)
    if prompts is not None:
        seed ^= jnp.array([prompt.checksum for prompt in prompts], jnp.uint32)
    params = SamplingParams(
        bias_BV=jnp.asarray(np.stack(bias_BV)),
        repetition_penalty=column("repetition_penalty"),
        temperature=column("temperature"),
        filters={name: column(name) for name in FILTERS},
        seed=seed,
        sample=jnp.array(samples or [0] * len(settings), jnp.uint32),
    )
    # A CPU finds out while decoding which stages are needed, so one program serves all.
    return params if platform() == "cpu" else with_known_stages(params)


def logit_bias(model, settings: Settings) -> np.ndarray:
    """The bias added to the logits: the user's, plus a mask on ids without a token and, if ignored,
    on end-of-text. Raises UserError if this leaves no token."""
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
    require(bias_V.max() > MASKED, "logit_bias forbids every token: leave at least one allowed")
    return bias_V


def needed_stages(sampling: SamplingParams) -> dict[str, jax.Array]:
    """Whether any row needs each stage of sampling."""
    adjusts = jnp.any(sampling.bias_BV != 0) | jnp.any(sampling.repetition_penalty != 1)
    needed = {
        "adjust": adjusts,
        "greedy": jnp.any(sampling.temperature == 0),
        "draw": jnp.any(sampling.temperature > 0),
    }
    for name, token_filter in FILTERS.items():
        needed[name] = jnp.any(sampling.filters[name] != token_filter.off)
    return needed


def do_if_needed(
    stage: str, sampling: SamplingParams, function: Callable, x_BV: jax.Array, otherwise: jax.Array
) -> jax.Array:
    """`function(x_BV)` if any row needs the stage, else `otherwise`."""
    if sampling.stages is not None:
        return function(x_BV) if stage in sampling.stages else otherwise
    needed = needed_stages(sampling)[stage]
    return jax.lax.cond(needed, lambda x_BV, _: function(x_BV), lambda _, x: x, x_BV, otherwise)


def with_known_stages(sampling: SamplingParams) -> SamplingParams:
    """`sampling` with its stages determined now, on the host."""
    needed = jax.device_get(needed_stages(sampling))
    return replace(sampling, stages=frozenset(stage for stage in needed if needed[stage]))


def adjust_logits(logits_BV: jax.Array, sampling: SamplingParams, seen_BV: jax.Array) -> jax.Array:
    """Logits after bias and repetition penalty (Keskar et al. 2019, section 4.1).

    `seen_BV` is True for tokens in the prompt or the text so far. The penalty lowers logits of
    either sign, as in Hugging Face transformers.
    """
    penalty_B1 = sampling.repetition_penalty[:, None]

    def adjusted(logits_BV):
        x_BV = logits_BV + sampling.bias_BV
        penalized_BV = jnp.where(x_BV > 0, x_BV / penalty_B1, x_BV * penalty_B1)
        x_BV = jnp.clip(jnp.where(seen_BV, penalized_BV, x_BV), MASKED, -MASKED)
        # A penalty below 1 must not bring a forbidden token back.
        return jnp.where(sampling.bias_BV > MASKED, x_BV, MASKED)

    return do_if_needed("adjust", sampling, adjusted, logits_BV, logits_BV)


def keep_largest(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """True for the fewest largest entries whose weights sum to at least the target, and for all
    entries equal to the smallest of them."""
    # Map float32 to uint32 in the same order, with -0 equal to 0.
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(x_BV == 0, 0.0, x_BV), jnp.uint32)
    bits_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))
    find_threshold = by_halves if platform() == "cpu" else by_digits
    return bits_BV >= find_threshold(bits_BV, weight_BV, target_B)[:, None]


def by_halves(bits_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The largest threshold at which the entries not below it reach the target; 0 if none does.

    Bisection on its bits: 32 masked sums, which cost a tenth of a sort on a CPU.
    """

    def halve(i, low_B):
        middle_B = low_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0), axis=-1)
        return jnp.where(above_B >= target_B, middle_B, low_B)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros(len(bits_BV), jnp.uint32))


def by_digits(bits_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Like `by_halves`, but several bits per step, with a sum for each possible value: for
    accelerators, which compute the sums in parallel but wait for every step.

    Each row is summed in parts, then over the parts: only in this form does XLA compute all of a
    step's sums in one kernel that reads the row once.
    """
    padding = [(0, 0), (0, -bits_BV.shape[1] % PART)]
    bits_BRC = jnp.pad(bits_BV, padding).reshape(len(bits_BV), -1, PART)
    weight_BRC = jnp.pad(weight_BV, padding).reshape(bits_BRC.shape)
    low_B = jnp.zeros(len(bits_BV), jnp.uint32)
    shift = 32
    while shift > 0:
        n_bits = min(DIGIT, shift)
        shift -= n_bits
        sums = []
        for value in range(1, 1 << n_bits):
            threshold_B = low_B | jnp.uint32(value << shift)
            is_above_BRC = bits_BRC >= threshold_B[:, None, None]
            sums.append(jnp.sum(jnp.where(is_above_BRC, weight_BRC, 0), axis=-1))
        above_BJ = jnp.stack(sums, axis=1).sum(-1)
        digit_B = jnp.sum(above_BJ >= target_B[:, None], axis=-1, dtype=jnp.uint32)
        low_B |= digit_B << shift
    return low_B


def keep_top_k(top_k_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Mask all but the `top_k_B` largest logits; 0 keeps all."""
    V = logits_BV.shape[-1]
    target_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    return jnp.where(keep_largest(logits_BV, jnp.ones_like(logits_BV), target_B), logits_BV, MASKED)


def keep_top_p(top_p_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Mask all but the fewest likeliest tokens that together reach probability `top_p_B` (Holtzman
    et al. 2019, section 3.1); 1 keeps all, 0 the likeliest. Each row's largest logit must be 0.
    """
    weight_BV = jnp.exp(logits_BV)
    keep_BV = keep_largest(logits_BV, weight_BV, top_p_B * weight_BV.sum(-1))
    keep_BV |= (logits_BV == 0) | (top_p_B >= 1)[:, None]
    return jnp.where(keep_BV, logits_BV, MASKED)


def keep_min_p(min_p_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Mask tokens less than `min_p_B` times as likely as the likeliest. Each row's largest logit
    must be 0."""
    return jnp.where(logits_BV >= jnp.log(min_p_B)[:, None], logits_BV, MASKED)


class Filter(NamedTuple):
    """A setting that rejects tokens: `keep(setting_B, logits_BV)` masks those it rejects, none if
    the setting is `off`. Each row's largest logit is 0 before and must be 0 after: a filter that
    may reject the likeliest token must subtract the largest remaining logit from the others."""

    keep: Callable[[jax.Array, jax.Array], jax.Array]
    off: float


# Keyed by field of `Settings`, in the order of application.
FILTERS = {
    "top_k": Filter(keep_top_k, off=0),
    "top_p": Filter(keep_top_p, off=1),
    "min_p": Filter(keep_min_p, off=0),
}


def filter_logits(logits_BV: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Logits divided by the temperature, with filtered tokens masked; the largest is 0.

    A temperature of 0 counts as 1.
    """
    temperature_B1 = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    # Subtract the largest first: a tiny temperature must not turn two large logits into infinities.
    x_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature_B1
    x_BV = jnp.where(logits_BV > MASKED, x_BV, MASKED)  # forbidden at any temperature

    for name, token_filter in FILTERS.items():
        keep = partial(token_filter.keep, sampling.filters[name])
        x_BV = do_if_needed(name, sampling, keep, x_BV, x_BV)
    return x_BV


def argmax(logits_BV: jax.Array) -> jax.Array:
    """First index of the largest logit; several times faster than jnp.argmax on a CPU."""
    V = logits_BV.shape[-1]
    top_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.min(jnp.where(logits_BV == top_B1, jnp.arange(V), V - 1), axis=-1)


def uniform(sampling: SamplingParams, position_B: jax.Array) -> jax.Array:
    """A uniform number in [0, 1) per row, which depends only on its seed, sample and position."""

    def draw(seed, sample, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key)

    return jax.vmap(draw)(sampling.seed, sampling.sample, position_B)


def find_in_cumulative(weight_BC: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index_B, before_B): where the running sum of weights first exceeds the target, and the sum
    before that entry.

    A parallel sum may change by a rounding error even where 0 is added, so only entries with a
    positive weight count. If rounding leaves none of them above the target, the last one is taken.
    """
    C = weight_BC.shape[-1]
    has_weight_BC = weight_BC > 0
    sum_BC = jnp.cumsum(weight_BC, axis=-1)
    exceeds_BC = has_weight_BC & (sum_BC > target_B[:, None])
    first_B = jnp.min(jnp.where(exceeds_BC, jnp.arange(C), C), axis=-1)
    last_B = jnp.max(jnp.where(has_weight_BC, jnp.arange(C), 0), axis=-1)
    index_B = jnp.minimum(first_B, last_B).astype(jnp.int32)
    sum_B = jnp.take_along_axis(sum_BC, index_B[:, None], axis=-1)[:, 0]
    weight_B = jnp.take_along_axis(weight_BC, index_B[:, None], axis=-1)[:, 0]
    return index_B, sum_B - weight_B


def inverse_cdf(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The token at which the cumulative probability first exceeds `u_B`, never a masked one. Each
    row's largest logit must be 0.

    The search runs over block sums, then within one block; a running sum over the whole vocabulary
    would cost several times as much.
    """
    B, V = logits_BV.shape
    weight_BV = jnp.exp(logits_BV)
    weight_BRC = jnp.pad(weight_BV, [(0, 0), (0, -V % BLOCK)]).reshape(B, -1, BLOCK)
    block_BR = weight_BRC.sum(-1)
    target_B = u_B * block_BR.sum(-1)
    block_B, before_B = find_in_cumulative(block_BR, target_B)
    weight_BC = jnp.take_along_axis(weight_BRC, block_B[:, None, None], axis=1)[:, 0]
    within_B, _ = find_in_cumulative(weight_BC, target_B - before_B)
    return block_B * BLOCK + within_B


def sample(
    logits_BV: jax.Array, sampling: SamplingParams, seen_BV: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Sample one int32 token per row, or take the likeliest if the temperature is 0.

    `position_B`: the token's position in its text.
    """
    logits_BV = adjust_logits(logits_BV, sampling, seen_BV)
    greedy_B = argmax(logits_BV)

    def draw(logits_BV):
        token_B = inverse_cdf(filter_logits(logits_BV, sampling), uniform(sampling, position_B))
        if sampling.stages is not None and "greedy" not in sampling.stages:
            return token_B
        return jnp.where(sampling.temperature > 0, token_B, greedy_B)

    return do_if_needed("draw", sampling, draw, logits_BV, greedy_B)


def token_logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """The model's own log-probability of each row's token, before temperature and filters."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
