"""Settings that a run chooses itself: those left at `auto`, and the steps for --minutes."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from gpt.compile_log import Stopwatch
from gpt.config import AUTO, TrainConfig, from_json
from gpt.errors import UserError, is_out_of_memory
from gpt.training import memory_plan, step_functions
from gpt.training.data_loader import load_batch
from gpt.training.resume import StartingPoint, initial_state
from gpt.training.run import Run, require_same_choices
from gpt.training.run_plan import describe_length
from gpt.wording import counted

MEASURED_SECONDS = 3.0  # of throwaway steps, for --minutes


def complete_config(
    args: Any, start: StartingPoint, n_vocab: int, dtype: str, mesh: Mesh
) -> TrainConfig:
    """The settings to train with, from `args.config` (the preset and the flags that override it).
    Only the number of steps for --minutes is still missing."""
    # The tokenizer's vocabulary, and `dtype` for the dtypes that were not given.
    config = args.config.completed(n_vocab, dtype)

    # A run that continues keeps what was chosen for it, so that continuing is exact: the steps for
    # --minutes, and what `auto` chose. A grad_accum that does not fit this mesh stays `auto`.
    if start.resuming:
        saved = from_json(TrainConfig, start.metadata["train"])
        if args.minutes:
            config = replace(config, steps=saved.steps, warmup_steps=saved.warmup_steps)
        if config.steps == saved.schedule_steps:
            # The command that started the run also continues what --extend has added.
            config = replace(config, steps=saved.steps, extra_steps=saved.extra_steps)
        if config.remat == AUTO:
            config = replace(config, remat=saved.remat, unroll=saved.unroll)
        n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.grad_accum == AUTO and config.batch_size % (saved.grad_accum * n_shards) == 0:
            config = replace(config, grad_accum=saved.grad_accum)

    # What is still `auto` is chosen by a device's memory.
    return memory_plan.resolve_auto(config, mesh, args.memory_bytes)


def compile_with_fallback(run: Run) -> tuple[Callable, Callable]:
    """The training step and the evaluation step of `run`, compiled for its mesh.

    If a step needs more memory than expected, the next more frugal settings that `auto` may choose
    are compiled, and `run.config` becomes those. Raises UserError if none fit.
    """
    # With the flags' `auto` back in place, the plan lists the choices from fastest to most frugal.
    flags = run.args.config
    auto_config = replace(
        run.config, grad_accum=flags.grad_accum, remat=flags.remat, unroll=flags.unroll
    )
    choices = [run.config]
    likely = memory_plan.likely_to_fit(auto_config, run.mesh)
    if run.config in likely:
        choices += likely[likely.index(run.config) + 1 :]
    for config in choices:
        if config != run.config:
            run.console.print(
                "note: a step needs more memory than expected; recompiling with "
                f"--remat {config.remat} --grad-accum {config.grad_accum}"
            )
        try:
            with Stopwatch() as watch:
                train_step, eval_step = step_functions.compile_steps(config, run.mesh)
            break
        except Exception as error:
            out_of_memory = isinstance(error, UserError) or is_out_of_memory(error)
            if not out_of_memory or config == choices[-1]:
                raise
    require_same_choices(config)
    run.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
    run.config = config
    return train_step, eval_step


def choose_steps_by_measuring(run: Run) -> None:
    """Set the number of steps of `run`, and so its schedule, to take about --minutes.

    A few steps are timed on a throwaway state. The schedule is part of the compiled step, which is
    compiled again afterwards; neither compilation counts.
    """
    run.console.print("measuring      a few steps, to see how many fit into --minutes")
    train_step, _ = compile_with_fallback(run)
    config = run.config
    state = initial_state(config, run.mesh, run.start, log=lambda note: None)
    seconds = []
    measured = 0.0  # seconds in the first process, which decides for all
    while len(seconds) < 4 or (measured < MEASURED_SECONDS and len(seconds) < 50):
        tokens = load_batch(config, run.mesh, run.dataset.train, len(seconds))
        begun = time.perf_counter()
        state, metrics = train_step(state, tokens)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
        measured = float(broadcast_one_to_all(np.float32(sum(seconds))))
    step_seconds = float(np.median(seconds[1:]))  # the first one still allocates memory

    # Evaluating a token takes a third of training on it.
    n_val = min(config.eval_tokens or len(run.dataset.val), len(run.dataset.val))
    tokens_per_step = config.batch_size * config.sequence_length
    evaluation = n_val / (3 * tokens_per_step) / config.eval_every  # in steps, for each step
    n_steps = max(int(60 * run.args.minutes / (step_seconds * (1 + evaluation))), 1)
    n_steps = int(broadcast_one_to_all(np.int32(n_steps)))
    warmup = min(config.warmup_steps, n_steps // 10)
    run.console.print(
        f"settled        {counted(n_steps, 'step')}, the first {warmup:,} to warm up: a step takes "
        f"{step_seconds * 1e3:,.0f} ms, and --minutes is {run.args.minutes:g}; the step is now "
        "compiled again, with this schedule"
    )
    run.config = replace(config, steps=n_steps, warmup_steps=warmup)
    run.console.print(*describe_length(run.config, run.dataset), sep="\n")
