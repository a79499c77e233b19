"""The cache contract, checked on a model's own weights; for users (`sample.py --check`) and tests.

1. Cached equals uncached: reading a text through the cache, in any pieces, gives the logits of one
   full forward pass with plain attention, which defines the model.
2. Rows are independent: to the bit within one compiled shape, up to rounding across shapes.
3. Nothing recompiles in steady state.
4. Speculation samples the same tokens as plain decoding.
5. The platform's fused attention kernel, if it has one, equals plain attention.

Logits are compared by the root mean square of their difference over the vocabulary, at the worst
position of any row; a maximum over the vocabulary would grow with its size. The tolerance for
rounding is measured on the model itself. In bfloat16 the full pass is some `error` away from the
same pass in float32. A pass through the cache adds the same numbers in another order, with other
kernels, and may be twice as far away, so the two differ by at most 3 * `error`; a wrong mask, slot
or position changes logits by far more. A float32 model has no such reference, so it is allowed a
few units of rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from gpt.compile_log import compilations
from gpt.model import attention, flash_attention, transformer
from gpt.sampling import engine, generate
from gpt.sampling.settings import Settings
from gpt.sharding import on_mesh, platform

FLOAT32_TOLERANCE = 5e-6  # times max(1, std of the logits), like INT8_TOLERANCE
INT8_TOLERANCE = 3e-4  # int8 products cut activations to 15 bits (model/int8.py)
N_TOKENS = 48
N_FUSED_TOKENS = 256  # at most; kernels need multiples of 128
N_ROWS = 3
SWEEP = (
    Settings(temperature=0),
    Settings(temperature=0.7, seed=1),
    Settings(temperature=1.3, top_k=5),
    Settings(top_p=0.9, min_p=0.05),
    Settings(temperature=0, repetition_penalty=1.3, logit_bias={0: 2.0}),
)
SPECULATED = SWEEP[1], SWEEP[3], SWEEP[4]  # one row each: sampled, filtered, greedy with a penalty
forward = jax.jit(transformer.forward, static_argnums=0, static_argnames="attend")


@dataclass(frozen=True)
class Check:
    """Result of one check: what was compared, the largest difference, and what is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        verdict = "ok    " if self.passed else "FAILED"
        return f"{verdict} {self.name}: {self.difference:.2e} (allowed {self.allowed:.2e})"


def rms(difference: np.ndarray) -> float:
    """Root mean square over the vocabulary (the last axis) at the worst position."""
    return float(np.sqrt(np.mean(np.square(difference), axis=-1)).max())


class Probe:
    """A model, random texts, their logits in one full pass, and the `allowed` difference."""

    def __init__(self, model, n_tokens: int = N_TOKENS):
        self.model, self.config, self.params = model, model.config, model.params
        self.T = min(n_tokens, self.config.context_length)
        shape = (N_ROWS, self.T)
        tokens_BT = np.random.default_rng(0).integers(self.config.vocab_size, size=shape)
        self.tokens_BT = tokens_BT.astype(np.int32)
        # A different length for each row, and the steps that all of them can take.
        lengths = [max(1, self.T // 2 - row * (self.T // 6)) for row in range(N_ROWS)]
        self.ragged_B = np.array(lengths, np.int32)
        self.steps = min(6, self.T - lengths[0])

        self.logits_BTV = self.full_pass(attention.plain_attention)
        exact = replace(self.config, compute_dtype="float32", cache_dtype="float32")
        exact_BTV = forward(exact, self.params, self.tokens_BT, attend=attention.plain_attention)
        exact_BTV = np.asarray(exact_BTV)
        has_int8 = any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(self.params))
        tolerance = INT8_TOLERANCE if has_int8 else FLOAT32_TOLERANCE
        in_float32 = tolerance * max(1.0, float(exact_BTV.std()))
        self.allowed = max(in_float32, 3 * rms(self.logits_BTV - exact_BTV))

    def full_pass(self, attend, tokens_BT: np.ndarray | None = None) -> np.ndarray:
        """Uncached logits_BTV."""
        tokens_BT = self.tokens_BT if tokens_BT is None else tokens_BT
        return np.asarray(forward(self.config, self.params, tokens_BT, attend=attend))

    def through_cache(self, rows, n_B, steps: int, *, chunk: int = 1, width=None, capacity=None):
        """logits [steps + 1, B, V] after a prefill of `n_B` tokens of `rows`, padded to `width`,
        and after each of the next `steps` pieces of `chunk` tokens, in a cache of `capacity`.
        `width` and `capacity` default to T."""
        width = width or self.T
        tokens_BT = self.tokens_BT[rows, :width]
        # Pad with wrong tokens: the actual next ones would have the right keys and values.
        is_read_BT = np.arange(width) < n_B[:, None]
        tokens_BT = np.where(is_read_BT, tokens_BT, (tokens_BT + 1) % self.config.vocab_size)
        cache, logits_BV = engine.prefill(self.config, self.params, tokens_BT, n_B)
        cache = engine.grow(cache, capacity or self.T)
        out = [np.asarray(logits_BV)]
        for step in range(steps):
            at_BC = (n_B + step * chunk)[:, None] + np.arange(chunk)
            piece_BC = self.tokens_BT[rows[:, None], at_BC]
            if chunk == 1:
                active_B = np.ones(len(rows), bool)
                cache, logits_BV = engine.decode_step(
                    self.config, self.params, cache, piece_BC[:, 0], active_B
                )
            else:
                read_B = np.full(len(rows), chunk, np.int32)
                cache, logits_BV = engine.extend(self.config, self.params, cache, piece_BC, read_B)
            out.append(np.asarray(logits_BV))
        return np.stack(out)


ROWS = np.arange(N_ROWS)


def check_causality(probe: Probe) -> Check:
    """Changing a token leaves every logit before it unchanged, to the bit."""
    cut = probe.T // 2
    changed = probe.tokens_BT.copy()
    changed[:, cut:] = (changed[:, cut:] + 1) % probe.config.vocab_size
    difference = probe.full_pass(attention.plain_attention, changed) - probe.logits_BTV
    largest = np.abs(difference[:, :cut]).max(initial=0)
    return Check("no token sees its future", float(largest), 0.0)


def check_cached(probe: Probe) -> Check:
    """Invariant 1, for full and padded buckets, growing and fixed caches, single tokens and
    pieces."""
    T = probe.T
    third = max(1, T // 3)
    differences = []
    for prefix, width, capacity in ((1, T, 2 * T), (third, third, T), (max(1, T - 1), T, T)):
        for chunk in (1, 5):
            n_B = np.full(N_ROWS, prefix, np.int32)
            steps = (T - prefix) // chunk
            cached = probe.through_cache(
                ROWS, n_B, steps, chunk=chunk, width=width, capacity=capacity
            )
            full = probe.logits_BTV[:, prefix - 1 :: chunk][:, : steps + 1].swapaxes(0, 1)
            differences.append(rms(cached - full))
    return Check("cached equals uncached", float(np.max(differences)), probe.allowed)


def check_ragged(probe: Probe) -> Check:
    """Invariant 2 across shapes: each row of a ragged batch equals the same row alone."""
    n_B, steps = probe.ragged_B, probe.steps
    together = probe.through_cache(ROWS, n_B, steps)
    alone = [probe.through_cache(ROWS[[r]], n_B[[r]], steps) for r in ROWS]
    difference = together - np.concatenate(alone, axis=1)
    return Check("ragged rows equal themselves alone", rms(difference), probe.allowed)


def check_order(probe: Probe) -> Check:
    """Invariant 2 within one shape: a row's place and neighbours change no bit of it."""
    n_B, steps = probe.ragged_B, probe.steps
    straight = probe.through_cache(ROWS, n_B, steps)
    turned = probe.through_cache(ROWS[::-1], n_B[::-1], steps)[:, ::-1]
    others = np.array([0, 2, 2])
    beside = probe.through_cache(others, n_B[others], steps)
    largest = max(np.abs(straight - turned).max(), np.abs(straight - beside)[:, [0, 2]].max())
    return Check("place and neighbours change no bit", float(largest), 0.0)


def check_programs(probe: Probe) -> Check:
    """Invariant 3: new lengths and settings in shapes already compiled compile nothing.

    On an accelerator the settings choose among a few programs (sampler.py), and each compiles on
    first use.
    """
    n_programs, n_that_compile = 0, 1 if platform() == "cpu" else len(SWEEP)
    for turn, settings in enumerate(SWEEP * 2):
        settings = replace(
            settings, max_new_tokens=5 + turn, ignore_eos=True, on_context_full="stop"
        )
        lengths = np.maximum(probe.ragged_B - turn, 1)
        prompts = [probe.tokens_BT[row, :n].tolist() for row, n in zip(ROWS, lengths, strict=True)]
        before = compilations.programs
        generate.complete(probe.model, prompts, settings)
        if turn >= n_that_compile:
            n_programs += compilations.programs - before
    return Check("new lengths and settings compile nothing", float(n_programs), 0.0)


def check_speculation(probe: Probe) -> Check:
    """Invariant 4, in float32: proposals change no token, even though every 12th is wrong.

    The difference is the number of rows whose text changes. One is allowed, since rounding may
    decide a sample that falls very close to the boundary between two tokens.
    """
    exact = replace(probe.config, compute_dtype="float32", cache_dtype="float32")
    model = replace(probe.model, config=exact)
    prompts = probe.tokens_BT[:, : max(1, 3 * probe.T // 4)].tolist()
    settings = [replace(one, max_new_tokens=20, ignore_eos=True) for one in SPECULATED]
    plain = generate.complete(model, prompts, settings)
    hints = []
    for prompt, completion in zip(prompts, plain, strict=True):
        hint = prompt + completion.token_ids
        hint[::12] = [(token + 1) % exact.vocab_size for token in hint[::12]]
        hints.append(hint)
    settings = [replace(one, speculate=3) for one in settings]
    found = generate.complete(model, prompts, settings, hints=hints)
    n_parted = sum(a.token_ids != b.token_ids for a, b in zip(found, plain, strict=True))
    return Check("rows in which speculation draws another token", float(n_parted), 1.0)


def check_fused(model) -> Check | None:
    """The platform's fused attention, which training and prefill actually run, equals plain
    attention in the model's own precision. None if the platform has no kernel for this model."""
    config = model.config
    T = min(N_FUSED_TOKENS, config.context_length // 128 * 128)
    shape = (N_ROWS, T, config.n_heads, config.head_width)
    queries = jax.ShapeDtypeStruct(shape, config.compute_dtype or "float32")
    if T == 0 or flash_attention.kernel_for(queries) is None:
        return None
    probe = Probe(model, T)
    difference = probe.full_pass(flash_attention.fused_attention) - probe.logits_BTV
    return Check("fused attention equals plain attention", rms(difference), probe.allowed)


CHECKS = (
    check_causality,
    check_cached,
    check_ragged,
    check_order,
    check_programs,
    check_speculation,
)


def run_checks(model) -> Iterator[Check]:
    """Run the whole contract on a model from `gpt.load`, one check at a time.

    All but the last use full-precision matrix products, which a TPU's kernel does not support.
    """
    with jax.default_matmul_precision("highest"), on_mesh(model.mesh):
        probe = Probe(model)
    for check in CHECKS:
        with jax.default_matmul_precision("highest"), on_mesh(model.mesh):
            result = check(probe)
        yield result
    with on_mesh(model.mesh):
        fused = check_fused(model)
    if fused is not None:
        yield fused
