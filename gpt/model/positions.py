"""Position encodings: vectors added to the embeddings, or rotations of queries and keys.

Shape letters are defined in transformer.py.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt.config import ModelConfig


@dataclass(frozen=True)
class Positions:
    """Token positions for one forward pass, as attention needs them.

    `pos_BT`: each token's position in its row, which is also its slot in the KV cache. None means
    that token t of each row is at position t: without a cache, or when whole prompts are read into
    an empty one. Attention is then simply causal (query t sees keys 0 to t), which fused kernels
    support, and the new keys and values become the cache (`kv_cache.write`).
    `rope`: cosines and sines of RoPE's angles, computed once for all layers; None without RoPE.
    """

    pos_BT: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None


def positions_of(config: ModelConfig, pos_BT: jax.Array | None, n_tokens: int) -> Positions:
    """Positions for `n_tokens` tokens in each row."""
    if config.positions != "rope":
        return Positions(pos_BT, None)
    pos = jnp.arange(n_tokens)[None] if pos_BT is None else pos_BT
    angle = pos[..., None, None] * scaled_frequencies(config)
    return Positions(pos_BT, (jnp.cos(angle), jnp.sin(angle)))


def frequencies(width: int, base: float) -> jax.Array:
    """Radians per position for each of `width`/2 pairs: base^(-2i/width) (Vaswani et al., 3.5)."""
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def scaled_frequencies(config: ModelConfig) -> jax.Array:
    """RoPE's frequencies, scaled for a longer context as in Llama 3.1 (Grattafiori et al. 2024).

    Slow frequencies are divided by the factor and fast ones kept; those in between are interpolated
    by the number of turns they make within the original context.
    """
    frequency = frequencies(config.head_width, config.rope_theta)
    if config.rope_factor == 1:
        return frequency
    turns = frequency * (config.rope_context / (2 * math.pi))
    kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """RoPE (Su et al. 2021, eq. 34): pairs (i, i + H/2) rotated by their angle, in float32."""
    if rope is None:
        return x_BTNH
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoids(pos: jax.Array, width: int) -> jax.Array:
    """sin at even and cos at odd indices of `width` (Vaswani et al. 2017, section 3.5)."""
    angle = pos[..., None] * frequencies(width, 10_000.0)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*pos.shape, width)
