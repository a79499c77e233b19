"""Weight matrices as int8 with a float32 scale per output channel, for decoding.

They take a quarter of the bytes of float32, and decoding is as fast as weights can be read.
Shape letters are defined in transformer.py; here also M rows, I inputs, O outputs of a matrix.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LEVELS = 127  # per sign; the range is symmetric, so -128 is not used


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix stored as `ints` [*outputs, I] times `scale` [*outputs], accurate to scale / 2."""

    ints: jax.Array
    scale: jax.Array

    def __getitem__(self, _) -> "Int8":
        """Itself, because Flax reads a parameter's value as `parameter[...]`."""
        return self

    def __len__(self) -> int:
        return len(self.ints)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` of a table as float32 vectors, [*ids.shape, I]."""
        return self.ints[ids].astype(jnp.float32) * self.scale[ids][..., None]

    def product(self, x_MI: jax.Array) -> jax.Array:
        """x W in float32, [M, O]."""
        ints_OI = self.ints.reshape(-1, self.ints.shape[-1])
        y_MO = jax.lax.platform_dependent(x_MI, ints_OI, cpu=split_product, default=plain_product)
        return y_MO * self.scale.reshape(-1)


def plain_product(x_MI: jax.Array, ints_OI: jax.Array) -> jax.Array:
    """x W, with the integers converted inside the product, which is free on accelerators."""
    ints_OI = ints_OI.astype(x_MI.dtype)
    return jnp.einsum("MI,OI->MO", x_MI, ints_OI, preferred_element_type=jnp.float32)


def to_levels(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` as int8, and a scale per row, [..., 1]."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LEVELS
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def split_product(x_MI: jax.Array, ints_OI: jax.Array) -> jax.Array:
    """x W in integers: each row of x is split into coarse and fine parts, 15 bits in all.

    To multiply int8 by float32, a CPU would convert the whole matrix on every call.
    """
    x_MI = x_MI.astype(jnp.float32)
    coarse_MI, scale_M1 = to_levels(x_MI)
    fine_MI, fine_scale_M1 = to_levels(x_MI - coarse_MI * scale_M1)
    both_MI = jnp.concatenate([coarse_MI, fine_MI])
    y_MO = jnp.einsum("MI,OI->MO", both_MI, ints_OI, preferred_element_type=jnp.int32)
    coarse_MO, fine_MO = jnp.split(y_MO.astype(jnp.float32), 2)
    return coarse_MO * scale_M1 + fine_MO * fine_scale_M1


def quantize_matrix(w: jax.Array, inputs: tuple[int, ...]) -> Int8:
    """The nearest integers, with each output scaled by its largest weight."""
    outputs = [axis for axis in range(w.ndim) if axis not in inputs]
    shape = [w.shape[axis] for axis in outputs]
    rows = w.transpose(*outputs, *inputs).reshape(*shape, prod(w.shape[i] for i in inputs))
    ints, scale = to_levels(rows.astype(jnp.float32))
    return Int8(ints, scale[..., 0])


def input_axes(path: tuple) -> tuple[int, ...] | None:
    """The axes contracted in a product with the weight at `path`; None if it is not a matrix."""
    name = path[-1].key
    if name in ("tokens", "head"):
        return (1,)
    if name == "kernel":
        return (0, 1) if path[-2].key == "o" else (0,)
    return None


def map_matrices(function, tree: dict) -> dict:
    """`tree` with `function(leaf, input_axes)` applied to each weight to be quantized."""

    def convert(path: tuple, leaf):
        inputs = input_axes(path)
        return leaf if inputs is None else function(leaf, inputs)

    return jax.tree_util.tree_map_with_path(convert, tree)


def quantize(params: dict) -> dict:
    """Unstacked weights with every matrix and table as int8; vectors and positions unchanged."""
    return map_matrices(quantize_matrix, params)


def quantize_axes(axes: dict) -> dict:
    """The logical axes of `quantize(params)`, given those of `params`."""

    def convert(names: PartitionSpec, inputs: tuple[int, ...]) -> Int8:
        outputs = [name for axis, name in enumerate(names) if axis not in inputs]
        return Int8(PartitionSpec(*outputs, names[inputs[0]]), PartitionSpec(*outputs))

    return map_matrices(convert, axes)
