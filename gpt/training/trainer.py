"""What the training loop in train.py uses: text, batches, recording, saving, ending.

It holds the details that the loop leaves out: metrics that are read one step late, steps with
non-finite numbers, several processes, traces.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh
from rich.console import Console

from gpt import checkpoint, distributed, hardware, sharding
from gpt.compile_log import Stopwatch
from gpt.config import TrainConfig
from gpt.data import batches, tokenizers
from gpt.data.dataset import load_dataset
from gpt.data.progress import tokenizing_bar
from gpt.data.token_files import Dataset
from gpt.errors import UserError, is_out_of_memory, require
from gpt.training import memory_plan, run_dir, trackers, train_step
from gpt.training.loss_curve import save_loss_curve
from gpt.training.metrics import RunLog, read_metrics
from gpt.training.resume import (
    StartingPoint,
    describe_run,
    initial_state,
    require_same_settings,
)
from gpt.training.run_plan import describe_length
from gpt.training.stop_signal import StopSignal
from gpt.training.train_state import TrainState, checkpoint_trees
from gpt.wording import counted

MEASURED_SECONDS = 3.0  # of steps, for --minutes
PROFILE_AFTER = 3  # steps: the first ones still wait for data and memory


@dataclass(frozen=True)
class Run:
    """A run whose text, settings and devices are decided. `args`: the flags of train.py."""

    args: Any
    out: Path
    start: StartingPoint
    config: TrainConfig
    mesh: Mesh
    tokenizer: tokenizers.Tokenizer
    dataset: Dataset
    console: Console
    stop: StopSignal

    @property
    def minutes(self) -> float | None:
        """Minutes to train, while the number of steps is still unknown; else None."""
        return None if self.start.resuming else self.args.minutes


def load_text(
    args: Any, start: StartingPoint, store: Path, console: Console
) -> tuple[tokenizers.Tokenizer, Dataset]:
    """The tokenizer and the tokens of --data, see gpt.data.dataset. A run that continues keeps its
    tokenizer and must have the same text; one that starts from other weights keeps theirs."""
    with tokenizing_bar(console) as report:
        return load_dataset(
            args.data or (),
            os.path.expanduser(args.train.tokenizer),
            args.train.vocab_size,
            args.text,
            store=store,
            keep=not args.is_trial,
            estimate=args.dry_run,
            saved_tokenizer=start.metadata["tokenizer"] if start.metadata else None,
            expected=start.metadata["data"] if start.resuming else None,
            log=console.print,
            progress=report,
        )


def require_possible(run: Run) -> None:
    """Raise UserError unless the run can do what was asked for, with its text and its devices."""
    args, config, start = run.args, run.config, run.start
    for note in train_step.require_fit(config, run.mesh):
        run.console.print(note)
    batches.require_length(run.dataset.train, config.sequence_length)
    if not args.dry_run:
        memory_plan.require_room(memory_plan.least_need(config, run.mesh))
    if config.warmup_steps > max(config.schedule_steps - 2, 0) and not start.resuming:
        run.console.print(
            f"note: a warm-up of {config.warmup_steps:,} steps takes the whole run of "
            f"{config.schedule_steps:,}: the learning rate rises until the last step; try "
            f"--warmup-steps {config.schedule_steps // 10}"
        )
    if start.resuming:
        require_same_settings(start, config)
        require(
            config.extra_steps == 0 or config.min_learning_rate > 0,
            "--extend trains at the last learning rate of the schedule, which is 0: "
            f"--init-from {run.out} --out ANOTHER starts a new schedule from these weights",
        )
    else:
        require(
            args.profile <= max(config.steps - PROFILE_AFTER, 0),
            f"--profile {args.profile} traces steps after {PROFILE_AFTER} of warm-up, but the run "
            f"has {config.steps} steps: ask for fewer, or for more --steps",
        )
    trackers.require_installed(args.log_to)
    require(
        not (args.verify_resume and distributed.is_multi_process()),
        "--verify-resume proves a run of one process: add --num-processes 1",
    )


def require_same_everywhere(run: Run) -> None:
    """Raise UserError in all processes of the run unless they were given the same."""
    source = run.start.source
    found = checkpoint.steps(source) if source else []
    distributed.require_same(
        {
            "the settings": (run.args.train, run.config.model, run.args.overwrite),
            "the text": run.dataset.fingerprint,
            "what they find in --out": (run.start.resuming, found),
        }
    )
    require_same_choices(run.config)


def require_same_choices(config: TrainConfig) -> None:
    """Raise UserError in all processes unless `auto` means the same in each."""
    chosen = "--grad-accum and --remat, which auto chooses by the memory of each: give both"
    distributed.require_same({chosen: (config.grad_accum, config.remat, config.unroll)})


def compile_run(run: Run) -> tuple[Run, Callable, Callable]:
    """The training step and the evaluation step, see train_step.compile_steps.

    If the step takes more memory than expected and `auto` has another choice, that one is compiled.
    The returned run has the config that was compiled. Raises UserError if no choice fits.
    """
    try:
        with Stopwatch() as watch:
            steps = train_step.compile_steps(run.config, run.mesh)
    except Exception as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        asked = run.args.train
        choices = {"grad_accum": asked.grad_accum, "remat": asked.remat, "unroll": asked.unroll}
        open_config = replace(run.config, **choices)
        config = memory_plan.choose(open_config, run.mesh, after=run.config)
        if config is None:
            raise
        run.console.print(
            "note: a step takes more memory than expected; it is compiled again with "
            f"--remat {config.remat} --grad-accum {config.grad_accum}"
        )
        return compile_run(replace(run, config=config))
    require_same_choices(run.config)
    run.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
    return run, *steps


def settle_steps(run: Run) -> Run:
    """`run` with the number of steps, and so the schedule, that takes about --minutes.

    It trains a few steps on a state that is thrown away. The schedule is part of the compiled step,
    which is compiled again: neither compilation counts.
    """
    run.console.print("measuring      a few steps, to see how many to take")
    run, make_step, _ = compile_run(run)
    config = run.config
    state = initial_state(config, run.mesh, run.start, log=lambda note: None)
    seconds = []
    measured = 0.0  # their sum in the first process, for all processes
    while len(seconds) < 4 or (measured < MEASURED_SECONDS and len(seconds) < 50):
        tokens = read_batch(run, len(seconds))
        begun = time.perf_counter()
        state, metrics = make_step(state, tokens)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
        measured = float(broadcast_one_to_all(np.float32(sum(seconds))))
    step_seconds = float(np.median(seconds[1:]))  # the first still waits for memory

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
    config = replace(config, steps=n_steps, warmup_steps=warmup)
    run.console.print(*describe_length(config, run.dataset), sep="\n")
    return replace(run, config=config)


def take_over_folder(run: Run, first_step: int) -> None:
    """Remove the run that --overwrite replaces from the folder, and write the tokenizer."""
    with distributed.exit_together():
        if distributed.is_first():
            if run.args.overwrite and first_step == 0:
                run_dir.remove_run(run.out)
            tokenizers.save(run.tokenizer, run.out / "tokenizer.json")


class Recorder(contextlib.ExitStack):
    """Supplies the batches of a run from `state` until step `until`, and records their results.

    Numbers of a step are read one step late, while the device computes the next one. Use it in
    `with`.
    """

    def __init__(self, run: Run, state: TrainState, until: int):
        super().__init__()
        config = run.config
        is_first = distributed.is_first()  # of several processes, the one that writes
        self.run = run
        self.until = until
        self.first_step = int(state.step)
        self.unread = None  # the last step and its metrics, until they are read
        self.skipped = self.first_step - int(train_step.count_updates(state.opt_state))
        self.n_bad = 0  # steps that were skipped one after another, up to the last one read
        self.n_profiled = run.args.profile if is_first else 0
        self.metadata = describe_run(run.args, config, run.tokenizer, run.dataset, run.start)

        self.checkpoints = self.enter_context(
            checkpoint.CheckpointManager(
                run.out, config.keep, config.keep_best, resumed=self.first_step or None
            )
        )
        self.log = RunLog(
            run.out if is_first else None,
            self.first_step,
            config,
            run.console,
            peak_flops=hardware.matmul_rate(config.model.compute_dtype) * run.mesh.size,
            log_to=run.args.log_to,
        )
        self.callback(self.log.close)
        self.trace = self.enter_context(contextlib.ExitStack())

    def batches(self) -> Iterator[tuple[int, jax.Array]]:
        """Each step that is to be made, counted from 1, and its tokens [A, B, T+1]."""
        read = functools.partial(read_batch, self.run)
        ready = batches.prefetch(read, self.first_step, self.until)
        with contextlib.closing(ready):
            for step, tokens in enumerate(ready, self.first_step + 1):
                yield step, tokens
                self.log.timer.resume()

    def note_step(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """`step`, which gave `state` and `metrics`, has been handed to the device."""
        self._profile(step, metrics)
        self._read_last_step(state)
        self.unread = step, metrics
        if self.n_bad + 1 >= self.run.config.max_bad_steps:
            # If this step is bad, it is the last one allowed. It is read before another one changes
            # the weights that will be inspected.
            self._read_last_step(state)

    def catch_up(self, state: TrainState) -> bool:
        """Wait for the last step, and stop the clock until the next one. Returns whether its update
        was applied; if not, this must neither be the last step nor be saved."""
        self._read_last_step(state)
        self.log.timer.pause()
        return self.n_bad == 0

    def _read_last_step(self, state: TrainState) -> None:
        """Log the last step, if it is unread. Raise Failed if too many steps in a row were skipped,
        or the run's last step was: no good step can follow it."""
        if self.unread is None:
            return
        config = self.run.config
        step, metrics = self.unread
        self.unread = None
        self.log.write_step(step, jax.block_until_ready(metrics))

        skipped = int(metrics["skipped"])
        self.n_bad = self.n_bad + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        if self.n_bad and (self.n_bad >= config.max_bad_steps or step == config.steps):
            from gpt.training import nonfinite

            self.checkpoints.wait()
            first_bad = step - self.n_bad + 1
            tokens = read_batch(self.run, first_bad - 1)
            raise nonfinite.explain_divergence(
                config, first_bad, self.n_bad, self.run.out, state.params, tokens
            )

    def _profile(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Trace the steps that --profile asks for. `metrics` is ready when `step` is computed."""
        begin = self.first_step + PROFILE_AFTER
        end = begin + self.n_profiled
        if begin < end and step in (begin, end):
            jax.block_until_ready(metrics)
            folder = self.run.out / "profile"
            if step == begin:
                self.trace.enter_context(jax.profiler.trace(folder))
            else:
                self.trace.close()
                self.run.console.print(f"profile        steps {begin + 1} to {end}: xprof {folder}")

    def try_save(self, state: TrainState) -> None:
        """Before the first save of a run, save the state and remove it again, so that a save that
        cannot succeed is noticed before hours of training."""
        if self.checkpoints.latest is None:
            self.log.timer.pause()
            with self._explaining_a_failed_save(goes_on=self.run.config.keep_going):
                self.checkpoints.try_save(checkpoint_trees(state), self.metadata | {"step": 0})
            self.log.timer.resume()

    def save(self, step: int, state: TrainState, val_loss: float | None, wait: bool) -> None:
        """Save a checkpoint in the background; with `wait` return when it is on disk.

        `val_loss`: nats per token, which the best checkpoints are chosen by. With `keep_going` a
        checkpoint that cannot be written is noted, and training goes on; else it is a UserError.
        """
        if self.n_bad:
            # More bad steps may follow, and these weights must not replace good ones.
            self.run.console.print(f"note: step {step} is not saved: its update was skipped")
            return
        with self._explaining_a_failed_save(goes_on=True):
            # The previous save may have failed. Try anyway: the disk may have room again.
            self.checkpoints.wait()
        with self._explaining_a_failed_save(goes_on=self.run.config.keep_going and not wait):
            self.checkpoints.save(
                step,
                checkpoint_trees(state),
                self.metadata | {"step": step},
                loss=val_loss,
                wait=wait or self.checkpoints.failed,
            )

    @contextlib.contextmanager
    def _explaining_a_failed_save(self, goes_on: bool) -> Iterator[None]:
        """Turn SaveFailed into a note if training `goes_on`, else into a UserError."""
        try:
            yield
        except checkpoint.SaveFailed as error:
            if not goes_on:
                raise UserError(
                    f"{error}; give the same command again when this is mended, or train on "
                    "unsaved: --keep-going"
                ) from None
            self.run.console.print(f"note: {error}; training goes on")

    def sample(self, step: int, write: Callable[[], str | None]) -> None:
        """Show what the model writes; all processes of the run call this."""
        text = self._attempt(step, "sample", write)
        if text is not None:
            self.log.sample(step, text)

    def tasks(self, step: int, evaluate: Callable[[], dict[str, float] | None]) -> None:
        """Log the figures of an evaluation on tasks; all processes of the run call this."""
        figures = self._attempt(step, "evaluation on tasks", evaluate)
        if figures is not None:
            self.log.tasks(step, figures)

    def _attempt(self, step: int, what: str, make: Callable[[], Any]) -> Any:
        """The result of `make`, which is None in all processes but one. If memory runs out, a note
        is printed and training continues."""
        try:
            return make()
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            self.run.console.print(f"note: no {what} at step {step:,}: {error}")
            return None


def read_batch(run: Run, index: int) -> jax.Array:
    """Batch `index`, counted from 0, on its devices: int32 [grad_accum, rows, T+1].

    Step n of a run, counted from 1, trains on batch n - 1. Each process reads only the rows that
    its own devices hold.
    """
    config = run.config
    A = config.grad_accum
    B = config.batch_size // A
    T = config.sequence_length

    @functools.cache  # some devices hold the same rows
    def read(first: int, end: int) -> np.ndarray:
        rows = np.arange(A)[:, None] * B + np.arange(first, end)  # in the whole batch
        found = batches.batch(
            run.dataset.train, config.seed, index, config.batch_size, T, rows.ravel()
        )
        return found.reshape(A, end - first, T + 1)

    def part_of_device(where: tuple[slice, ...]) -> np.ndarray:
        first, end, _ = where[1].indices(B)
        return read(first, end)

    sharded = sharding.rows(run.mesh, axis=1)
    return jax.make_array_from_callback((A, B, T + 1), sharded, part_of_device)


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Whether `step` is the last one or a multiple of `every`; never if `every` is 0."""
    return every > 0 and (step == config.steps or step % every == 0)


def finish(run: Run) -> int:
    """Plot the losses and return the exit code, which is not 0 if the run was stopped."""
    if distributed.is_first():
        save_loss_curve(run.out / "metrics.jsonl", run.out / "loss.png")
    run.console.print(f"loss curve     {run.out / 'loss.png'}")

    # sample.py uses the latest checkpoint. An earlier one may have a lower validation loss.
    losses = {}
    for record in read_metrics(run.out / "metrics.jsonl"):
        if record.get("val_loss") is not None:
            losses[record["step"]] = record["val_loss"]
    saved = checkpoint.steps(run.out)
    best = min((step for step in saved if step in losses), key=losses.get, default=saved[-1])
    if best != saved[-1]:
        run.console.print(
            f"note: step {best:,} has the best validation loss, {losses[best]:.4f}: add "
            f"--step {best} to sample.py"
        )
    return distributed.agree_on_code(run.stop.code)
