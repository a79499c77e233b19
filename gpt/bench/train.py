"""The training step, timed: tokens a second, MFU, compile time and memory, batch by batch.

It times what training runs: `step.compile_steps` on random tokens, already on the devices.
"""

import dataclasses
import statistics

import jax
import numpy as np
from jax.sharding import Mesh

from gpt import flops, sharding
from gpt.bench.measure import peak_bytes
from gpt.compile_log import Stopwatch
from gpt.config import TrainConfig
from gpt.hardware import timed
from gpt.training import train_state, train_step

STEPS = 10  # a repeat: one step is too short beside what starts it


def random_batch(config: TrainConfig, mesh: Mesh) -> jax.Array:
    """Tokens of one step on their devices, [grad_accum, rows, T+1] int32."""
    shape = (config.grad_accum, config.batch_size // config.grad_accum, config.window + 1)
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    return jax.device_put(ids, sharding.rows(mesh, axis=1))


def measure(config: TrainConfig, mesh: Mesh, repeats: int, ceilings: dict) -> dict:
    """The figures of one batch size as JSON values: medians over `repeats` of STEPS steps each."""
    train_step.require_fit(config, mesh)
    watch = Stopwatch()
    with watch:
        step, _ = train_step.compile_steps(config, mesh)
        state, tokens = train_state.make_state(config, mesh), random_batch(config, mesh)

    def run(state):
        for _ in range(STEPS):
            state, metrics = step(state, tokens)
            jax.block_until_ready(metrics)  # at most one step ahead, as in training
        return state

    _, state = timed(run, state)
    seconds = []
    for _ in range(repeats):
        spent, state = timed(run, state)
        seconds.append(spent / STEPS)
    return {
        "batch": config.batch_size,
        "seq_len": config.window,
        "compile_seconds": watch.compile_seconds,
        "train": figures(config, seconds, ceilings, mesh.size),
        "peak_bytes": peak_bytes(),
    }


def figures(config: TrainConfig, seconds: list[float], ceilings: dict, n_devices: int) -> dict:
    """Of steps that took `seconds`. `mfu`: share of the devices' matrix rate, by the FLOPs of
    gpt/flops.py; recomputation is not counted as work."""
    tokens, middle = config.batch_size * config.window, statistics.median(seconds)
    total = tokens * flops.train_flops_per_token(
        dataclasses.replace(config.model, context_length=config.window)
    )
    return {
        "seconds_per_step": middle,
        "tokens_per_second": tokens / middle,
        "flops": total,
        "mfu": total / middle / (n_devices * ceilings["matmul_flops_per_second"]),
        "seconds_of_repeats": seconds,
    }
