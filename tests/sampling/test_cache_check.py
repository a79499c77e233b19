"""The cache contract holds, and each planted bug turns it red, in float32 as in bfloat16."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_models import make_model

from gpt.config import ModelConfig
from gpt.model import attention, flash_attention, kv_cache, transformer
from gpt.sampling import cache_check, generate, speculation

CONFIG = ModelConfig(257, context_length=64, n_layers=2, n_heads=4, d_model=32)
SMALL = dataclasses.replace(CONFIG, context_length=24, n_layers=1)
unused_widths = itertools.count(40)


def unused_model(config):
    """A model that no other test has: programs compiled with a planted bug must serve nobody."""
    return make_model(dataclasses.replace(config, d_ff=next(unused_widths)), loudness=3)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("n_kv_heads", "dtype"),
    [
        (2, "float32"),
        pytest.param(4, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, "float32", marks=pytest.mark.slow),
    ],
)
def test_contract_holds(n_kv_heads, dtype):
    config = dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads).computing_in(dtype)
    results = list(cache_check.run_checks(make_model(config, loudness=3)))
    assert len(results) == 6 and all(result.passed for result in results)


@pytest.mark.parametrize(("context_length", "dtype"), [(1, "float32"), (7, "bfloat16")])
def test_contract_holds_in_tiny_contexts(context_length, dtype):
    config = dataclasses.replace(SMALL, context_length=context_length).computing_in(dtype)
    assert all(result.passed for result in cache_check.run_checks(make_model(config, loudness=3)))


def position_off_by_one(honest):
    return lambda gpt, tokens, pos: honest(gpt, tokens, None if pos is None else pos + 1)


def one_stale_slot(honest):
    """The token at slot 15 is never written."""

    def write(cache, new, pos):
        if pos is not None:
            pos = pos + 999 * (pos == 15)
        return honest(cache, new, pos)

    return write


def mask_one_too_wide(honest):
    def visible(pos, t, s):
        pos = np.arange(t)[None] if pos is None else pos
        return np.arange(s) <= (pos + 1)[:, :, None]

    return visible


def first_rows_length_for_all(honest):
    return lambda cache, n: dataclasses.replace(cache, length_B=cache.length_B + n[0])


def neighbour_leaks(honest):
    return lambda q, k, v, pos, drop: honest(q, k, v, pos, drop) + 1e-7 * v.mean()


def recompiling_setting(honest):
    def recompiling(*args):
        jax.jit(lambda x: x + 1)(0)
        return honest(*args)

    return recompiling


def speculation_with_noise_of_the_next_position(honest):
    def shifted(config, params, state, *rest):
        later = dataclasses.replace(state, dropped_B=state.dropped_B + 1)
        later, sampled = honest(config, params, later, *rest)
        return dataclasses.replace(later, dropped_B=state.dropped_B), sampled

    return shifted


BUGS = {
    position_off_by_one: (transformer.GPT, "embed", cache_check.check_cached),
    one_stale_slot: (kv_cache, "write", cache_check.check_cached),
    first_rows_length_for_all: (kv_cache.KVCache, "advanced", cache_check.check_ragged),
    mask_one_too_wide: (attention, "visible", cache_check.check_causality),
    neighbour_leaks: (attention, "plain_attention", cache_check.check_order),
    recompiling_setting: (generate, "decode_chunk", cache_check.check_programs),
    speculation_with_noise_of_the_next_position: (
        speculation,
        "read_and_accept",
        cache_check.check_speculation,
    ),
}
CASES = [(bug, "float32") for bug in BUGS]
CASES += [(bug, "bfloat16") for bug in (position_off_by_one, one_stale_slot)]


@pytest.mark.parametrize(("bug", "dtype"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_planted_bug_turns_its_check_red(bug, dtype, monkeypatch):
    owner, name, check = BUGS[bug]
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    assert not check(cache_check.Probe(unused_model(SMALL.computing_in(dtype)))).passed


def honest_kernel(q_BTNH, k_BKSH, v_BKSH):
    """Rounds in other places than the plain form, as a real kernel does."""
    q, k, v = (a.astype(jnp.float32) for a in (q_BTNH, k_BKSH, v_BKSH))
    return attention.plain_attention(q, k, v).astype(q_BTNH.dtype)


def test_the_fused_kernel_is_checked_where_there_is_one(monkeypatch):
    """A stand-in for this platform's kernel really runs; a wrong one turns the check red."""
    monkeypatch.setattr(cache_check, "CHECKS", ())
    config = dataclasses.replace(SMALL, context_length=160).computing_in("bfloat16")
    assert cache_check.check_fused(unused_model(config)) is None

    for kernel, passed in ((honest_kernel, True), (lambda q, k, v: honest_kernel(q, v, v), False)):
        shapes = []

        def noting(q_BTNH, k_BKSH, v_BKSH, kernel=kernel, shapes=shapes):
            shapes.append((q_BTNH.shape[1], q_BTNH.dtype.name))
            return kernel(q_BTNH, k_BKSH, v_BKSH)

        monkeypatch.setitem(
            flash_attention.KERNELS,
            flash_attention.platform(),
            (noting, lambda n_tokens, width, dtype: n_tokens % 128 == 0),
        )
        (fused,) = cache_check.run_checks(unused_model(config))
        assert fused.passed == passed
        assert set(shapes) == {(128, "bfloat16")}
    too_short = dataclasses.replace(config, context_length=127)
    assert cache_check.check_fused(unused_model(too_short)) is None
