"""Compare fused with plain attention, in bfloat16, on this machine's device.

    python benchmarks/parity.py

Prints a line per size and exits with 1 if the two differ by more than bfloat16 rounding explains.
Says so if the platform has no fused kernel.
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

# Tokens, query heads, key/value heads, width: GPT-2's, and grouped queries with wide heads. Each
# is compiled once for the device.
SIZES = [(1024, 12, 12, 64), (640, 8, 2, 128)]
PARTS = ("mix", "gradient of q", "gradient of k", "gradient of v")
plain = attention.plain_attention


def inputs(T: int, N: int, K: int, H: int, B: int = 2) -> list[np.ndarray]:
    """Random q_BTNH, k_BKSH, v_BKSH, and a gradient of the output, in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H)
    return [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes]


def with_gradients(attend: Callable, q, k, v, d_mix) -> tuple[jax.Array, ...]:
    """The output of `attend`, and the gradients of its three inputs for `d_mix`."""
    mix, back = jax.vjp(attend, q, k, v)
    return mix, *back(d_mix)


def compare(kernel: Callable, arrays: list[np.ndarray]) -> list[tuple[float, float]]:
    """Relative errors of the kernel and of the plain form, for the output and each gradient.

    An error is the RMS difference from the plain form in float32, over the RMS of its values. The
    host computes these, since full-precision programs compile slowly on a GPU.
    """
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        widened = [array.astype(np.float32) for array in arrays]
        exact = jax.jit(functools.partial(with_gradients, plain))(*widened)

    @jax.jit
    def both(*arrays):
        return with_gradients(kernel, *arrays), with_gradients(plain, *arrays)

    pairs = []
    for of_kernel, of_plain, reference in zip(*both(*arrays), exact, strict=True):
        reference = np.asarray(reference)
        scale = np.sqrt(np.mean(reference**2))
        differences = [np.asarray(found, np.float32) - reference for found in (of_kernel, of_plain)]
        ours, theirs = [float(np.sqrt(np.mean(d**2)) / scale) for d in differences]
        pairs.append((ours, theirs))
    return pairs


def agree(pairs: list[tuple[float, float]]) -> bool:
    """Whether the kernel's errors are at most twice those of the plain form."""
    return all(ours <= 2 * theirs and theirs < 0.02 for ours, theirs in pairs)


def main() -> int:
    """Compare all sizes; return the exit code."""
    platform = flash_attention.platform()
    kernel, fits = flash_attention.KERNELS.get(platform, (None, None))
    all_agree = True
    for sizes in SIZES:
        n_tokens, width = sizes[0], sizes[3]
        if kernel is None or not fits(n_tokens, width, jnp.bfloat16):
            print(f"no fused kernel on {platform} for {sizes}")
            continue
        pairs = compare(kernel, inputs(*sizes))
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
