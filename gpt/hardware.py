"""What this machine can hold and do at best: the ceilings that MFU and MBU are fractions of."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

clock = time.perf_counter
RUNS = 5  # the fastest counts: a ceiling is the speed of an undisturbed run
PASSES_BYTES = 2**30  # moved in one run, so that the time to start it does not matter
LARGEST_READ = 2**30  # bytes of the largest matrix made for a measurement
CGROUP_LIMITS = (  # of version 2 and of version 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory() -> tuple[int, str]:
    """Bytes that one device here can hold, and a phrase that says of what."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], f"what JAX may take of a {devices[0].device_kind}"
    return host_bytes() // len(devices), "this machine's memory"


@functools.cache
def host_bytes() -> int:
    """Bytes of memory of this machine, or of the part of it that a container may use."""
    sizes = [psutil.virtual_memory().total]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            sizes.append(int(path.read_text()))
    return min(sizes)


def timed(function: Callable, *args) -> tuple[float, object]:
    """Seconds until the result of `function(*args)` is on the device, and the result."""
    start = clock()
    result = jax.block_until_ready(function(*args))
    return clock() - start, result


def best_seconds(function: Callable, *args) -> float:
    """The shortest time of several runs; the first of them also compiles."""
    return min(timed(function, *args)[0] for _ in range(RUNS + 1))


def square(n: int, dtype: str) -> jax.Array:
    """A matrix [n, n] whose products stay finite: it maps a vector of ones to itself."""
    return jnp.full((n, n), 1 / n, dtype)


def read_side(n_bytes: int) -> int:
    """Side of a square float32 matrix of about `n_bytes`, a multiple of 128."""
    return max(int((min(n_bytes, LARGEST_READ) / 4) ** 0.5) // 128, 2) * 128


@functools.cache
def reader(n: int) -> tuple[Callable, tuple, int]:
    """A program that reads a float32 matrix [n, n] repeatedly, its arguments, and the bytes read.

    Each pass is the product of one row with the matrix, as in decoding.
    """
    passes = max(PASSES_BYTES // (4 * n * n), 1)

    @jax.jit
    def read(matrix, row):
        def one_pass(_, row):
            return jnp.einsum("bd,vd->bv", row, matrix)

        return jax.lax.fori_loop(0, passes, one_pass, row)

    return read, (square(n, "float32"), jnp.ones((1, n))), passes * 4 * n * n


def read_rate(n_bytes: int) -> float:
    """Bytes/s at which the product of one row with a matrix of about `n_bytes` reads the matrix.

    A matrix that fits in a processor's cache is read faster than memory, so give the size of what
    is compared with this.
    """
    read, args, n_read = reader(read_side(n_bytes))
    return n_read / best_seconds(read, *args)


def copy_rate(n_bytes: int) -> float:
    """Bytes/s, read plus written, at which an array of about `n_bytes` is copied."""
    n = read_side(n_bytes)
    passes = max(PASSES_BYTES // (8 * n * n), 1)

    @jax.jit
    def copy(x):
        # Adding the loop index keeps XLA from leaving the copies out.
        return jax.lax.fori_loop(0, passes, lambda i, y: y + i, x)

    return passes * 8 * n * n / best_seconds(copy, square(n, "float32"))


@functools.cache
def multiplier(dtype: str) -> tuple[Callable, tuple, int]:
    """A program that multiplies large square matrices, its arguments, and its FLOPs."""
    n, passes = (1024, 4) if jax.default_backend() == "cpu" else (8192, 8)

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, passes, lambda _, y: x @ y, x)

    return multiply, (square(n, dtype),), passes * 2 * n**3


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of one device multiplying large square matrices of `dtype`; measured once."""
    multiply, args, flops = multiplier(dtype)
    return flops / best_seconds(multiply, *args)


def ceilings(n_bytes: int, dtype: str) -> dict[str, float]:
    """The rates of reading and copying about `n_bytes`, and of matrix products in `dtype`.

    `bare_matvec_mbu` and `bare_matmul_mfu` are the same programs timed by the median of repeats,
    as the benchmark times everything else: if they are not near 1, the machine is not quiet and
    the other fractions mean nothing.
    """
    best_read = read_rate(n_bytes)
    best_matmul = matmul_rate(dtype)
    read, read_args, bytes_read = reader(read_side(n_bytes))
    multiply, multiply_args, flops = multiplier(dtype)
    read_seconds = statistics.median(timed(read, *read_args)[0] for _ in range(RUNS))
    multiply_seconds = statistics.median(timed(multiply, *multiply_args)[0] for _ in range(RUNS))
    return {
        "read_bytes_per_second": best_read,
        "copy_bytes_per_second": copy_rate(n_bytes),
        "matmul_flops_per_second": best_matmul,
        "read_bytes": n_bytes,
        "bare_matvec_mbu": bytes_read / read_seconds / best_read,
        "bare_matmul_mfu": flops / multiply_seconds / best_matmul,
    }


def default_dtype() -> str:
    """The dtype to compute in where nothing says otherwise: only accelerators gain by bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
