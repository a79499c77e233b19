"""What this machine can do at best: the ceilings that every figure is a fraction of."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

clock = time.perf_counter
RUNS = 5  # the best one counts: a ceiling is what nothing disturbed
PASSES_BYTES = 2**30  # read in one run, so that starting it weighs nothing
LARGEST_READ = 2**30


def timed(function: Callable, *args) -> tuple[float, object]:
    """Seconds until the result of `function(*args)` is there, and the result."""
    begun = clock()
    result = jax.block_until_ready(function(*args))
    return clock() - begun, result


def best_seconds(function: Callable, *args) -> float:
    """The shortest of several runs, after one that compiles."""
    return min(timed(function, *args)[0] for _ in range(RUNS + 1))


def square(n: int, dtype: str) -> jax.Array:
    """A matrix [n, n] that keeps a vector of ones as it is, product after product."""
    return jnp.full((n, n), 1 / n, dtype)


def read_rate(n_bytes: int) -> float:
    """Bytes/s at which a product of a matrix of about `n_bytes` and one row reads the matrix.

    What fits in a processor's cache is read faster than memory: so the size is that of the work.
    """
    n = max(int((min(n_bytes, LARGEST_READ) / 4) ** 0.5) // 128, 2) * 128
    passes = max(PASSES_BYTES // (4 * n * n), 1)

    @jax.jit
    def read(x, row):
        step = lambda _, row: jnp.einsum("bd,vd->bv", row, x)  # noqa: E731
        return jax.lax.fori_loop(0, passes, step, row)

    return passes * 4 * n * n / best_seconds(read, square(n, "float32"), jnp.ones((1, n)))


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of products of two large square matrices of `dtype` on one device; measured once."""
    n, passes = (1024, 4) if jax.default_backend() == "cpu" else (8192, 8)

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, passes, lambda _, y: x @ y, x)

    return passes * 2 * n**3 / best_seconds(multiply, square(n, dtype))


def ceilings(n_bytes: int, dtype: str) -> dict[str, float]:
    """The read rate on `n_bytes` and the matrix product's rate in `dtype`."""
    return {
        "read_bytes_per_second": read_rate(n_bytes),
        "matmul_flops_per_second": matmul_rate(dtype),
        "read_bytes": n_bytes,
    }
