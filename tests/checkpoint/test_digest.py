"""The digest sees any one changed element, and agrees with an independent computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt.digest import digest, digest_array

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16"]
SHAPES = [(), (7,), (3, 1, 5), (2, 3, 4, 5)]


def in_numpy(x: np.ndarray) -> int:
    """The digest in 64-bit integers, element by element."""
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    low = np.uint64(2**32 - 1)
    h = bits ^ (np.arange(bits.size, dtype=np.uint64) * np.uint64(0x9E3779B1) & low)
    h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & low
    h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & low
    return int(np.sum(h ^ (h >> np.uint64(16))) % 2**32)


def test_it_agrees_with_numpy_for_every_type_and_shape():
    random, tree = np.random.default_rng(0), {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = random.normal(scale=50, size=shape)
            tree[f"{dtype} {shape}"] = jnp.asarray(values).astype(dtype)
    assert digest(tree) == {name: in_numpy(np.asarray(x)) for name, x in tree.items()}


@pytest.mark.parametrize("axis", [None, 0])
def test_any_flipped_bit_is_seen(axis):
    x = np.arange(100, dtype=np.float32).reshape(4, 25)
    flipped = np.repeat(x[None], 3200, axis=0)
    for i in range(3200):
        flipped[i].reshape(-1).view(np.uint32)[i // 32] ^= np.uint32(1 << i % 32)
    digests = jax.jit(jax.vmap(lambda x: digest_array(x, axis)))(flipped)
    assert not np.any(np.asarray(digests) == digest_array(jnp.asarray(x), axis))


def test_exchanged_elements_are_seen():
    x = jnp.arange(12.0).reshape(3, 4)
    both = digest({"x": x, "rows": x[::-1], "columns": x[:, ::-1]})
    assert len(set(both.values())) == 3
    assert digest({"x": jnp.zeros(4)}) != digest({"x": -jnp.zeros(4)})
