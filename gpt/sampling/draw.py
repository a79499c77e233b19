"""From logits to a token: temperature, top-k, the draw. Settings are traced arrays, one per row.

No setting recompiles, and rows of one batch may differ in all of them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt.model.attention import MASKED


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """How each row draws. `temperature` 0 is greedy; `top_k` 0 keeps the whole vocabulary.

    `seed`, `sample`: with the position, they alone decide a row's noise.
    """

    temperature: jax.Array
    top_k: jax.Array
    seed: jax.Array
    sample: jax.Array


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


def argmax(logits_BV: jax.Array) -> jax.Array:
    """First index of the largest logit; several times faster on CPU than jnp.argmax."""
    V = logits_BV.shape[-1]
    top_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.min(jnp.where(logits_BV == top_B1, jnp.arange(V), V - 1), axis=-1)


def uniform(draw: Draw, position_B: jax.Array) -> jax.Array:
    """One uniform in [0, 1) a row, a function of its seed, sample and position alone."""

    def one(seed, sample, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(draw.seed, draw.sample, position_B)


def inverse_cdf(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The token at which the cumulative probability first exceeds `u_B`; never a masked one."""
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    cdf_BV = jnp.cumsum(weight_BV, axis=-1)
    # A parallel sum may waver by a rounding where nothing is added: only tokens of some weight
    # count. Where rounding leaves none above the aim, the last of them is drawn.
    V, some_BV = logits_BV.shape[-1], weight_BV > 0
    above_BV = some_BV & (cdf_BV > (u_B * cdf_BV[:, -1])[:, None])
    first_B = jnp.min(jnp.where(above_BV, jnp.arange(V), V), axis=-1)
    last_B = jnp.max(jnp.where(some_BV, jnp.arange(V), 0), axis=-1)
    return jnp.minimum(first_B, last_B).astype(jnp.int32)


def sample(logits_BV: jax.Array, draw: Draw, position_B: jax.Array) -> jax.Array:
    """One token a row, int32: greedy where the temperature is 0, else drawn after top-k."""
    greedy_B = argmax(logits_BV)

    def drawn(logits_BV):
        scaled_BV = logits_BV / jnp.where(draw.temperature > 0, draw.temperature, 1)[:, None]
        scaled_BV = jax.lax.cond(
            jnp.any(draw.top_k > 0), lambda x: keep_top_k(x, draw.top_k), lambda x: x, scaled_BV
        )
        token_B = inverse_cdf(scaled_BV, uniform(draw, position_B))
        return jnp.where(draw.temperature > 0, token_B, greedy_B)

    return jax.lax.cond(jnp.any(draw.temperature > 0), drawn, lambda _: greedy_B, logits_BV)


def logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """The model's own log-probability of each row's token, before temperature and filters."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
