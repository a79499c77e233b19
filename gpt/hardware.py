"""What this machine can hold, and do at best: the ceilings that every figure is a fraction of."""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

clock = time.perf_counter
RUNS = 5  # the best one counts: a ceiling is what nothing disturbed
PASSES_BYTES = 2**30  # read in one run, so that starting it weighs nothing
LARGEST_READ = 2**30
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory() -> tuple[int, str]:
    """Bytes that one device here can hold, and where that is known from."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], f"what JAX may take of a {devices[0].device_kind}"
    return host_bytes() // len(devices), "this machine's memory"


@functools.cache
def host_bytes() -> int:
    """Bytes of memory of this machine, or of the part of it that this process may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text()))
    return min(sizes)


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


def read_side(n_bytes: int) -> int:
    """Side of a float32 matrix of about `n_bytes`, whole tiles of it."""
    return max(int((min(n_bytes, LARGEST_READ) / 4) ** 0.5) // 128, 2) * 128


@functools.cache
def reader(n: int) -> tuple[Callable, tuple, int]:
    """A program that reads a float32 matrix [n, n] again and again, its arguments, its bytes."""
    passes = max(PASSES_BYTES // (4 * n * n), 1)

    @jax.jit
    def read(x, row):
        step = lambda _, row: jnp.einsum("bd,vd->bv", row, x)  # noqa: E731
        return jax.lax.fori_loop(0, passes, step, row)

    return read, (square(n, "float32"), jnp.ones((1, n))), passes * 4 * n * n


def read_rate(n_bytes: int) -> float:
    """Bytes/s at which a product of a matrix of about `n_bytes` and one row reads the matrix.

    What fits in a processor's cache is read faster than memory: so the size is that of the work.
    """
    read, args, n_read = reader(read_side(n_bytes))
    return n_read / best_seconds(read, *args)


def copy_rate(n_bytes: int) -> float:
    """Bytes/s, read and written together, at which an array of about `n_bytes` is copied."""
    n = read_side(n_bytes)
    passes = max(PASSES_BYTES // (8 * n * n), 1)

    @jax.jit
    def copy(x):
        return jax.lax.fori_loop(0, passes, lambda i, y: y + i, x)  # no copy that could be left out

    return passes * 8 * n * n / best_seconds(copy, square(n, "float32"))


@functools.cache
def multiplier(dtype: str) -> tuple[Callable, tuple, int]:
    """A program of products of two large square matrices, its arguments, its FLOPs."""
    n, passes = (1024, 4) if jax.default_backend() == "cpu" else (8192, 8)

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, passes, lambda _, y: x @ y, x)

    return multiply, (square(n, dtype),), passes * 2 * n**3


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of products of two large square matrices of `dtype` on one device; measured once."""
    multiply, args, flops = multiplier(dtype)
    return flops / best_seconds(multiply, *args)


def ceilings(n_bytes: int, dtype: str) -> dict[str, float]:
    """The rates of reading and copying `n_bytes` and of products in `dtype`.

    `bare_..._mbu`, `bare_..._mfu`: what a bare product reads when it is measured like any cell, by
    the median of repeats: near 1, or the other figures are no shares of a ceiling.
    """
    rates = {
        "read_bytes_per_second": read_rate(n_bytes),
        "copy_bytes_per_second": copy_rate(n_bytes),
        "matmul_flops_per_second": matmul_rate(dtype),
        "read_bytes": n_bytes,
    }
    read, read_args, n_read = reader(read_side(n_bytes))
    multiply, args, flops = multiplier(dtype)
    vector = statistics.median(timed(read, *read_args)[0] for _ in range(RUNS))
    matrix = statistics.median(timed(multiply, *args)[0] for _ in range(RUNS))
    bare = {
        "bare_matvec_mbu": n_read / vector / rates["read_bytes_per_second"],
        "bare_matmul_mfu": flops / matrix / rates["matmul_flops_per_second"],
    }
    return rates | bare


def default_dtype() -> str:
    """The type to compute in where nothing says otherwise: only accelerators gain by bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
