"""Load each step's batch from the token files onto the devices that train on it.

A batch's tokens depend only on the seed and the step (gpt/data/batches.py), so a resumed run
continues where it stopped.
"""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from gpt import sharding
from gpt.config import TrainConfig
from gpt.data import batches
from gpt.data.token_files import Mixture, Tokens


def load_batches(
    config: TrainConfig, mesh: Mesh, tokens: Tokens | Mixture, steps_done: int, until: int
) -> Iterator[tuple[int, jax.Array]]:
    """(step, batch) for each step after `steps_done`, up to `until`."""
    load = functools.partial(load_batch, config, mesh, tokens)
    return enumerate(batches.prefetch(load, steps_done, until), steps_done + 1)


def load_batch(config: TrainConfig, mesh: Mesh, tokens: Tokens | Mixture, index: int) -> jax.Array:
    """Batch `index`, counted from 0, on its devices: int32 [grad_accum, rows, T+1].

    Step n of a run, counted from 1, trains on batch n - 1. Each process reads only the rows
    its own devices hold.
    """
    A = config.grad_accum
    B = config.batch_size // A
    T = config.sequence_length

    @functools.cache  # several devices may hold the same rows
    def read(first: int, end: int) -> np.ndarray:
        rows = np.arange(A)[:, None] * B + np.arange(first, end)  # of the whole batch
        found = batches.batch(tokens, config.seed, index, config.batch_size, T, rows.ravel())
        return found.reshape(A, end - first, T + 1)

    def part_of_device(where: tuple[slice, ...]) -> np.ndarray:
        first, end, _ = where[1].indices(B)
        return read(first, end)

    sharded = sharding.rows(mesh, axis=1)
    return jax.make_array_from_callback((A, B, T + 1), sharded, part_of_device)
