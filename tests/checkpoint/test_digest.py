"""The digest sees any one changed element, and agrees with an independent computation."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.digest import digest, digest_array

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16", "bool"]


def in_numpy(x: np.ndarray) -> int:
    """The digest in 64-bit integers, element by element."""
    if x.dtype == bool:
        bits = x.astype(np.uint64)
    else:
        bits = x.reshape(-1).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    bits, low = bits.reshape(-1), np.uint64(2**32 - 1)
    h = bits ^ (np.arange(bits.size, dtype=np.uint64) * np.uint64(0x9E3779B1) & low)
    h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & low
    h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & low
    return int(np.sum(h ^ (h >> np.uint64(16))) % 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 1, 5), (2, 3, 4, 5)])
def test_agrees_with_numpy(dtype, shape):
    values = np.random.default_rng(0).normal(scale=50, size=shape)
    x = jnp.asarray(values > 0 if dtype == "bool" else values).astype(dtype)
    assert digest({"x": x}) == {"x": in_numpy(np.asarray(x))}


@settings(deadline=None)  # the first one compiles
@given(st.integers(0, 99), st.integers(0, 31))
def test_one_flipped_bit_is_always_seen(element, bit):
    x = np.arange(100, dtype=np.float32).reshape(4, 25)
    flipped = x.copy()
    flipped.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
    assert digest_array(jnp.asarray(x)) != digest_array(jnp.asarray(flipped))


def test_exchanged_elements_are_seen():
    x = jnp.arange(12.0).reshape(3, 4)
    assert digest({"x": x}) != digest({"x": x[::-1]})
    assert digest({"x": x}) != digest({"x": x[:, ::-1]})
    assert digest({"x": jnp.zeros(4)}) != digest({"x": -jnp.zeros(4)})


def test_an_empty_tree_has_no_digests():
    assert digest({}) == {}
