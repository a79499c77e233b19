"""Weight matrices as int8 with a float32 scale an output channel, for decoding: a quarter of the
bytes of float32, and decode's speed is that of reading them.

Shape letters: see transformer.py; M rows, I inputs, O outputs of a matrix.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LEVELS = 127  # of each sign: the range is symmetric, -128 is not used


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix of `ints` [*outputs, I] times `scale` [*outputs]: its largest error is scale / 2."""

    ints: jax.Array
    scale: jax.Array

    def __getitem__(self, _) -> "Int8":
        """Itself, because Flax reads a parameter's value as `parameter[...]`."""
        return self

    def __len__(self) -> int:
        return len(self.ints)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The outputs `ids` of a table as float32 vectors, [*ids.shape, I]."""
        return self.ints[ids].astype(jnp.float32) * self.scale[ids][..., None]

    def product(self, x_MI: jax.Array) -> jax.Array:
        """x W in float32, [M, O]."""
        ints_OI = self.ints.reshape(-1, self.ints.shape[-1])
        y_MO = jax.lax.platform_dependent(x_MI, ints_OI, cpu=split_product, default=plain_product)
        return y_MO * self.scale.reshape(-1)


def plain_product(x_MI: jax.Array, ints_OI: jax.Array) -> jax.Array:
    """The integers are converted on their way into the product: free of cost on accelerators."""
    ints_OI = ints_OI.astype(x_MI.dtype)
    return jnp.einsum("MI,OI->MO", x_MI, ints_OI, preferred_element_type=jnp.float32)


def to_levels(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` as int8 times a scale for each of its rows, [..., 1]."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LEVELS
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def split_product(x_MI: jax.Array, ints_OI: jax.Array) -> jax.Array:
    """Products of integers: each row of x as a coarse row and the fine rest of it, 15 bits in all.

    A CPU's product of int8 by float32 would convert the whole matrix at each call.
    """
    x_MI = x_MI.astype(jnp.float32)
    coarse_MI, scale_M1 = to_levels(x_MI)
    fine_MI, fine_scale_M1 = to_levels(x_MI - coarse_MI * scale_M1)
    both_MI = jnp.concatenate([coarse_MI, fine_MI])
    y_MO = jnp.einsum("MI,OI->MO", both_MI, ints_OI, preferred_element_type=jnp.int32)
    coarse_MO, fine_MO = jnp.split(y_MO.astype(jnp.float32), 2)
    return coarse_MO * scale_M1 + fine_MO * fine_scale_M1


def quantize_matrix(w: jax.Array, inputs: tuple[int, ...]) -> Int8:
    """The nearest integers, scaled by the largest weight of each output."""
    outputs = [axis for axis in range(w.ndim) if axis not in inputs]
    shape = [w.shape[axis] for axis in outputs]
    rows = w.transpose(*outputs, *inputs).reshape(*shape, prod(w.shape[i] for i in inputs))
    ints, scale = to_levels(rows.astype(jnp.float32))
    return Int8(ints, scale[..., 0])


def input_axes(path: tuple) -> tuple[int, ...] | None:
    """The axes that the product with the weight at `path` contracts; None: not a matrix."""
    name = path[-1].key
    if name in ("tokens", "head"):
        return (1,)
    if name == "kernel":
        return (0, 1) if path[-2].key == "o" else (0,)
    return None


def map_matrices(function, tree: dict) -> dict:
    """`function(leaf, input_axes)` for each weight that is quantized; the other leaves as they
    are."""

    def convert(path: tuple, leaf):
        inputs = input_axes(path)
        return leaf if inputs is None else function(leaf, inputs)

    return jax.tree_util.tree_map_with_path(convert, tree)


def quantize(params: dict) -> dict:
    """Unstacked weights with every matrix and table as int8; vectors and positions unchanged."""
    return map_matrices(quantize_matrix, params)


def quantize_axes(axes: dict) -> dict:
    """The logical axes of `quantize(params)`, for those of `params`."""

    def convert(names: PartitionSpec, inputs: tuple[int, ...]) -> Int8:
        outputs = [name for axis, name in enumerate(names) if axis not in inputs]
        return Int8(PartitionSpec(*outputs, names[inputs[0]]), PartitionSpec(*outputs))

    return map_matrices(convert, axes)
