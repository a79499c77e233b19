"""Fused attention compared with the plain form, in bfloat16, on the device of this machine.

    python benchmarks/parity.py

Prints a line per size; exit code 1 if they differ by more than bfloat16 rounding explains. On a
platform without a kernel of its own there is nothing to compare, and it says so.
"""

import argparse
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
    """Random q_BTNH, k_BKSH, v_BKSH in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H)
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in pairs]


def with_gradients(attend: Callable, q, k, v) -> list[np.ndarray]:
    """The output of `attend` and the gradients of its three inputs, in float32."""

    @jax.jit
    def run(*args):
        mix, back = jax.vjp(attend, *args)
        return mix, *back(jax.random.normal(jax.random.key(1), mix.shape).astype(mix.dtype))

    return [np.asarray(array, np.float32) for array in run(q, k, v)]


def compare(kernel: Callable, q, k, v) -> list[tuple[float, float]]:
    """Relative errors of the kernel and of the plain form, for the output and each gradient.

    Root mean square of the difference from the plain form in float32, over that of its values.
    """
    with jax.default_matmul_precision("highest"):
        exact = with_gradients(plain, *(a.astype(jnp.float32) for a in (q, k, v)))

    def errors(attend):
        found = zip(with_gradients(attend, q, k, v), exact, strict=True)
        return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in found]

    return list(zip(errors(kernel), errors(plain), strict=True))


def agree(pairs: list[tuple[float, float]]) -> bool:
    """Whether the kernel's errors are at most twice those of the plain form."""
    return all(ours <= 2 * theirs and theirs < 0.02 for ours, theirs in pairs)


def main() -> int:
    """Compare all sizes; returns the exit code."""
    platform = flash_attention.platform()
    kernel, fits = flash_attention.KERNELS.get(platform, (None, None))
    all_agree = True
    for sizes in SIZES:
        n_tokens, width = sizes[0], sizes[3]
        if kernel is None or not fits(n_tokens, width):
            print(f"no fused kernel on {platform} for {sizes}")
            continue
        pairs = compare(kernel, *inputs(*sizes))
        verdict = "agree" if agree(pairs) else "DIFFER"
        if not agree(pairs):
            all_agree = False
        listed = zip(PARTS, pairs, strict=True)
        errors = ", ".join(
            f"{part} {fused:.1e} ({unfused:.1e})" for part, (fused, unfused) in listed
        )
        print(f"{sizes}: {verdict}: {errors}")
    return 0 if all_agree else 1


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
