"""A trace of a few steps, for XProf and TensorBoard."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gpt.errors import require

WARM_UP = 3  # steps before the trace: the first ones still wait for data and memory


class StepProfiler:
    """Traces `n_steps` steps of a run that starts after `first_step`, soon after its start; none if
    `n_steps` is 0. Close it."""

    def __init__(self, folder: Path, n_steps: int, first_step: int, log: Callable[[str], None]):
        self.folder = folder
        self.log = log
        self.n_steps = n_steps
        self.begin = first_step + WARM_UP
        self.end = self.begin + n_steps
        self.trace = contextlib.ExitStack()

    def after_dispatch(self, step: int, metrics: Any) -> None:
        """`step` has been handed to the device; `metrics` is ready when it has been computed."""
        if self.n_steps and step == self.begin:
            jax.block_until_ready(metrics)
            self.trace.enter_context(jax.profiler.trace(self.folder))
        if self.n_steps and step == self.end:
            jax.block_until_ready(metrics)
            self.close()
            self.log(f"profile        steps {self.begin + 1} to {step}: xprof {self.folder}")

    def close(self) -> None:
        """End the trace, if one is being made."""
        self.trace.close()


def require_steps(n_steps: int, steps: int) -> None:
    """Raise UserError unless a run of `steps` has a warm-up and `n_steps` steps to trace."""
    require(
        n_steps <= max(steps - WARM_UP, 0),
        f"--profile {n_steps} traces steps after {WARM_UP} of warm-up, but the run has {steps} "
        "steps: ask for fewer, or for more --steps",
    )
