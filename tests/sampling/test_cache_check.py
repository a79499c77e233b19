"""The cache contract holds, and each planted bug turns it red."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.model import attention, flash_attention, kv_cache, transformer
from gpt.sampling import cache_check, engine

CONFIG = ModelConfig(300, context_length=64, n_layers=2, n_heads=4, d_model=32)
unused_sizes = itertools.count(40)


def model(config, seed=0):
    params = transformer.init(config, jax.random.key(seed))
    louder = jax.tree.map(lambda a: a * 3 if a.ndim > 2 else a, params)
    return config, transformer.unstack(louder)


def failed(config):
    return {c.name for c in cache_check.run_checks(*model(config)) if not c.passed}


def passes(one_check):
    """Whether one check passes on a small model that no other test has: programs compiled with a
    planted bug must serve nobody else."""
    config = dataclasses.replace(
        CONFIG, vocab_size=next(unused_sizes), context_length=24, n_layers=1
    )
    return one_check(cache_check.make_probe(*model(config))).passed


@pytest.mark.exact
@pytest.mark.parametrize(
    "n_kv_heads",
    [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_contract_holds(n_kv_heads):
    assert failed(dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)) == set()


@pytest.mark.parametrize(("context_length", "dtype"), [(1, "float32"), (7, "bfloat16")])
def test_contract_holds_in_tiny_contexts(context_length, dtype):
    config = dataclasses.replace(CONFIG, context_length=context_length, n_layers=1)
    assert failed(config.computing_in(dtype)) == set()


def test_position_off_by_one(monkeypatch):
    honest = transformer.GPT.embed
    monkeypatch.setattr(
        transformer.GPT,
        "embed",
        lambda self, t, pos: honest(self, t, None if pos is None else pos + 1),
    )
    assert not passes(cache_check.check_cached)


def test_first_rows_length_for_all(monkeypatch):
    monkeypatch.setattr(
        kv_cache.KVCache,
        "advanced",
        lambda self, n: dataclasses.replace(self, length_B=self.length_B + n[0]),
    )
    assert not passes(cache_check.check_ragged)


def test_mask_one_too_wide(monkeypatch):
    honest = attention.visible
    monkeypatch.setattr(
        attention, "visible", lambda pos, t, s: honest(None if pos is None else pos + 1, t, s)
    )
    assert not passes(cache_check.check_cached)


def test_mask_one_too_wide_everywhere(monkeypatch):
    def visible(pos, t, s):
        pos = np.arange(t)[None] if pos is None else pos
        return np.arange(s) <= (pos + 1)[:, :, None]

    monkeypatch.setattr(attention, "visible", visible)
    assert not passes(cache_check.check_causality)


def test_neighbour_leaks(monkeypatch):
    honest = attention.attend

    def leaky(q, k, v, pos, drop):
        return honest(q, k, v, pos, drop) + 1e-7 * v.mean()

    monkeypatch.setattr(attention, "attend", leaky)
    assert not passes(cache_check.check_order)


def test_recompiling_setting(monkeypatch):
    honest = cache_check.decode_chunk

    def recompiling(*args):
        jax.jit(lambda x: x + 1)(0)
        return honest(*args)

    monkeypatch.setattr(cache_check, "decode_chunk", recompiling)
    assert not passes(cache_check.check_programs)


def test_growth_that_loses(monkeypatch):
    honest = engine.grow

    def forgetful(kv, capacity):
        return jax.tree.map(lambda a: a * (kv.capacity == capacity), honest(kv, capacity))

    monkeypatch.setattr(engine, "grow", forgetful)
    assert not passes(cache_check.check_growth)


def honest_kernel(q_BTNH, k_BKSH, v_BKSH):
    return attention.attend(q_BTNH, k_BKSH, v_BKSH, None, None)


def test_the_fused_kernel_is_checked_where_there_is_one(monkeypatch):
    """A stand-in for this platform's kernel really runs; a wrong one turns the check red."""
    monkeypatch.setattr(cache_check, "CHECKS", ())
    config = dataclasses.replace(CONFIG, context_length=160, n_layers=1).computing_in("bfloat16")
    config, params = model(dataclasses.replace(config, vocab_size=next(unused_sizes)))
    assert cache_check.check_fused(config, params) is None

    for kernel, passed in ((honest_kernel, True), (lambda q, k, v: honest_kernel(q, v, v), False)):
        shapes = []

        def noting(q_BTNH, k_BKSH, v_BKSH, kernel=kernel, shapes=shapes):
            shapes.append((q_BTNH.shape[1], q_BTNH.dtype.name))
            return kernel(q_BTNH, k_BKSH, v_BKSH)

        monkeypatch.setitem(
            flash_attention.KERNELS,
            flash_attention.platform(),
            (noting, lambda n_tokens, width: n_tokens % 128 == 0),
        )
        config, params = model(dataclasses.replace(config, vocab_size=next(unused_sizes)))
        (fused,) = cache_check.run_checks(config, params)
        assert fused.passed == passed
        assert set(shapes) == {(128, "bfloat16")}
    short, params = model(dataclasses.replace(config, context_length=127))
    assert cache_check.check_fused(short, params) is None
