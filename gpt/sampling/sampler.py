"""From logits to a token: bias, penalty, temperature, filters, the draw.

Settings are traced arrays, one entry a row: none recompiles, and rows of a batch may differ in all.

The order is Hugging Face's: logit bias (a forbidden end-of-text is one), repetition penalty,
temperature, top-k, top-p over what top-k left, min-p over what both left. Ties at a threshold stay.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt.model.attention import MASKED

BLOCK = 256  # tokens summed together when one is looked up in the cumulative distribution


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """How each row draws; the fields of Settings of the same names.

    `bias_BV` is added to the logits. `seed`, `sample`: with the position, they alone decide a
    row's noise.
    """

    bias_BV: jax.Array
    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    sample: jax.Array


def adjust(logits_BV: jax.Array, rows: Draw, seen_BV: jax.Array) -> jax.Array:
    """Logits after bias and repetition penalty (Keskar et al. 2019, section 4.1).

    `seen_BV` is True at tokens of the prompt and of what has been drawn. Logits of either sign
    become smaller, as in Hugging Face.
    """
    penalty_B1 = rows.repetition_penalty[:, None]

    def changed(x_BV):
        x_BV = x_BV + rows.bias_BV
        punished_BV = jnp.where(x_BV > 0, x_BV / penalty_B1, x_BV * penalty_B1)
        x_BV = jnp.clip(jnp.where(seen_BV, punished_BV, x_BV), MASKED, -MASKED)
        return jnp.where(rows.bias_BV > MASKED, x_BV, MASKED)  # forbidden is not punished back

    wanted = jnp.any(rows.bias_BV != 0) | jnp.any(rows.repetition_penalty != 1)
    return jax.lax.cond(wanted, changed, lambda x_BV: x_BV, logits_BV)


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 equals 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keep_largest(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """True at the fewest largest entries whose summed weight reaches the target; ties all stay.

    Bisection on the bits of the threshold: 32 masked sums, a tenth of the cost of a sort.
    """
    bits_BV = ordered_bits(x_BV)

    def halve(i, low_B):
        middle_B = low_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0), axis=-1)
        return jnp.where(above_B >= target_B, middle_B, low_B)

    low_B = jax.lax.fori_loop(0, 32, halve, jnp.zeros(len(x_BV), jnp.uint32))
    return bits_BV >= low_B[:, None]


def keep_top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Logits with all but the `top_k_B` largest masked; 0 keeps all."""
    V = logits_BV.shape[-1]
    target_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    return jnp.where(keep_largest(logits_BV, jnp.ones_like(logits_BV), target_B), logits_BV, MASKED)


def keep_top_p(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Logits with all masked but the fewest likeliest that reach probability `top_p_B`; 1 keeps
    all, 0 the likeliest (Holtzman et al. 2019, section 3.1)."""
    top_B1 = logits_BV.max(-1, keepdims=True)
    weight_BV = jnp.exp(logits_BV - top_B1)
    keep_BV = keep_largest(logits_BV, weight_BV, top_p_B * weight_BV.sum(-1))
    keep_BV |= (logits_BV == top_B1) | (top_p_B >= 1)[:, None]
    return jnp.where(keep_BV, logits_BV, MASKED)


def keep_min_p(logits_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Logits with all masked that are less than `min_p_B` times as likely as the likeliest."""
    least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, MASKED)


def filtered(logits_BV: jax.Array, rows: Draw) -> jax.Array:
    """Logits, largest 0, divided by the temperature and cut down to what may be drawn.

    A filter that no row asks for is not computed. A temperature of 0 counts as 1.
    """
    temperature_B1 = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    # From the largest: a tiny temperature must not turn two large logits into two infinities.
    x_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature_B1
    x_BV = jnp.where(logits_BV > MASKED, x_BV, MASKED)  # forbidden at any temperature

    def where_wanted(wanted_B, keep, x_BV, setting_B):
        return jax.lax.cond(jnp.any(wanted_B), keep, lambda x_BV, _: x_BV, x_BV, setting_B)

    x_BV = where_wanted(rows.top_k > 0, keep_top_k, x_BV, rows.top_k)
    x_BV = where_wanted(rows.top_p < 1, keep_top_p, x_BV, rows.top_p)
    return where_wanted(rows.min_p > 0, keep_min_p, x_BV, rows.min_p)


def argmax(logits_BV: jax.Array) -> jax.Array:
    """First index of the largest logit; several times faster on CPU than jnp.argmax."""
    V = logits_BV.shape[-1]
    top_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.min(jnp.where(logits_BV == top_B1, jnp.arange(V), V - 1), axis=-1)


def uniform(rows: Draw, position_B: jax.Array) -> jax.Array:
    """One uniform in [0, 1) a row, a function of its seed, sample and position alone."""

    def one(seed, sample, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(rows.seed, rows.sample, position_B)


def find(weight_BC: jax.Array, aim_B: jax.Array):
    """(index_B, before_B): where the running sum of weights first exceeds the aim, and the sum
    before it.

    A parallel sum may waver by a rounding where nothing is added: only entries of some weight
    count. Where rounding leaves none above the aim it is the last of them.
    """
    C, some_BC = weight_BC.shape[-1], weight_BC > 0
    sum_BC = jnp.cumsum(weight_BC, axis=-1)
    first_B = jnp.min(jnp.where(some_BC & (sum_BC > aim_B[:, None]), jnp.arange(C), C), axis=-1)
    last_B = jnp.max(jnp.where(some_BC, jnp.arange(C), 0), axis=-1)
    index_B = jnp.minimum(first_B, last_B).astype(jnp.int32)
    sum_B, weight_B = (
        jnp.take_along_axis(a, index_B[:, None], axis=-1)[:, 0] for a in (sum_BC, weight_BC)
    )
    return index_B, sum_B - weight_B


def inverse_cdf(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The token at which the cumulative probability first exceeds `u_B`; never a masked one.

    Looked up among sums of blocks, then in one block: a running sum over the whole vocabulary
    would cost several times as much.
    """
    B, V = logits_BV.shape
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    weight_BRC = jnp.pad(weight_BV, [(0, 0), (0, -V % BLOCK)]).reshape(B, -1, BLOCK)
    block_BR = weight_BRC.sum(-1)
    aim_B = u_B * block_BR.sum(-1)
    block_B, before_B = find(block_BR, aim_B)
    weight_BC = jnp.take_along_axis(weight_BRC, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + find(weight_BC, aim_B - before_B)[0]


def sample(
    logits_BV: jax.Array, rows: Draw, seen_BV: jax.Array, position_B: jax.Array
) -> jax.Array:
    """One token a row, int32: the likeliest where the temperature is 0, else drawn.

    `position_B`: place of the token in its text. Greedy rows cost no sort and no noise.
    """
    logits_BV = adjust(logits_BV, rows, seen_BV)
    greedy_B = argmax(logits_BV)

    def drawn(logits_BV):
        token_B = inverse_cdf(filtered(logits_BV, rows), uniform(rows, position_B))
        return jnp.where(rows.temperature > 0, token_B, greedy_B)

    return jax.lax.cond(jnp.any(rows.temperature > 0), drawn, lambda _: greedy_B, logits_BV)


def logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """The model's own log-probability of each row's token, before temperature and filters."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
