"""The KV cache: keys and values of every position so far, with a separate length for each row.

The layout is always [B, K, S, H] per layer. An empty cache has no slots at all; when a prompt is
read into it, the prompt's own keys and values become the cache. Shape letters are defined in
transformer.py.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from gpt.config import ModelConfig
from gpt.sharding import constrain

AXES = ("batch", "kv_heads", None, None)
# Rows and heads are batch dimensions; an index selects a slot, axis 2.
WRITE = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(3,),
    inserted_window_dims=(2,),
    scatter_dims_to_operand_dims=(2,),
    operand_batching_dims=(0, 1),
    scatter_indices_batching_dims=(0, 1),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """`k`, `v`: one [B, K, S, H] array per layer. `length_B`: filled slots per row, int32.

    Slots at or beyond a row's length hold nothing; they are masked, and later overwritten.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[2]

    def advanced(self, n_B: jax.Array) -> "KVCache":
        """The cache with `n_B` more slots marked as filled."""
        return replace(self, length_B=self.length_B + n_B)


def empty(config: ModelConfig, batch_size: int) -> KVCache:
    """A cache without slots, for `batch_size` rows."""
    shape = (batch_size, config.kv_heads, 0, config.head_width)
    layer = jnp.zeros(shape, config.cache_dtype or "float32")
    layers = (layer,) * config.n_layers
    return KVCache(layers, layers, jnp.zeros(batch_size, jnp.int32))


def write(cache_BKSH: jax.Array, new_BKTH: jax.Array, pos_BT: jax.Array | None) -> jax.Array:
    """One layer's cached keys or values, with `new_BKTH` written to slots `pos_BT`.

    Tokens past the end are dropped. If `pos_BT` is None (token t at position t), the cache is empty
    and becomes `new_BKTH`.

    This form of scatter updates in place under donation and needs no communication when rows and
    heads are sharded; simpler forms copy or all-gather the cache.
    """
    new = new_BKTH.astype(cache_BKSH.dtype)
    if pos_BT is None:
        return constrain(new, *AXES)
    index = jnp.broadcast_to(pos_BT[:, None, :, None], (*new.shape[:3], 1))
    out = jax.lax.scatter(cache_BKSH, index, new, WRITE, mode="drop", unique_indices=True)
    return constrain(out, *AXES)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The cache grown to `capacity` slots per row, at least as many as it has."""
    more = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0)]
    k, v = jax.tree.map(lambda a: constrain(jnp.pad(a, more), *AXES), (cache.k, cache.v))
    return replace(cache, k=k, v=v, length_B=constrain(cache.length_B, "batch"))


def select(cache: KVCache, row_R: jax.Array) -> KVCache:
    """Rows `row_R` of the cache, in that order; a row may repeat."""
    k, v, length_B = jax.tree.map(
        lambda a: jnp.take(a, row_R, axis=0), (cache.k, cache.v, cache.length_B)
    )
    k, v = jax.tree.map(lambda a: constrain(a, *AXES), (k, v))
    return KVCache(k, v, length_B)
