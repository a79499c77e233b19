"""This machine's memory and peak rates: the ceilings that MFU and MBU are fractions of."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from gpt.errors import UserError

clock = time.perf_counter
RUNS = 5  # the fastest counts, because a ceiling is the speed of an undisturbed run
# Bytes read per run: so many that its start-up time does not matter.
PASSES_BYTES = {"cpu": 2**30, "accelerator": 2**34}
LARGEST_READ = 2**30  # bytes in the largest matrix allocated for a measurement
CGROUP_LIMITS = (  # version 2, then version 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory() -> tuple[int, str]:
    """Bytes of memory per device here, and a phrase that says which memory."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], f"what JAX may use of a {devices[0].device_kind}"
    # This machine's memory, or the part of it that a container may use.
    sizes = [psutil.virtual_memory().total]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            sizes.append(int(path.read_text()))
    return min(sizes) // len(devices), "this machine's memory"


def timed(function: Callable, *args) -> tuple[float, object]:
    """Seconds until the result of `function(*args)` is on the device, and the result."""
    start = clock()
    result = jax.block_until_ready(function(*args))
    return clock() - start, result


def best_seconds(function: Callable, *args) -> float:
    """The shortest time of several runs, the first of which also compiles."""
    return min(timed(function, *args)[0] for _ in range(RUNS + 1))


def read_rate(n_bytes: int) -> float:
    """Bytes/s read when multiplying one row by a matrix of about `n_bytes`, as in decoding.

    A matrix that fits in a processor's cache is read faster than memory, so pass the size of
    whatever is compared with this.
    """
    side = max(int((min(n_bytes, LARGEST_READ) / 4) ** 0.5) // 128, 2) * 128
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    passes = max(PASSES_BYTES[kind] // (4 * side * side), 1)

    @jax.jit
    def read(matrix, row):
        return jax.lax.fori_loop(
            0, passes, lambda _, row: jnp.einsum("bd,vd->bv", row, matrix), row
        )

    # The product with a vector of ones is again that vector, so nothing overflows.
    matrix = jnp.full((side, side), 1 / side, "float32")
    return passes * 4 * side * side / best_seconds(read, matrix, jnp.ones((1, side)))


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of one device multiplying large square matrices of `dtype`; measured once."""
    side, passes = 8192, 8
    if jax.default_backend() == "cpu":
        side, passes = 1024, 4

    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, y: x @ y, x))
    matrix = jnp.full((side, side), 1 / side, dtype)
    return passes * 2 * side**3 / best_seconds(multiply, matrix)


def ceilings(n_bytes: int, dtype: str) -> dict[str, float]:
    """The peak rates of reading about `n_bytes`, and of matrix products in `dtype`."""
    return {
        "read_bytes_per_second": read_rate(n_bytes),
        "matmul_flops_per_second": matmul_rate(dtype),
        "read_bytes": n_bytes,
    }


def default_dtype() -> str:
    """The default dtype to compute in; only accelerators gain from bfloat16.

    Raises UserError if JAX finds no device of the kind it was told to use.
    """
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError):  # the latter in JAX 0.10
        raise UserError(
            f"JAX_PLATFORMS is {jax.config.jax_platforms!r}, but JAX finds no such device: install "
            "its plugin (pip install -e '.[cuda]' for NVIDIA GPUs, '.[tpu]' for "
            "TPUs), or leave JAX_PLATFORMS unset"
        ) from None
    return "float32" if backend == "cpu" else "bfloat16"
