"""Digests of arrays, computed where they live, the same on any mesh. Knows nothing of files."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name: the keys, fields and indices of their paths, joined by `/`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def digest(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each array by name, computed where the array lives, whatever its mesh.

    One changed element always changes the digest; several escape with probability 2^-32.
    """
    named = named_leaves(tree)
    if not named:
        return {}
    sums = jax.device_get(digest_arrays(list(named.values())))  # one fetch for all of them
    return dict(zip(named, sums.tolist(), strict=True))


@jax.jit
def digest_arrays(arrays: list[jax.Array]) -> jax.Array:
    """Digests of `arrays`, uint32 [len(arrays)]: one program, so that one fetch brings them."""
    return jnp.stack([digest_array(x) for x in arrays])


def digest_array(x: jax.Array) -> jax.Array:
    """Sum over the elements, modulo 2^32, of a bijective mix of their bits with their index.

    A sum has no order, so shards add up to the same number in any layout and nothing is gathered.
    """
    bits = bits_of(x)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # a reshape would gather a sharded array
        stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    h = bits ^ (index * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)  # murmur3's finaliser
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; elements of 64 bits become a last axis of two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
