"""The programs of a run and of sampling, compiled for a mesh; shapes alone, no arrays.

Shape letters: see model/transformer.py.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gpt import sharding
from gpt.config import ModelConfig
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.sampling import engine

ROWS = 8  # sampled together on each part of the batch axes


def place(mesh: Mesh, shapes, axes, rules: dict = sharding.RULES):
    """Shape structs, each with the sharding of its logical axes."""
    shardings = sharding.state_shardings(mesh, axes, shapes, rules)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )


def abstract_weights(config: ModelConfig, mesh: Mesh) -> dict:
    """Unstacked weights as sampling keeps them on `mesh`."""
    shapes = jax.eval_shape(transformer.unstack, transformer.abstract(config))
    return place(mesh, shapes, transformer.unstacked_axes(config), sharding.DECODING)


def abstract_cache(config: ModelConfig, mesh: Mesh, n_rows: int, slots: int) -> kv.KVCache:
    """A cache of `slots` slots a row as sampling keeps it on `mesh`."""
    grow = partial(kv.grow, capacity=slots)
    shapes = jax.eval_shape(lambda: grow(kv.empty(config, n_rows)))

    def one(a):
        names = kv.AXES if a.ndim == len(kv.AXES) else ("batch",)
        split = NamedSharding(mesh, sharding.fitting(mesh, a.shape, names))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split)

    return jax.tree.map(one, shapes)


def count_rows(mesh: Mesh) -> int:
    """Rows that are sampled together on `mesh`."""
    return ROWS * mesh.shape["data"] * mesh.shape["fsdp"]


def prompt_length(config: ModelConfig) -> int:
    """Tokens of the prompts that are planned for: as many as are read at once, T."""
    return min(engine.PIECE, config.context_length)


def compile_prefill(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Reading ROWS prompts on each part of the batch axes."""
    rows, n_rows = sharding.rows(mesh), count_rows(mesh)
    tokens = jax.ShapeDtypeStruct((n_rows, prompt_length(config)), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=rows)
    with sharding.on_mesh(mesh):
        weights = abstract_weights(config, mesh)
        return engine.prefill.lower(config, weights, tokens, lengths).compile()


def compile_decode(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """One step of ROWS rows on each part of the batch axes, with a cache of the whole context."""
    rows, n_rows = sharding.rows(mesh), count_rows(mesh)
    token = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=rows)
    active = jax.ShapeDtypeStruct((n_rows,), jnp.bool_, sharding=rows)
    with sharding.on_mesh(mesh):
        cache = abstract_cache(config, mesh, n_rows, config.context_length)
        weights = abstract_weights(config, mesh)
        return engine.decode_step.lower(config, weights, cache, token, active).compile()


def bytes_on_device(tree) -> int:
    """Bytes of shape structs on the device that keeps most of them."""
    leaves = jax.tree.leaves(tree)
    sizes = (leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
    return sum(
        leaf.dtype.itemsize * math.prod(size) for leaf, size in zip(leaves, sizes, strict=True)
    )
