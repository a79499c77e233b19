"""Where a token stands: vectors added to embeddings, or angles by which queries and keys turn.

Shape letters: see transformer.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Where the tokens of one forward pass stand, as attention needs it.

    `pos_BT` None: token t of each row at position t. `rotate` turns queries or keys x_BTNH.
    """

    pos_BT: jax.Array | None
    rotate: Callable[[jax.Array], jax.Array]


def find_place(c: ModelConfig, pos_BT: jax.Array | None, n_tokens: int) -> Place:
    """The place of `n_tokens` tokens a row; angles are computed once for all layers."""
    if c.positions != "rope":
        return Place(pos_BT, lambda x: x)
    pos = jnp.arange(n_tokens)[None] if pos_BT is None else pos_BT
    angle = pos[..., None, None] * stretched(c, wavenumbers(c.head_width, c.rope_theta))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Place(pos_BT, lambda x: rotate(x, cos, sin))


def wavenumbers(width: int, base: float) -> jax.Array:
    """Radians a position for each of `width`/2 pairs: base^(-2i/width) (Vaswani et al., 3.5)."""
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def stretched(c: ModelConfig, number: jax.Array) -> jax.Array:
    """Wave numbers as Llama 3.1 stretches them (Grattafiori et al. 2024): the slow ones divided by
    the factor, the fast ones kept, those between in proportion to their turns in the old context.
    """
    if c.rope_factor == 1:
        return number
    turns = number * (c.rope_context / (2 * math.pi))
    kept = jnp.clip((turns - c.rope_low) / (c.rope_high - c.rope_low), 0, 1)
    return number * (kept + (1 - kept) / c.rope_factor)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE (Su et al. 2021, eq. 34): pairs (i, i + H/2) turned by their angle, in float32."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoids(pos: jax.Array, width: int) -> jax.Array:
    """sin at even and cos at odd places of `width` (Vaswani et al. 2017, section 3.5)."""
    angle = pos[..., None] * wavenumbers(width, 10_000.0)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*pos.shape, width)


def add_learned(c: ModelConfig, x_BTD: jax.Array, pos: jax.Array, table: jax.Array) -> jax.Array:
    """Plus the table's entry of each position (GPT-2)."""
    return x_BTD + table[pos]


def add_sinusoids(c: ModelConfig, x_BTD: jax.Array, pos: jax.Array, table: None) -> jax.Array:
    """Embeddings scaled by sqrt(D), plus waves (Vaswani et al. 2017, sections 3.4 and 3.5)."""
    return x_BTD * c.d_model**0.5 + sinusoids(pos, c.d_model)


def add_nothing(c: ModelConfig, x_BTD: jax.Array, pos: jax.Array, table: None) -> jax.Array:
    """The embeddings alone."""
    return x_BTD


ADD = {
    "learned": add_learned,
    "sinusoidal": add_sinusoids,
    "rope": add_nothing,
    "none": add_nothing,
}
