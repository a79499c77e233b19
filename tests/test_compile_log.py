"""Compilations, as jax's monitoring events report them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from gpt.compile_log import Compilations, Stopwatch, compilations


@contextlib.contextmanager
def kept_in(folder):
    """Every program is kept in `folder` for a while."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    options += ("jax_persistent_cache_min_entry_size_bytes",)
    before = [getattr(jax.config, option) for option in options]
    values = [str(folder), 0.0, -1]
    try:
        for option, value in zip(options, values, strict=True):
            jax.config.update(option, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for option, value in zip(options, before, strict=True):
            jax.config.update(option, value)
        compilation_cache.reset_cache()


def test_each_program_has_its_name_its_seconds_and_its_origin(tmp_path):
    """Compiled, then found on disk. If jax renamed its events, this would notice nothing."""

    def stranger(x):
        return (x @ x).sum()

    n = len(compilations.each)
    with kept_in(tmp_path):
        for _ in range(2):
            with Stopwatch() as watch:
                jax.block_until_ready(jax.jit(stranger)(np.ones((4, 4), np.float32)))
            assert watch.programs and watch.compile_seconds > 0
            jax.clear_caches()
    made = [one for one in compilations.each[n:] if one.name == "stranger"]
    assert [one.cached for one in made] == [False, True]
    assert all(one.seconds > 0 for one in made)


def test_the_seconds_of_a_program_are_its_own():
    """Tracing, lowering and compiling; not those of one that was only traced."""
    seen, name = Compilations(), "/jax/core/compile/"
    seen.on_duration(name + "jaxpr_trace_duration", 5.0, fun_name="shapes_alone")
    seen.on_duration(name + "jaxpr_trace_duration", 1.0, fun_name="step")
    seen.on_duration(name + "jaxpr_to_mlir_module_duration", 2.0, fun_name="jit(step)")
    seen.on_duration("/jax/somewhere/else", 9.0, fun_name="step")
    seen.on_duration(name + "backend_compile_duration", 4.0, fun_name="jit(step)")
    (made,) = seen.each
    assert (made.name, made.seconds, made.cached) == ("step", 7.0, False)
    assert (seen.programs, seen.seconds) == (1, 12.0)


def test_what_runs_again_compiles_nothing():
    double = jax.jit(lambda x: jnp.add(x, x))
    double(np.ones(3))
    with Stopwatch() as watch:
        double(np.zeros(3))
    assert watch.programs == 0


def test_sizes_are_noted_with_what_is_compiled_for_them():
    seen = Compilations()
    with seen.of(batch=2, top=0), seen.of(bucket=32):
        seen.on_duration("/jax/core/compile/backend_compile_duration", 1.0, fun_name="jit(prefill)")
    assert seen.each[0].sizes == "batch 2, bucket 32" and seen.sizes == {}
