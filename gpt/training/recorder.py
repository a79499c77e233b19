"""What the training loop writes: metrics, checkpoints and traces.

This hides what the loop need not show: metrics are read one step late, skipped steps are counted, a
failed save is explained, and only the first of several processes writes.
"""

import contextlib
from collections.abc import Iterator

import jax

from gpt import checkpoint, distributed, hardware
from gpt.config import TrainConfig
from gpt.errors import UserError, is_out_of_memory
from gpt.training import step_functions
from gpt.training.data_loader import load_batch
from gpt.training.metrics import RunLog
from gpt.training.resume import checkpoint_metadata
from gpt.training.run import PROFILE_AFTER, Run
from gpt.training.train_state import TrainState, checkpoint_trees


class Recorder(contextlib.ExitStack):
    """Records the results of a run that trains from `state`.

    A context manager: leaving it waits for the last save and closes the log. A step's metrics are
    read one step late, while the device computes the next one.
    """

    def __init__(self, run: Run, state: TrainState):
        super().__init__()
        config = run.config
        is_first = distributed.is_first()  # the only process that writes
        self.run = run
        self.steps_done = int(state.step)
        self.unread = None  # the last step and its metrics, until they are read
        self.skipped = self.steps_done - int(step_functions.count_updates(state.opt_state))
        self.n_bad = 0  # consecutive skipped steps, up to the last one read
        self.n_profiled = run.args.profile if is_first else 0
        self.metadata = checkpoint_metadata(run)

        self.checkpoints = self.enter_context(
            checkpoint.CheckpointManager(
                run.out, config.keep, config.keep_best, resumed=self.steps_done or None
            )
        )
        self.log = RunLog(
            run.out if is_first else None,
            self.steps_done,
            config,
            run.console,
            peak_flops=hardware.matmul_rate(config.model.compute_dtype) * run.mesh.size,
            log_to=run.args.log_to,
        )
        self.callback(self.log.close)
        self.trace = self.enter_context(contextlib.ExitStack())

    def note_step(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Record that `step` was dispatched, giving `state` and `metrics`; log the step before."""
        self._profile(step, metrics)
        self._read_last_step(state)
        self.unread = step, metrics
        if self.n_bad + 1 >= self.run.config.max_bad_steps:
            # One more bad step ends the run. Read this one now, before another step changes the
            # weights that would be inspected.
            self._read_last_step(state)

    def wait_for_update(self, state: TrainState) -> bool:
        """Wait for the last step to finish. Returns whether its update was applied; if not, the
        step must not be saved and the run must not end on it."""
        self._read_last_step(state)
        return self.n_bad == 0

    def _read_last_step(self, state: TrainState) -> None:
        """Log the last step if it is unread. Raise Failed if too many consecutive steps were
        skipped, or if the run's last one was."""
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
            tokens = load_batch(config, self.run.mesh, self.run.dataset.train, first_bad - 1)
            raise nonfinite.explain_divergence(
                config, first_bad, self.n_bad, self.run.out, state.params, tokens
            )

    def _profile(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Trace the steps that --profile asks for. `metrics` is ready when `step` is computed."""
        begin = self.steps_done + PROFILE_AFTER
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
        """Write and delete a trial checkpoint if the run has none yet, so that a save that would
        fail does so now and not after hours of training."""
        if self.checkpoints.latest is None:
            with self._explain_failed_save(continues=self.run.config.keep_going):
                self.checkpoints.try_save(checkpoint_trees(state), self.metadata | {"step": 0})
            self.log.timer.skip_until_now()

    def save(self, step: int, state: TrainState, val_loss: float | None, wait: bool) -> None:
        """Save a checkpoint in the background; with `wait` return when it is on disk.

        `val_loss`: nats per token, by which the best checkpoints are chosen. If a checkpoint cannot
        be written, training continues with a note under `keep_going`; otherwise it is a UserError.
        """
        if self.n_bad:
            # More bad steps may follow, and these weights must not replace good ones.
            self.run.console.print(f"note: step {step} is not saved: its update was skipped")
            return
        with self._explain_failed_save(continues=True):
            # Even if the previous save failed: the disk may have room again.
            self.checkpoints.wait()
        with self._explain_failed_save(continues=self.run.config.keep_going and not wait):
            self.checkpoints.save(
                step,
                checkpoint_trees(state),
                self.metadata | {"step": step},
                loss=val_loss,
                wait=wait or self.checkpoints.failed,
            )

    @contextlib.contextmanager
    def _explain_failed_save(self, continues: bool) -> Iterator[None]:
        """Turn SaveFailed into a note if training `continues`, else into a UserError."""
        try:
            yield
        except checkpoint.SaveFailed as error:
            if not continues:
                raise UserError(
                    f"{error}; fix this and repeat the command, or train without saving: "
                    "--keep-going"
                ) from None
            self.run.console.print(f"note: {error}; training continues")

    @contextlib.contextmanager
    def attempt(self, what: str, step: int) -> Iterator[None]:
        """Turn a UserError or an out-of-memory error into a note that this step has no `what`;
        training continues."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            self.run.console.print(f"note: no {what} at step {step:,}: {error}")


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Whether `step` is the last one or a multiple of `every`; never if `every` is 0."""
    return every > 0 and (step == config.steps or step % every == 0)
