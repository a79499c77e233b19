"""The timed work: prefill and decode of a cell, and the training step.

Sampling: `engine.prefill` reads the prompts, then `decode_chunk` samples the tokens, once in chunks
as `generate` does, once token by token from the host. Speculation: `generate` itself, on text.
Training: the step from `compile_steps`, on random tokens that are already on the devices.
"""

import dataclasses
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich import filesize

from gpt import flops, hardware, sharding
from gpt.compile_log import Stopwatch
from gpt.config import ModelConfig, TrainConfig
from gpt.errors import require
from gpt.hardware import timed
from gpt.sampling import engine, generate
from gpt.sampling.decode_loop import DecodeState, decode_chunk, start_decoding
from gpt.sampling.language_model import LanguageModel
from gpt.sampling.prompts import pad_prompts
from gpt.sampling.sampler import sampling_params
from gpt.sampling.settings import Settings
from gpt.training import step_functions, train_state
from gpt.wording import counted

NO_EOT = -1  # no token ends a row, so every repeat does the same work
TRAIN_STEPS = 10  # per repeat: a single step is too short relative to its launch overhead


@dataclass(frozen=True)
class Cell:
    """What to measure: rows, tokens per prompt, tokens sampled per row (the first by prefill),
    whether the weights are int8, and top-p (None: greedy)."""

    batch: int
    prompt_length: int
    new_tokens: int
    int8: bool = False
    top_p: float | None = None


@dataclass
class Times:
    """Seconds per repeat: prefill, prefill plus sampling the first token, and a decode step of the
    device's loop (the repeat's mean). `host_step`: every host-driven step."""

    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    host_step: list[float] = field(default_factory=list)


def describe_machine(
    name: str, config: ModelConfig, ceilings: dict, repeats: int, int8: bool = False
) -> dict:
    """The result as JSON values, with no cells yet and marked incomplete."""
    device = jax.local_devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{device.device_kind}{cores}",
        "precision": config.compute_dtype,
        "model": name,
        "parameters": flops.parameters(config),
        "weights": "int8" if int8 else config.param_dtype,
        "weight_bytes": flops.weight_bytes(config, int8=int8),
        "jax": jax.__version__,
        "ceilings": ceilings,
        "repeats": repeats,
        "incomplete": True,
        "cells": [],
    }


def require_memory(config: ModelConfig, cell: Cell) -> None:
    """Raise UserError if the largest cell does not fit in memory: the weights and the cache, or,
    during quantization, the float and int8 weights together."""
    slots = engine.bucket(cell.prompt_length + cell.new_tokens, config.context_length)
    weights = flops.weight_bytes(config, int8=cell.int8)
    needed = weights + flops.cache_bytes(config, cell.batch, slots)
    if cell.int8:
        needed = max(needed, weights + flops.weight_bytes(config))
    available, of_what = hardware.memory()
    require(
        needed <= available,
        f"the weights and {counted(cell.batch, 'row')} of {slots} tokens take "
        f"{filesize.decimal(needed)}, but {of_what} is {filesize.decimal(available)}: choose a "
        "smaller model, smaller --batch-sizes or --prompt-lengths",
    )


def measure_cell(
    config: ModelConfig, params: dict, cell: Cell, repeats: int, ceilings: dict
) -> dict:
    """One cell's figures as JSON values: medians of `repeats` repeats, and each repeat's time.

    `params` is unstacked. `compile_seconds` covers only programs that no earlier cell compiled.
    """
    compiling = Stopwatch()
    with compiling:
        repeat(config, params, cell, Times())

    times = Times()
    for _ in range(repeats):
        repeat(config, params, cell, times)

    # Prefill. MFU: the FLOPs of real tokens, without padding, relative to the measured matmul rate.
    seconds = statistics.median(times.prefill)
    n_flops = cell.batch * flops.forward_flops(config, cell.prompt_length, n_logit_positions=1)
    prefill = {
        "seconds": seconds,
        "tokens_per_second": cell.batch * cell.prompt_length / seconds,
        "flops": n_flops,
        "bytes": flops.prefill_bytes(config, cell.batch, cell.prompt_length, cell.int8),
        "mfu": n_flops / seconds / ceilings["matmul_flops_per_second"],
        "seconds_of_repeats": times.prefill,
    }

    # The tokens after the first. The rate and MBU (share of the read rate) come from the device's
    # loop, the percentiles from host-driven steps.
    seconds = statistics.median(times.step)
    n_bytes, n_flops = step_cost(config, cell)
    p50, p90, p99 = np.percentile(times.host_step, [50, 90, 99]).tolist()
    decode = {
        "tokens_per_second": cell.batch / seconds,
        "seconds_per_step": seconds,
        "seconds_per_step_p50": p50,
        "seconds_per_step_p90": p90,
        "seconds_per_step_p99": p99,
        "bytes_per_step": n_bytes,
        "flops_per_step": n_flops,
        "mbu": n_bytes / seconds / ceilings["read_bytes_per_second"],
        "host_seconds_per_step": max(p50 - seconds, 0.0),  # negative only through noise
        "seconds_per_step_of_repeats": times.step,
    }
    return {
        "batch": cell.batch,
        "prompt_length": cell.prompt_length,
        "new_tokens": cell.new_tokens,
        "compile_seconds": compiling.compile_seconds,
        "ttft_seconds": statistics.median(times.first_token),
        "prefill": prefill,
        "decode": decode,
        "peak_bytes": peak_bytes(),
    }


def repeat(config: ModelConfig, params: dict, cell: Cell, times: Times) -> None:
    """Run one repeat: prefill and decode in chunks, then prefill and decode token by token."""
    state, sampling = read_prompts(config, params, cell, times)
    chunks = decode(config, params, state, sampling, generate.chunk_size(sharding.platform()))
    times.step.append(sum(chunks) / (cell.new_tokens - 1))
    state, sampling = read_prompts(config, params, cell, times)
    times.host_step += decode(config, params, state, sampling, 1)


def read_prompts(config: ModelConfig, params: dict, cell: Cell, times: Times):
    """Prefill and sample the first token; return the decoding state and sampling parameters."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(config.vocab_size, size=(cell.batch, cell.prompt_length))
    tokens_BT, n_B = pad_prompts(prompts, config.context_length)
    settings = Settings(temperature=0)
    if cell.top_p is not None:
        settings = Settings(temperature=1, top_p=cell.top_p)
    no_bias_BV = np.zeros((cell.batch, config.vocab_size), np.float32)
    sampling = sampling_params([settings] * cell.batch, no_bias_BV)

    prefill, (cache, logits_BV) = timed(engine.prefill, config, params, tokens_BT, n_B)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(cell.batch, jnp.int32),
        remaining_B=jnp.full(cell.batch, cell.new_tokens, jnp.int32),
        seen_BV=jnp.zeros((cell.batch, config.vocab_size), bool),
        dropped_B=jnp.zeros(cell.batch, jnp.int32),
        end_ids=jnp.int32(NO_EOT),
    )
    first_token, (state, _) = timed(start_decoding, state, logits_BV, sampling)
    times.prefill.append(prefill)
    times.first_token.append(prefill + first_token)
    return state, sampling


def decode(config: ModelConfig, params: dict, state, sampling, chunk: int) -> list[float]:
    """Decode to the end, at most `chunk` steps per call; return the seconds of each call.

    Growing the cache counts, since sampling waits for it.
    """
    active_B = np.ones(len(state.token_B), bool)
    n_ahead = generate.steps_ahead(sharding.platform(), chunk)
    seconds = []
    while np.any(np.asarray(state.remaining_B) > 0):
        start = hardware.clock()
        n_slots = generate.count_slots(state.cache.length_B, state.remaining_B, n_ahead)
        if n_slots > state.cache.capacity:
            state = generate.grow(config, state, n_slots)
        found = decode_chunk(config, params, state, sampling, active_B, chunk)
        state, *_ = jax.block_until_ready(found)
        seconds.append(hardware.clock() - start)
    return seconds


def step_cost(config: ModelConfig, cell: Cell) -> tuple[int, int]:
    """Bytes and FLOPs of a cell's average decode step, counting only filled cache slots."""
    filled = cell.prompt_length + (cell.new_tokens - 2) // 2
    n_bytes = flops.decode_bytes(config, cell.batch, filled, cell.int8)
    return n_bytes, cell.batch * flops.forward_flops(config, 1, filled, 1)


def measure_speculation(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cell: dict,
    n_proposals: int,
    repeats: int,
    ceilings: dict,
) -> dict:
    """Time decoding after `prompts` with and without proposals, alternately: medians of `repeats`
    turns as JSON values, after one turn to compile. `cell`: plain figures for the same sizes."""
    plain = Settings(max_new_tokens=cell["new_tokens"], ignore_eos=True)
    proposing = dataclasses.replace(plain, speculate=n_proposals)
    plain_seconds = []
    seconds = []
    for turn in range(repeats + 1):
        without = generate.complete(model, prompts, plain)
        completions = generate.complete(model, prompts, proposing)
        if turn > 0:
            plain_seconds.append(max(one.decode_seconds for one in without))
            seconds.append(max(one.decode_seconds for one in completions))

    # A row's first token belongs to prefill. Every turn samples the same tokens.
    n_drawn_B = np.array([len(one.token_ids) - 1 for one in completions])
    n_accepted_B = np.array([one.accepted for one in completions])
    n_read_B = n_drawn_B - n_accepted_B
    n_drawn = int(n_drawn_B.sum())
    n_bytes = cell["decode"]["bytes_per_step"]
    mbu_of_a_step = n_bytes / statistics.median(seconds) / ceilings["read_bytes_per_second"]
    return {
        "proposals": n_proposals,
        "tokens_per_second": n_drawn / statistics.median(seconds),
        "plain_tokens_per_second": n_drawn / statistics.median(plain_seconds),
        "speedup": statistics.median(np.divide(plain_seconds, seconds).tolist()),
        "tokens_per_reading": n_drawn / int(n_read_B.sum()),
        "proposed": sum(one.proposed for one in completions),
        "accepted": int(n_accepted_B.sum()),
        # One read of the weights serves all rows; the slowest row sets the number of reads.
        "mbu": int(n_read_B.max()) * mbu_of_a_step,
        "effective_mbu": int(n_drawn_B.max()) * mbu_of_a_step,
        "seconds_of_repeats": seconds,
        "plain_seconds_of_repeats": plain_seconds,
    }


def random_batch(config: TrainConfig, mesh: Mesh) -> jax.Array:
    """One training step's tokens on their devices, [grad_accum, rows, T+1] int32."""
    shape = (config.grad_accum, config.batch_size // config.grad_accum, config.sequence_length + 1)
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    return jax.device_put(ids, sharding.rows(mesh, axis=1))


def measure_train_step(config: TrainConfig, mesh: Mesh, repeats: int, ceilings: dict) -> dict:
    """One batch size's figures as JSON values: medians of `repeats` repeats."""
    step_functions.require_even_split(config, mesh)
    compiling = Stopwatch()
    with compiling:
        step, _ = step_functions.compile_steps(config, mesh)
        state = train_state.make_state(config, mesh)
        tokens_ABU = random_batch(config, mesh)

    def run(state):
        for _ in range(TRAIN_STEPS):
            state, metrics = step(state, tokens_ABU)
            jax.block_until_ready(metrics)  # at most one step ahead, as in training
        return state

    _, state = timed(run, state)  # not counted: the first steps are slower
    repeated = []
    for _ in range(repeats):
        spent, state = timed(run, state)
        repeated.append(spent / TRAIN_STEPS)

    # MFU: FLOPs per second, without recomputation, relative to the matmul rate of all devices.
    seconds = statistics.median(repeated)
    n_tokens = config.batch_size * config.sequence_length
    model = dataclasses.replace(config.model, context_length=config.sequence_length)
    n_flops = n_tokens * flops.train_flops_per_token(model)
    train = {
        "seconds_per_step": seconds,
        "tokens_per_second": n_tokens / seconds,
        "flops": n_flops,
        "mfu": n_flops / seconds / (mesh.size * ceilings["matmul_flops_per_second"]),
        "seconds_of_repeats": repeated,
    }
    return {
        "batch": config.batch_size,
        "grad_accum": config.grad_accum,
        "seq_len": config.sequence_length,
        "compile_seconds": compiling.compile_seconds,
        "train": train,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Peak memory so far: the device's, or this process's if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
