"""Digests of arrays, computed on their devices: identical on any mesh, without a gather."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name: the keys, fields and indices of their paths, joined by `/`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def digest(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each array, by name.

    One changed element always changes the digest; several go unnoticed with probability 2^-32.
    """
    arrays = named_leaves(tree)

    # Each array's first axis that is not split among devices; None for a vector.
    whole_axes: list[int | None] = []
    for x in arrays.values():
        local = x.sharding.shard_shape(x.shape)
        whole = [axis for axis in range(x.ndim) if local[axis] == x.shape[axis]]
        whole_axes.append(whole[0] if x.ndim > 1 and x.size and whole else None)

    sums = _digest_arrays(list(arrays.values()), tuple(whole_axes))
    return dict(zip(arrays, process_allgather(sums, tiled=True).tolist(), strict=True))


@partial(jax.jit, static_argnums=1)
def _digest_arrays(arrays, whole_axes) -> jax.Array:
    """One program for all arrays, so that one transfer fetches all digests."""
    return jnp.stack([digest_array(x, axis) for x, axis in zip(arrays, whole_axes, strict=True)])


def digest_array(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum over the elements, modulo 2^32, of a bijective mix of each element's bits and index.

    Order does not matter to a sum, so shards add up to the same number in any layout without a
    gather. It runs along `axis` slice by slice because, on a CPU, XLA's own sum first writes all
    its terms to memory.
    """
    sizes = [1 if i == axis else n for i, n in enumerate(x.shape)]
    strides = [jnp.uint32(math.prod(x.shape[i + 1 :]) % 2**32) for i in range(x.ndim)]
    index = jnp.zeros(sizes, jnp.uint32)
    for i, stride in enumerate(strides):  # a reshape would gather a sharded array
        index += jax.lax.broadcasted_iota(jnp.uint32, sizes, i) * stride

    if axis is None:
        return jnp.sum(_mix(x, index), dtype=jnp.uint32)

    def add_slice(i, sums):
        # Without the barrier, XLA would convert the whole bfloat16 x before the loop.
        whole, i = jax.lax.optimization_barrier((x, i))
        part = jax.lax.dynamic_slice_in_dim(whole, i, 1, axis)
        return sums + _mix(part, index + jnp.uint32(i) * strides[axis])

    sums = jax.lax.fori_loop(0, x.shape[axis], add_slice, jnp.zeros(sizes, jnp.uint32))
    return jnp.sum(sums, dtype=jnp.uint32)


def _mix(x: jax.Array, index: jax.Array) -> jax.Array:
    """Each element's bits mixed with its index, finalized as in MurmurHash3."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    h = bits ^ (index * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
