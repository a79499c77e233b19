"""Prefill and decode of one cell (batch, prompt length, new tokens), each timed apart.

It times what sampling runs: prompts are read by `engine.prefill`, then `decode_chunk` draws the
tokens, once in chunks as the driver does, once token by token from the host.
"""

import statistics
import sys
from dataclasses import dataclass, field

import jax
import numpy as np

from gpt import flops, hardware
from gpt.compile_log import Stopwatch
from gpt.config import ModelConfig
from gpt.errors import require
from gpt.hardware import timed
from gpt.sampling import engine, generate
from gpt.sampling.decode_loop import begin, decode_chunk
from gpt.sampling.settings import Settings

NO_EOT = -1  # no token ends a row: every repeat does the same work


@dataclass(frozen=True)
class Cell:
    """What is measured: rows, tokens a prompt, tokens drawn a row (the first is prefill's), and
    whether the weights are int8."""

    batch: int
    prompt_length: int
    new_tokens: int
    int8: bool = False

    @property
    def steps(self) -> int:
        """Decode steps: one for each token but the first."""
        return self.new_tokens - 1


@dataclass
class Times:
    """Seconds of every repeat: prefill, then up to the first token, a decode step in the device's
    loop (mean of a repeat), and each single step driven from the host."""

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    host_step: list[float] = field(default_factory=list)


def require_room(config: ModelConfig, cell: Cell) -> None:
    """UserError if weights and cache of the largest cell exceed the memory that is there, or the
    weights while they are quantized: floats and int8 lie there together."""
    slots = engine.bucket(cell.prompt_length + cell.new_tokens, config.context_length)
    weights = flops.weight_bytes(config, int8=cell.int8)
    need = weights + flops.cache_bytes(config, cell.batch, slots)
    both = weights + flops.weight_bytes(config) if cell.int8 else 0
    have, whose = hardware.memory()
    require(
        both <= have,
        f"quantizing the weights takes {both / 1e9:.1f} GB, and {whose} is {have / 1e9:.1f} GB: "
        "choose a smaller model",
    )
    require(
        need <= have,
        f"{cell.batch} rows of {slots} tokens take {need / 1e9:.1f} GB with the weights, and "
        f"{whose} is {have / 1e9:.1f} GB: choose smaller --batch-sizes or --prompt-lengths",
    )


def read_prompts(config: ModelConfig, params: dict, cell: Cell, times: Times):
    """Prefill and the first token; the loop to go on with, and the rows' settings."""
    ids = np.random.default_rng(0).integers(
        config.vocab_size, size=(cell.batch, cell.prompt_length)
    )
    tokens_BT, n_B = generate.pad_prompts(ids, config.context_length)
    rows = generate.row_settings([Settings(temperature=0)] * cell.batch, config.vocab_size, NO_EOT)
    left_B = np.full(cell.batch, cell.new_tokens, np.int32)
    seen_BV, dropped_B = np.zeros((cell.batch, config.vocab_size), bool), np.zeros_like(left_B)
    prefill, (cache, logits_BV) = timed(engine.prefill, config, params, tokens_BT, n_B)
    drawing, (loop, _) = timed(begin, cache, logits_BV, rows, left_B, seen_BV, dropped_B, NO_EOT)
    times.prefill.append(prefill)
    times.first.append(prefill + drawing)
    return loop, rows


def decode(config: ModelConfig, params: dict, loop, rows, size: int) -> list[float]:
    """Run `loop` to its end, at most `size` steps a call; the seconds of each call.

    Growing the cache counts: whoever samples waits for it too.
    """

    going_B = np.ones(len(loop.token_B), bool)

    def advance(loop):
        roomy = generate.with_room(config, loop)
        return decode_chunk(config, params, roomy, rows, going_B, NO_EOT, size)

    seconds = []
    while np.any(np.asarray(loop.left_B) > 0):
        spent, (loop, *_) = timed(advance, loop)
        seconds.append(spent)
    return seconds


def repeat(config: ModelConfig, params: dict, cell: Cell, times: Times) -> None:
    """One repeat: read and decode in chunks, then read and decode token by token."""
    loop, rows = read_prompts(config, params, cell, times)
    times.step.append(sum(decode(config, params, loop, rows, generate.CHUNK)) / cell.steps)
    loop, rows = read_prompts(config, params, cell, times)
    times.host_step += decode(config, params, loop, rows, 1)


def measure(config: ModelConfig, params: dict, cell: Cell, repeats: int, ceilings: dict) -> dict:
    """The figures of one cell as JSON values: medians over `repeats`, and each repeat's own.

    `params` is unstacked. `compile_seconds` are those of programs no earlier cell had compiled,
    `cached_compile_seconds` those of reading the same programs from the compilation cache: None
    where there is none.
    """
    first, again, times = Stopwatch(), Stopwatch(), Times()
    with first:
        repeat(config, params, cell, Times())
    if jax.config.jax_compilation_cache_dir:
        jax.clear_caches()
        with again:
            repeat(config, params, cell, Times())
    for _ in range(repeats):
        repeat(config, params, cell, times)
    return {
        "batch": cell.batch,
        "prompt_length": cell.prompt_length,
        "new_tokens": cell.new_tokens,
        "compile_seconds": first.compile_seconds,
        "cached_compile_seconds": again.compile_seconds if again.programs else None,
        "ttft_seconds": statistics.median(times.first),
        "prefill": prefill_figures(config, cell, times, ceilings),
        "decode": decode_figures(config, cell, times, ceilings),
        "peak_bytes": peak_bytes(),
    }


def prefill_figures(config: ModelConfig, cell: Cell, times: Times, ceilings: dict) -> dict:
    """Reading the prompts. `mfu`: share of the matrix product's rate, padding counted as waste."""
    seconds = statistics.median(times.prefill)
    total = cell.batch * flops.forward_flops(config, cell.prompt_length, n_logit_positions=1)
    return {
        "seconds": seconds,
        "tokens_per_second": cell.batch * cell.prompt_length / seconds,
        "flops": total,
        "bytes": flops.prefill_bytes(config, cell.batch, cell.prompt_length, cell.int8),
        "mfu": total / seconds / ceilings["matmul_flops_per_second"],
        "seconds_of_repeats": times.prefill,
    }


def decode_figures(config: ModelConfig, cell: Cell, times: Times, ceilings: dict) -> dict:
    """Tokens after the first. The rate and `mbu` (share of the read rate) are those of the device's
    loop, percentiles those of steps driven from the host, `host_seconds_per_step` what it adds."""
    seconds = statistics.median(times.step)
    n_bytes, flops = step_cost(config, cell)
    p50, p90, p99 = np.percentile(times.host_step, [50, 90, 99]).tolist()
    return {
        "tokens_per_second": cell.batch / seconds,
        "seconds_per_step": seconds,
        "seconds_per_step_p50": p50,
        "seconds_per_step_p90": p90,
        "seconds_per_step_p99": p99,
        "bytes_per_step": n_bytes,
        "flops_per_step": flops,
        "mbu": n_bytes / seconds / ceilings["read_bytes_per_second"],
        "host_seconds_per_step": p50 - seconds,
        "seconds_per_step_of_repeats": times.step,
    }


def step_cost(config: ModelConfig, cell: Cell) -> tuple[int, int]:
    """Bytes and FLOPs of the mean decode step of a cell: only filled slots of the cache count."""
    filled = cell.prompt_length + (cell.steps - 1) // 2
    n_bytes = flops.decode_bytes(config, cell.batch, filled, cell.int8)
    return n_bytes, cell.batch * flops.forward_flops(config, 1, filled, 1)


def peak_bytes() -> int | None:
    """The most memory so far: the device's, or this process's where the device does not tell."""
    device = jax.local_devices()[0].memory_stats()
    if device:
        return device["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # Windows
        return None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
