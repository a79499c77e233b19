"""Batches on their way to the devices: each process reads only the rows that its devices hold."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gpt import sharding
from gpt.config import TrainConfig
from gpt.data import batches
from gpt.data.token_files import Tokens


def batch(config: TrainConfig, tokens: Tokens, mesh: Mesh, index: int) -> jax.Array:
    """The batch of step `index`, from 0 on, on its devices: int32 [grad_accum, rows, T+1]."""
    c, A, B = config, config.grad_accum, config.batch_size // config.grad_accum

    def read(rows: np.ndarray) -> np.ndarray:
        every = (np.arange(A)[:, None] * B + rows).ravel()
        mine = batches.batch(tokens, c.seed, index, c.batch_size, c.window, every)
        return mine.reshape(A, len(rows), c.window + 1)

    return from_rows(sharding.rows(mesh, axis=1), (A, B, c.window + 1), 1, read)


def place(where: NamedSharding, array: np.ndarray) -> jax.Array:
    """An array that every process has whole on the devices of `where`, which splits its rows."""
    return from_rows(where, array.shape, 0, array.__getitem__)


def from_rows(
    where: NamedSharding,
    shape: tuple[int, ...],
    axis: int,
    read: Callable[[np.ndarray], np.ndarray],
) -> jax.Array:
    """An array of `shape` over all processes, whose rows lie along `axis`, the only one split.

    `read(rows)`: the part of it that has these rows, which are this process's, each named once.
    """

    def span(index: tuple[slice, ...]) -> tuple[int, int]:
        return index[axis].indices(shape[axis])[:2]

    spans = sorted({span(i) for i in where.addressable_devices_indices_map(shape).values()})
    rows = np.concatenate([np.arange(*one) for one in spans])
    part = read(rows)

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        first, end = np.searchsorted(rows, span(index))
        return part[(*[slice(None)] * axis, slice(first, end))]

    return jax.make_array_from_callback(shape, where, of_device)
