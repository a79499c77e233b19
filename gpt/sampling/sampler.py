"""From logits to a token: bias, penalty, temperature, filters, the draw.

Settings are traced arrays with one entry per row: no value recompiles anything, and the rows of a
batch may differ in all of them.

The order is that of Hugging Face transformers: logit bias (which also forbids end-of-text),
repetition penalty, temperature, top-k, top-p over what top-k kept, min-p over what both kept. Ties
at a threshold are all kept.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt.model.attention import MASKED

BLOCK = 256  # tokens whose probabilities are summed before one of them is looked up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """How each row of a batch samples: the settings of the same names, one entry per row.

    `bias_BV` is added to the logits. A row's noise depends on its `seed`, its `sample` (the number
    among the completions of one prompt) and the position, and on nothing else.
    """

    bias_BV: jax.Array
    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    sample: jax.Array


def adjust_logits(logits_BV: jax.Array, sampling: SamplingParams, seen_BV: jax.Array) -> jax.Array:
    """Logits after bias and repetition penalty (Keskar et al. 2019, section 4.1).

    `seen_BV` is True for tokens of the prompt and of the text so far. The penalty lowers logits of
    either sign, as in Hugging Face transformers.
    """
    penalty_B1 = sampling.repetition_penalty[:, None]

    def adjusted(logits_BV):
        x_BV = logits_BV + sampling.bias_BV
        penalized_BV = jnp.where(x_BV > 0, x_BV / penalty_B1, x_BV * penalty_B1)
        x_BV = jnp.clip(jnp.where(seen_BV, penalized_BV, x_BV), MASKED, -MASKED)
        # A penalty below 1 must not bring a forbidden token back.
        return jnp.where(sampling.bias_BV > MASKED, x_BV, MASKED)

    needed = jnp.any(sampling.bias_BV != 0) | jnp.any(sampling.repetition_penalty != 1)
    return jax.lax.cond(needed, adjusted, lambda logits_BV: logits_BV, logits_BV)


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 equals 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keep_largest(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """True at the fewest largest entries whose summed weight reaches the target, and at all entries
    that equal the smallest of them.

    Bisection on the bits of the threshold: 32 masked sums, which on a CPU cost a tenth of a sort.
    """
    bits_BV = ordered_bits(x_BV)

    def halve(i, low_B):
        middle_B = low_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0), axis=-1)
        return jnp.where(above_B >= target_B, middle_B, low_B)

    low_B = jax.lax.fori_loop(0, 32, halve, jnp.zeros(len(x_BV), jnp.uint32))
    return bits_BV >= low_B[:, None]


def keep_top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Logits with all but the `top_k_B` largest masked; 0 keeps all of them."""
    V = logits_BV.shape[-1]
    target_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    return jnp.where(keep_largest(logits_BV, jnp.ones_like(logits_BV), target_B), logits_BV, MASKED)


def keep_top_p(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Logits with all masked but the fewest likeliest that together reach probability `top_p_B`
    (Holtzman et al. 2019, section 3.1); 1 keeps all of them, 0 the likeliest."""
    top_B1 = logits_BV.max(-1, keepdims=True)
    weight_BV = jnp.exp(logits_BV - top_B1)
    keep_BV = keep_largest(logits_BV, weight_BV, top_p_B * weight_BV.sum(-1))
    keep_BV |= (logits_BV == top_B1) | (top_p_B >= 1)[:, None]
    return jnp.where(keep_BV, logits_BV, MASKED)


def keep_min_p(logits_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Logits with those masked that are less than `min_p_B` times as likely as the likeliest."""
    least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, MASKED)


def filter_logits(logits_BV: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Logits divided by the temperature, with all masked that may not be drawn; the largest is 0.

    A filter that no row asks for is not computed. A temperature of 0 counts as 1.
    """
    temperature_B1 = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    # Subtract the largest first: a tiny temperature must not turn two large logits into infinities.
    x_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature_B1
    x_BV = jnp.where(logits_BV > MASKED, x_BV, MASKED)  # forbidden at any temperature

    def filter_if(needed_B, keep, x_BV, setting_B):
        return jax.lax.cond(jnp.any(needed_B), keep, lambda x_BV, _: x_BV, x_BV, setting_B)

    x_BV = filter_if(sampling.top_k > 0, keep_top_k, x_BV, sampling.top_k)
    x_BV = filter_if(sampling.top_p < 1, keep_top_p, x_BV, sampling.top_p)
    return filter_if(sampling.min_p > 0, keep_min_p, x_BV, sampling.min_p)


def argmax(logits_BV: jax.Array) -> jax.Array:
    """First index of the largest logit; on a CPU several times faster than jnp.argmax."""
    V = logits_BV.shape[-1]
    top_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.min(jnp.where(logits_BV == top_B1, jnp.arange(V), V - 1), axis=-1)


def uniform(sampling: SamplingParams, position_B: jax.Array) -> jax.Array:
    """A uniform number in [0, 1) per row, a function of its seed, sample and position alone."""

    def draw(seed, sample, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key)

    return jax.vmap(draw)(sampling.seed, sampling.sample, position_B)


def find_in_cumulative(weight_BC: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index_B, before_B): where the running sum of weights first exceeds the target, and the sum
    before that entry.

    A parallel sum may waver by a rounding error where nothing is added, so only entries with a
    weight count. Where rounding leaves none of them above the target, it is the last one.
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
    """The token at which the cumulative probability first exceeds `u_B`; never a masked one.

    It is looked up among the sums of blocks, then within one block: a running sum over the whole
    vocabulary would cost several times as much.
    """
    B, V = logits_BV.shape
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
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
    """One token per row, int32: the likeliest where the temperature is 0, else a random one.

    `position_B`: the position of the token in its text. If all rows are greedy neither filters nor
    noise are computed.
    """
    logits_BV = adjust_logits(logits_BV, sampling, seen_BV)
    greedy_B = argmax(logits_BV)

    def draw(logits_BV):
        token_B = inverse_cdf(filter_logits(logits_BV, sampling), uniform(sampling, position_B))
        return jnp.where(sampling.temperature > 0, token_B, greedy_B)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda _: greedy_B, logits_BV)


def token_logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """The model's own log-probability of each row's token, before temperature and filters."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
