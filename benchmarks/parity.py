"""Fused attention against the plain form, in bfloat16, on the device that is here.

    python benchmarks/parity.py

A line for each size; exit code 1 where they differ by more than bfloat16 rounds. Where the platform
has no kernel of its own there is nothing to compare, which it says.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gpt.model import attention, flash_attention

SIZES = [(1024, 12, 12, 64), (1024, 32, 8, 128), (640, 8, 1, 80), (128, 4, 2, 32)]
PARTS = ("mix", "gradient of q", "gradient of k", "gradient of v")
plain = functools.partial(attention.attend, pos_BT=None, drop=None)


def inputs(T: int, N: int, K: int, H: int, B: int = 2) -> list[jax.Array]:
    """q_BTNH, k_BKSH, v_BKSH of normal numbers, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H)
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in pairs]


def with_gradients(attend: Callable, q, k, v) -> list[np.ndarray]:
    """What `attend` makes of them, and three gradients; float32."""

    @jax.jit
    def run(*args):
        mix, back = jax.vjp(attend, *args)
        return mix, *back(jax.random.normal(jax.random.key(1), mix.shape).astype(mix.dtype))

    return [np.asarray(array, np.float32) for array in run(q, k, v)]


def compare(kernel: Callable, q, k, v) -> list[tuple[float, float]]:
    """Of the mix and each gradient, the root mean square errors of the kernel and of the plain
    form, over the root mean square of what float32 gives."""
    with jax.default_matmul_precision("highest"):
        exact = with_gradients(plain, *(a.astype(jnp.float32) for a in (q, k, v)))

    def errors(attend):
        found = zip(with_gradients(attend, q, k, v), exact, strict=True)
        return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in found]

    return list(zip(errors(kernel), errors(plain), strict=True))


def agree(pairs: list[tuple[float, float]]) -> bool:
    """Whether the kernel is as near to float32 as the plain form is, within a factor of two."""
    return all(ours <= 2 * theirs and theirs < 0.02 for ours, theirs in pairs)


def main() -> int:
    """The exit code."""
    here = flash_attention.platform()
    kernel, fits = flash_attention.KERNELS.get(here, (None, None))
    good = True
    for sizes in SIZES:
        if kernel is None or not fits(sizes[0], sizes[3]):
            print(f"no fused kernel on {here} for {sizes}")
            continue
        pairs = compare(kernel, *inputs(*sizes))
        good &= agree(pairs)
        listed = zip(PARTS, pairs, strict=True)
        errors = ", ".join(f"{part} {ours:.1e} ({theirs:.1e})" for part, (ours, theirs) in listed)
        print(f"{sizes}: {'agree' if agree(pairs) else 'DIFFER'}: {errors}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
