"""What stands around the training loop of train.py: compiling, recording, saving, ending.

The loop itself is in train.py. What a reader does not need in order to follow it is here: numbers
that are read one step late, steps that are not finite, several processes, traces.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from gpt import checkpoint, distributed, hardware
from gpt.compile_log import Stopwatch
from gpt.config import TrainConfig
from gpt.data import batches, tokenizers
from gpt.data.dataset import load_dataset
from gpt.data.token_files import Dataset
from gpt.errors import UserError, is_out_of_memory, require
from gpt.training import device_batches, run_dir, train_step
from gpt.training.loss_curve import save_loss_curve
from gpt.training.metrics import RunLog, require_tensorboard, show_tokenizing
from gpt.training.nonfinite import NonFiniteStreak, explain_divergence
from gpt.training.profile import StepProfiler, require_steps
from gpt.training.resume import StartingPoint, describe_run, require_same_settings
from gpt.training.stop_signal import StopSignal
from gpt.training.train_state import TrainState, checkpoint_trees
from gpt.training.train_step import require_fit


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


def load_text(
    args: Any, start: StartingPoint, cache_dir: Path | None, console: Console
) -> tuple[tokenizers.Tokenizer, Dataset]:
    """The tokenizer and the tokens of --data, see gpt.data.dataset. A run that continues keeps its
    tokenizer and must have the same text; one that starts from other weights keeps theirs."""
    with show_tokenizing(console) as progress:
        return load_dataset(
            args.data or (),
            args.train.tokenizer,
            args.train.vocab_size,
            saved_tokenizer=start.tokenizer,
            expected_fingerprint=start.fingerprint,
            cache_dir=cache_dir,
            log=console.print,
            progress=progress,
        )


def require_possible(run: Run) -> None:
    """Raise UserError unless the run can do what was asked for, with its text and its devices."""
    args, config, start = run.args, run.config, run.start
    for note in require_fit(config, run.mesh):
        run.console.print(note)
    batches.require_length(run.dataset.train, config.sequence_length)
    if start.resuming:
        require_same_settings(start, config)
    else:
        require_steps(args.profile, config.steps)
    if args.tensorboard:
        require_tensorboard()
    require(
        not (args.verify_resume and distributed.is_multi_process()),
        "--verify-resume proves a run of one process: add --num-processes 1",
    )


def require_same_everywhere(run: Run) -> None:
    """Raise UserError in all processes of the run unless they were given the same."""
    distributed.require_same(
        {
            "the settings": (run.config, run.args.overwrite),
            "the text": run.dataset.fingerprint,
            "what they find in --out": (run.start.resuming, run.start.steps),
        }
    )


def compile_run(run: Run) -> tuple[Callable, Callable]:
    """The training step, compiled now, and the evaluation step, compiled when it is first called;
    see train_step.compile_steps. Raises UserError if the step does not fit in memory."""
    with Stopwatch() as watch:
        steps = train_step.compile_steps(run.config, run.mesh)
    run.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
    return steps


def take_over_folder(run: Run, first_step: int) -> None:
    """Make the run's folder its own: remove the run that it overwrites, and write the tokenizer."""
    with distributed.exit_together():
        if distributed.is_first():
            if run.args.overwrite and first_step == 0:
                run_dir.remove_run(run.out)
            tokenizers.save(run.tokenizer, run.out / "tokenizer.json")


class Recorder:
    """Hands out the batches of a run from `state` until step `until`, and takes what comes of them.

    Numbers of a step are read one step late, while the device computes the next one. Use it in
    `with`.
    """

    def __init__(self, run: Run, state: TrainState, until: int):
        self.run = run
        self.until = until
        self.first_step = int(state.step)
        self.unread = None  # the last step and its metrics, until they are read
        skipped = self.first_step - int(train_step.count_updates(state.opt_state))
        self.streak = NonFiniteStreak(run.config, skipped)
        self.batch = partial(device_batches.batch_of_step, run.config, run.dataset.train, run.mesh)
        self.metadata = describe_run(run.args, run.config, run.tokenizer, run.dataset, run.start)

    def __enter__(self) -> "Recorder":
        run, config, first_step = self.run, self.run.config, self.first_step
        is_first = distributed.is_first()  # of several processes, the one that writes
        log = run.console.print
        self.checkpoints = checkpoint.CheckpointManager(
            run.out, config.keep, config.keep_best, resumed=first_step or None
        )
        self.log = RunLog(
            run.out if is_first else None,
            first_step,
            config,
            run.console,
            peak_flops=hardware.matmul_rate(config.model.compute_dtype) * run.mesh.size,
            tensorboard=run.args.tensorboard,
        )
        n_profiled = run.args.profile if is_first else 0
        self.profiler = StepProfiler(run.out / "profile", n_profiled, first_step, log)
        self.stack = contextlib.ExitStack()
        for resource in (self.checkpoints, self.log, self.profiler):
            self.stack.enter_context(contextlib.closing(resource))
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def batches(self) -> Iterator[tuple[int, jax.Array]]:
        """Each step that is to be made, counted from 1, and its tokens [A, B, T+1]."""
        ready = batches.prefetch(self.batch, self.first_step, self.until)
        with contextlib.closing(ready):
            for step, tokens in enumerate(ready, self.first_step + 1):
                yield step, tokens
                self.log.timer.resume()

    def step(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """`step`, which gave `state` and `metrics`, has been handed to the device."""
        self.profiler.after_dispatch(step, metrics)
        self._log_unread(state)
        self.unread = step, metrics
        if self.streak.one_more_ends_the_run:
            # No further step must change the weights that the explanation looks at.
            self._log_unread(state)

    def catch_up(self, state: TrainState) -> bool:
        """Wait for the last step, and stop the clock until the next one. Returns whether its update
        was applied: else this must not be the last step, nor be saved."""
        self._log_unread(state)
        self.log.timer.pause()
        return self.streak.length == 0

    def _log_unread(self, state: TrainState) -> None:
        """Log the last step, if it is unread. Raise Failed if it ends the run."""
        if self.unread is None:
            return
        step, metrics = self.unread
        self.unread = None
        self.log.step(step, jax.block_until_ready(metrics))
        if self.streak.add(step, int(metrics["skipped"])):
            self.checkpoints.wait()
            raise explain_divergence(
                self.run.config, self.streak, self.run.out, state.params, self.batch
            )

    def sample(self, step: int, write: Callable[[], str | None]) -> None:
        """Show what the model writes; a lack of memory for it is noted, and training goes on.

        All processes of the run call this; `write()` returns None in all but one.
        """
        try:
            text = write()
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            self.run.console.print(f"note: no sample at step {step:,}: {error}")
            return
        if text is not None:
            self.log.sample(step, text)

    def save(self, step: int, state: TrainState, val_loss: float | None, wait: bool) -> None:
        """Save a checkpoint in the background; with `wait` return when it is on disk.

        `val_loss`: nats per token, which the best checkpoints are chosen by. With `keep_going` a
        checkpoint that cannot be written is noted, and training goes on; else it is a UserError.
        """
        log = self.run.console.print
        if self.streak.length:
            # It may go on like this: these weights must not replace good ones.
            log(f"note: step {step} is not saved: its update was skipped")
            return
        try:
            self.checkpoints.wait()
        except checkpoint.SaveFailed as error:
            # An earlier save has failed. There may be room again, so this one is tried anyway.
            log(f"note: {error}; training goes on")
        try:
            self.checkpoints.save(
                step,
                checkpoint_trees(state),
                self.metadata | {"step": step},
                loss=val_loss,
                wait=wait or self.checkpoints.failed,
            )
        except checkpoint.SaveFailed as error:
            if wait or not self.run.config.keep_going:
                raise UserError(
                    f"{error}; make room and give the same command again, or train on unsaved: "
                    "--keep-going"
                ) from None
            log(f"note: {error}; training goes on")


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Whether what is done `every` so many steps, and at the end of the run, is due after `step`;
    0 is never."""
    return every > 0 and (step == config.steps or step % every == 0)


def finish(run: Run) -> int:
    """Plot the losses, and say how a run that was stopped is continued; the exit code."""
    plot_losses(run)
    code = distributed.agree_on_code(run.stop.code)
    if code:
        command = "the same command"
        if run.args.overwrite:
            command += " without --overwrite"
        run.console.print(f"stopped        {command} continues the run")
    return code


def report_complete(run: Run) -> int:
    """Say that a run has nothing left to do; the exit code."""
    if not (run.out / "loss.png").exists():  # the process was killed at the very end
        plot_losses(run)
    run.console.print(f"complete       {run.config.steps:,} steps; --overwrite starts afresh")
    return 0


def plot_losses(run: Run) -> None:
    """Plot the losses up to now into loss.png."""
    if distributed.is_first():
        save_loss_curve(run.out / "metrics.jsonl", run.out / "loss.png")
    run.console.print(f"loss curve     {run.out / 'loss.png'}")
