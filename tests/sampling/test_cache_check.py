"""The cache contract holds, and each planted bug turns it red."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.model import attention, kv_cache, transformer
from gpt.sampling import cache_check, engine

CONFIG = ModelConfig(300, context_length=64, n_layers=2, n_heads=4, d_model=32)


@pytest.fixture(autouse=True)
def fresh_programs():
    """Compiled programs outlive a planted bug: forget them before and after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def model(config, seed=0):
    params = transformer.init(config, jax.random.key(seed))
    louder = jax.tree.map(lambda a: a * 3 if a.ndim > 2 else a, params)
    return config, transformer.unstack(louder)


def failed(config=CONFIG):
    return {c.name for c in cache_check.run_checks(*model(config)) if not c.passed}


def passes(one_check):
    return one_check(cache_check.make_probe(*model(CONFIG))).passed


@pytest.mark.exact
@pytest.mark.parametrize("n_kv_heads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_contract_holds(n_kv_heads):
    assert failed(dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)) == set()


@pytest.mark.parametrize("context_length", [1, 7])
def test_contract_holds_in_tiny_contexts(context_length):
    assert failed(dataclasses.replace(CONFIG, context_length=context_length)) == set()


def test_contract_holds_in_bfloat16():
    assert failed(CONFIG.computing_in("bfloat16")) == set()


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
    monkeypatch.setattr(
        attention,
        "visible",
        lambda pos, t, s: (
            np.arange(s) <= ((np.arange(t)[None] if pos is None else pos) + 1)[:, :, None]
        ),
    )
    assert not passes(cache_check.check_causality)


def test_neighbour_leaks(monkeypatch):
    honest = attention.attend

    def leaky(q, k, v, pos, drop):
        return honest(q, k, v, pos, drop) + 1e-7 * v.mean()

    monkeypatch.setattr(attention, "attend", leaky)
    assert not passes(cache_check.check_order)


def test_recompiling_setting(monkeypatch):
    honest = cache_check.decode_chunk

    def restless(*args):
        jax.clear_caches()
        return honest(*args)

    monkeypatch.setattr(cache_check, "decode_chunk", restless)
    assert not passes(cache_check.check_programs)


def test_growth_that_loses(monkeypatch):
    honest = engine.grow

    def forgetful(kv, capacity):
        return jax.tree.map(lambda a: a * (kv.capacity == capacity), honest(kv, capacity))

    monkeypatch.setattr(engine, "grow", forgetful)
    assert not passes(cache_check.check_growth)
