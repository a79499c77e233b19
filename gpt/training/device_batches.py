"""Batches placed on the devices: each process reads only the rows that its own devices hold."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gpt import sharding
from gpt.config import TrainConfig
from gpt.data import batches
from gpt.data.token_files import Tokens


def batch_of_step(config: TrainConfig, tokens: Tokens, mesh: Mesh, index: int) -> jax.Array:
    """Batch `index`, counted from 0, on its devices: int32 [grad_accum, rows, T+1].

    Step n of a run, counted from 1, trains on batch n - 1.
    """
    A = config.grad_accum
    B = config.batch_size // A

    def read(rows: np.ndarray) -> np.ndarray:
        in_whole_batch = (np.arange(A)[:, None] * B + rows).ravel()
        found = batches.batch(
            tokens, config.seed, index, config.batch_size, config.sequence_length, in_whole_batch
        )
        return found.reshape(A, len(rows), config.sequence_length + 1)

    shape = (A, B, config.sequence_length + 1)
    return make_global_array(sharding.rows(mesh, axis=1), shape, 1, read)


def place_rows(where: NamedSharding, array: np.ndarray) -> jax.Array:
    """An array that every process holds whole, on the devices of `where`, which splits its rows."""
    return make_global_array(where, array.shape, 0, array.__getitem__)


def make_global_array(
    where: NamedSharding,
    shape: tuple[int, ...],
    axis: int,
    read: Callable[[np.ndarray], np.ndarray],
) -> jax.Array:
    """An array of `shape` over all processes that is split along `axis` and nowhere else.

    `read(rows)` returns the part of it with these indices along `axis`; it is called once, with the
    indices that this process's devices hold.
    """

    def span(index: tuple[slice, ...]) -> tuple[int, int]:
        first, end, _ = index[axis].indices(shape[axis])
        return first, end

    device_indices = where.addressable_devices_indices_map(shape).values()
    spans = sorted({span(index) for index in device_indices})
    rows = np.concatenate([np.arange(first, end) for first, end in spans])
    part = read(rows)

    def part_of_device(index: tuple[slice, ...]) -> np.ndarray:
        first, end = np.searchsorted(rows, span(index))
        return part[(*[slice(None)] * axis, slice(first, end))]

    return jax.make_array_from_callback(shape, where, part_of_device)
