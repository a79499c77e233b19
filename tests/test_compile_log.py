"""Compilations, as jax's monitoring events report them."""

import time

import jax
import numpy as np
from programs import keep_compiled

from gpt.compile_log import Compilations, Stopwatch, compilations


def test_each_program_has_its_name_its_seconds_and_its_origin():
    """Compiled, then found on disk. If jax renamed its events, this would notice nothing."""
    keep_compiled()
    salt = time.time_ns() % 1_000_003  # what no earlier run has compiled

    def make():
        def stranger(x):
            return (x @ x).sum() + salt

        return jax.jit(stranger)

    n = len(compilations.each)
    for _ in range(2):
        with Stopwatch() as watch:
            jax.block_until_ready(make()(np.ones((4, 4), np.float32)))
        assert watch.compile_seconds > 0
    made = [one for one in compilations.each[n:] if one.name == "stranger"]
    assert [one.cached for one in made] == [False, True]
    assert all(one.seconds > 0 for one in made)


def test_the_seconds_of_a_program_are_its_own():
    """Tracing, lowering and compiling; not those of one that was only traced. The sizes that it is
    compiled for are noted with it."""
    seen, name = Compilations(), "/jax/core/compile/"
    seen.on_duration(name + "jaxpr_trace_duration", 5.0, fun_name="shapes_alone")
    seen.on_duration(name + "jaxpr_trace_duration", 1.0, fun_name="step")
    seen.on_duration(name + "jaxpr_to_mlir_module_duration", 2.0, fun_name="jit(step)")
    seen.on_duration("/jax/somewhere/else", 9.0, fun_name="step")
    with seen.of(batch=2, top=0), seen.of(bucket=32):
        seen.on_duration(name + "backend_compile_duration", 4.0, fun_name="jit(step)")
    (made,) = seen.each
    assert (made.name, made.seconds, made.cached, made.sizes) == (
        *("step", 7.0, False, "batch 2, bucket 32"),
    )
    assert (seen.programs, seen.seconds, seen.sizes) == (1, 12.0, {})
