"""The cache contract, checked on a model's own weights; for users (`sample.py --check`) and tests.

1. Cached equals uncached: reading a text through the cache, in any pieces, gives the logits of one
   full forward pass.
2. Rows are independent: to the bit within one compiled shape, within rounding across shapes.
3. Nothing recompiles in steady state.

These are checked with products in full precision, where no fused attention kernel fits. A last
check runs what training and prefill really run on this platform: the fused kernel, if there is one,
in the precision of the model, against plain attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt.compile_log import Stopwatch
from gpt.config import ModelConfig
from gpt.model import attention, flash_attention, transformer
from gpt.sampling import engine, generate
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.decode_loop import DecodeState, decode_chunk, start_decoding
from gpt.sampling.settings import Settings
from gpt.sharding import on_mesh

# Times max(1, std of the logits). int8 weights meet activations cut to 15 bits (model/int8.py).
TOLERANCE = {"float32": 2e-5, "int8": 1e-3, "bfloat16": 6e-2}
N_TOKENS = 48
N_FUSED_TOKENS = 256  # at most; kernels want multiples of 128
N_ROWS = 3
SWEEP = (
    Settings(temperature=0),
    Settings(temperature=0.7, seed=1),
    Settings(temperature=1.3, top_k=5),
    Settings(top_p=0.9, min_p=0.05),
    Settings(temperature=0, repetition_penalty=1.3, logit_bias={0: 2.0}),
)


@dataclass(frozen=True)
class Check:
    """One line of the contract: what was compared, the largest difference, and what is allowed."""

    name: str
    largest: float
    allowed: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        verdict = "ok    " if self.passed else "FAILED"
        return f"{verdict} {self.name}: {self.largest:.2e} (allowed {self.allowed:.2e})"


@dataclass(frozen=True)
class Probe:
    """A model, texts to read through it and the logits of one full pass over them."""

    config: ModelConfig
    params: dict
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray

    @property
    def allowed(self) -> float:
        """Largest rounding difference between two compiled shapes."""
        types = {leaf.dtype.name for leaf in jax.tree.leaves(self.params)} & {"int8"}
        types |= {self.config.compute_dtype or "float32", self.config.cache_dtype or "float32"}
        tolerance = max(TOLERANCE[name] for name in types)
        return tolerance * max(1.0, float(self.logits_BTV.std()))

    def read(self, tokens_BT, n_B, width: int, capacity: int):
        """Prefill of rows with `n_B` tokens in a bucket `width`, then room for `capacity`."""
        padded = np.zeros((len(n_B), width), np.int32)
        padded[:, : tokens_BT.shape[1]] = tokens_BT[:, :width]
        cache, logits_BV = engine.prefill(self.config, self.params, padded, np.asarray(n_B))
        return engine.grow(cache, capacity), logits_BV

    def through_cache(self, prefix: int, chunk: int, capacity: int) -> Iterator[tuple]:
        """(tokens read, logits_BV) after the prefix and after each chunk that follows."""
        B, T = self.tokens_BT.shape
        cache, logits_BV = self.read(self.tokens_BT[:, :prefix], [prefix] * B, T, capacity)
        yield prefix, np.asarray(logits_BV)
        for end in range(prefix + chunk, T + 1, chunk):
            piece_BT = self.tokens_BT[:, end - chunk : end]
            if chunk == 1:
                active_B = np.ones(B, bool)
                cache, logits_BV = engine.decode_step(
                    self.config, self.params, cache, piece_BT[:, 0], active_B
                )
            else:
                n_B = np.full(B, chunk, np.int32)
                cache, logits_BV = engine.extend(self.config, self.params, cache, piece_BT, n_B)
            yield end, np.asarray(logits_BV)

    def follow(self, rows, n_B, steps: int, narrow: bool = False) -> np.ndarray:
        """logits [steps + 1, B, V]: prefill `n_B` tokens of `rows`, then decode what follows.

        In a bucket and a capacity of T; `narrow`: in the smallest that hold what is read.
        """
        T = self.tokens_BT.shape[1]
        width = capacity = T
        if narrow:
            width, capacity = int(n_B.max()), int(n_B.max()) + steps
        cache, logits_BV = self.read(self.tokens_BT[rows], n_B, width, capacity)
        out = [np.asarray(logits_BV)]
        active_B = np.ones(len(rows), bool)
        for i in range(steps):
            token_B = self.tokens_BT[rows, n_B + i]
            cache, logits_BV = engine.decode_step(
                self.config, self.params, cache, token_B, active_B
            )
            out.append(np.asarray(logits_BV))
        return np.stack(out)


def make_probe(config: ModelConfig, params: dict, seed: int = 0) -> Probe:
    """Random texts for a model with unstacked weights, and their uncached logits."""
    T = min(N_TOKENS, config.context_length)
    tokens_BT = random_tokens(config, T, seed)
    forward = jax.jit(transformer.forward, static_argnums=0)
    return Probe(config, params, tokens_BT, np.asarray(forward(config, params, tokens_BT)))


def random_tokens(config: ModelConfig, T: int, seed: int = 0) -> np.ndarray:
    tokens_BT = np.random.default_rng(seed).integers(config.vocab_size, size=(N_ROWS, T))
    return tokens_BT.astype(np.int32)


def check_causality(probe: Probe) -> Check:
    """Changing a token changes no logit before it, to the bit."""
    forward = jax.jit(transformer.forward, static_argnums=0)
    cut = probe.tokens_BT.shape[1] // 2
    changed = probe.tokens_BT.copy()
    changed[:, cut:] = (changed[:, cut:] + 1) % probe.config.vocab_size
    after = np.asarray(forward(probe.config, probe.params, changed))
    largest = np.abs(after - probe.logits_BTV)[:, :cut].max(initial=0)
    return Check("no token sees its future", float(largest), 0.0)


def check_cached(probe: Probe) -> Check:
    """Invariant 1 over prefix x chunk x capacity."""
    T = probe.tokens_BT.shape[1]
    prefixes = {1, T // 3, T - 1}
    chunks = {1, 5}
    differences = [
        np.abs(logits_BV - probe.logits_BTV[:, end - 1]).max()
        for prefix, chunk, capacity in product(prefixes, chunks, (T, 2 * T))
        for end, logits_BV in probe.through_cache(max(prefix, 1), chunk, capacity)
    ]
    return Check("cached equals uncached", float(np.max(differences)), probe.allowed)


def ragged(probe: Probe) -> tuple[np.ndarray, int]:
    """A different length for each row, and how many steps all of them can take."""
    T = probe.tokens_BT.shape[1]
    n_B = np.array([max(1, T // 2 - row * (T // 6)) for row in range(N_ROWS)], np.int32)
    return n_B, min(6, T - int(n_B.max()))


def check_ragged(probe: Probe) -> Check:
    """Invariant 2 across shapes: each row of a ragged batch equals itself alone."""
    n_B, steps = ragged(probe)
    rows = np.arange(N_ROWS)
    together = probe.follow(rows, n_B, steps)
    alone = [probe.follow(rows[[r]], n_B[[r]], steps)[:, 0] for r in rows]
    largest = np.abs(together - np.stack(alone, axis=1)).max()
    return Check("ragged rows equal themselves alone", float(largest), probe.allowed)


def check_bucket(probe: Probe) -> Check:
    """Invariant 2 across shapes: neither the bucket nor the capacity changes a logit."""
    n_B, steps = ragged(probe)
    rows = np.arange(N_ROWS)
    difference = probe.follow(rows, n_B, steps) - probe.follow(rows, n_B, steps, narrow=True)
    name = "padding and capacity change nothing"
    return Check(name, float(np.abs(difference).max()), probe.allowed)


def check_order(probe: Probe) -> Check:
    """Invariant 2 within one shape: place and neighbours change no bit."""
    n_B, steps = ragged(probe)
    rows = np.arange(N_ROWS)
    straight = probe.follow(rows, n_B, steps)
    turned = probe.follow(rows[::-1], n_B[::-1], steps)[:, ::-1]
    beside = probe.follow(np.array([0, 2, 2]), n_B[[0, 2, 2]], steps)[:, [0, 2]]
    largest = max(
        np.abs(straight - turned).max(initial=0), np.abs(straight[:, [0, 2]] - beside).max()
    )
    return Check("place and neighbours change no bit", float(largest), 0.0)


def check_growth(probe: Probe) -> Check:
    """A cache grown on the way holds what a large one holds, to the bit."""
    n_B, _ = ragged(probe)
    T = probe.tokens_BT.shape[1]
    grown, _ = probe.read(probe.tokens_BT, n_B, T, 2 * T)
    slots = np.arange(T)[None, None, :, None] < n_B[:, None, None, None]
    small, _ = probe.read(probe.tokens_BT, n_B, T, T)
    pairs = zip(
        jax.tree.leaves((grown.k, grown.v)), jax.tree.leaves((small.k, small.v)), strict=True
    )
    largest = max(float(jnp.abs(jnp.where(slots, a[:, :, :T] - b, 0)).max()) for a, b in pairs)
    return Check("growing the cache loses nothing", largest, 0.0)


def check_programs(probe: Probe) -> Check:
    """Invariant 3: decode steps at new lengths and settings compile nothing."""
    n_B, _ = ragged(probe)
    T, V = probe.tokens_BT.shape[1], probe.config.vocab_size
    watch = Stopwatch()
    for i, settings in enumerate(SWEEP):
        sampling = generate.sampling_params([settings] * N_ROWS, V, NO_TOKEN)
        with watch if i else Stopwatch():  # the first turn compiles
            cache, logits_BV = probe.read(probe.tokens_BT, np.maximum(n_B - i, 1), T, 2 * T)
            state = DecodeState(
                cache=cache,
                token_B=jnp.zeros(N_ROWS, jnp.int32),
                remaining_B=jnp.full(N_ROWS, i + 5, jnp.int32),
                seen_BV=jnp.zeros((N_ROWS, V), bool),
                dropped_B=jnp.zeros(N_ROWS, jnp.int32),
                eot=jnp.int32(NO_TOKEN),
            )
            state, _ = start_decoding(state, logits_BV, sampling)
            for _ in range(2):
                active_B = np.ones(N_ROWS, bool)
                state, _ = decode_chunk(probe.config, probe.params, state, sampling, active_B, 2)
    return Check("new lengths and settings compile nothing", float(watch.programs), 0.0)


def check_fused(config: ModelConfig, params: dict) -> Check | None:
    """What training and prefill really run: the platform's fused attention, in the precision of the
    model, equals plain attention. None if the platform has no kernel for this model."""
    T = min(N_FUSED_TOKENS, config.context_length // 128 * 128)
    queries = jax.ShapeDtypeStruct(
        (N_ROWS, T, config.n_heads, config.head_width), config.compute_dtype or "float32"
    )
    if T == 0 or flash_attention.kernel_for(queries) is None:
        return None
    tokens_BT = random_tokens(config, T)
    forward = jax.jit(transformer.forward, static_argnums=0, static_argnames="attend")
    fused_BTV = np.asarray(forward(config, params, tokens_BT, attend=flash_attention.attend))
    plain_BTV = np.asarray(forward(config, params, tokens_BT, attend=attention.attend))
    allowed = Probe(config, params, tokens_BT, plain_BTV).allowed
    largest = float(np.abs(fused_BTV - plain_BTV).max())
    return Check("fused attention equals plain attention", largest, allowed)


CHECKS = (
    check_causality,
    check_cached,
    check_ragged,
    check_bucket,
    check_order,
    check_growth,
    check_programs,
)


def run_checks(config: ModelConfig, params: dict, mesh: Mesh | None = None) -> Iterator[Check]:
    """The whole contract on a model with unstacked weights, one check after the other."""
    with jax.default_matmul_precision("highest"):
        with on_mesh(mesh):
            probe = make_probe(config, params)
        for check in CHECKS:
            with on_mesh(mesh):
                done = check(probe)
            yield done
    with on_mesh(mesh):
        fused = check_fused(config, params)
    if fused is not None:
        yield fused
