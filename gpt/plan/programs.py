"""The programs of sampling, compiled for a mesh from shapes alone.

Shape letters: see gpt/model/transformer.py.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gpt import sharding
from gpt.config import ModelConfig
from gpt.model import kv_cache, transformer
from gpt.sampling import engine

ROWS = 8  # sampled together on each part of the batch axes


def compile_prefill(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Reading prompts, as much of them as is read at once."""
    n_rows, by_row = count_rows(mesh), sharding.rows(mesh)
    shape = (n_rows, prompt_length(config))
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
    lengths_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=by_row)
    weights = abstract_weights(config, mesh)
    with sharding.on_mesh(mesh):
        return engine.prefill.lower(config, weights, tokens_BT, lengths_B).compile()


def compile_decode(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """One decode step with a cache of the whole context."""
    n_rows, by_row = count_rows(mesh), sharding.rows(mesh)
    token_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=by_row)
    active_B = jax.ShapeDtypeStruct((n_rows,), jnp.bool_, sharding=by_row)
    weights = abstract_weights(config, mesh)
    cache = abstract_cache(config, mesh)
    with sharding.on_mesh(mesh):
        return engine.decode_step.lower(config, weights, cache, token_B, active_B).compile()


def count_rows(mesh: Mesh) -> int:
    """Rows that are sampled together on `mesh`."""
    return ROWS * mesh.shape["data"] * mesh.shape["fsdp"]


def prompt_length(config: ModelConfig) -> int:
    """Tokens of a planned prompt: as many as are read at once."""
    return min(engine.PIECE, config.context_length)


def abstract_weights(config: ModelConfig, mesh: Mesh) -> dict:
    """Unstacked weights as sampling keeps them on `mesh`, as shape structs."""
    shapes = jax.eval_shape(transformer.unstack, transformer.abstract(config.for_sampling()))
    axes = transformer.logical_axes(config, stacked=False)
    shardings = sharding.state_shardings(mesh, axes, shapes, sharding.DECODING)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )


def abstract_cache(config: ModelConfig, mesh: Mesh) -> kv_cache.KVCache:
    """A cache of the whole context as sampling keeps it on `mesh`, as shape structs."""

    def full_cache() -> kv_cache.KVCache:
        return kv_cache.grow(kv_cache.empty(config, count_rows(mesh)), config.context_length)

    def placed(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = kv_cache.AXES if a.ndim == len(kv_cache.AXES) else ("batch",)
        split = NamedSharding(mesh, sharding.fitting(mesh, a.shape, names))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split)

    return jax.tree.map(placed, jax.eval_shape(full_cache))


def bytes_on_device(tree) -> int:
    """Bytes of shape structs on the device that holds most of them."""
    leaves = jax.tree.leaves(tree)
    return sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in leaves)
