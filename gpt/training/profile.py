"""A trace of a few steps, for XProf and TensorBoard."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gpt.errors import require

WARM_UP = 3  # steps before the trace: the first ones still wait for data and memory


def require_steps(n: int, steps: int) -> None:
    """UserError unless a run of `steps` holds a warm-up and `n` steps to trace."""
    require(
        n <= max(steps - WARM_UP, 0),
        f"--profile {n} traces steps after {WARM_UP} of warm-up, but there are {steps} to make: "
        "ask for fewer, or for more --steps",
    )


class Profile:
    """Traces `n` steps of a run, soon after step `first`, or those that are left; none if `n` is 0.
    Close it."""

    def __init__(self, folder: Path, n: int, first: int, tell: Callable[[str], None]):
        self.folder, self.tell, self.n = folder, tell, n
        self.begin, self.end = first + WARM_UP, first + WARM_UP + n
        self.tracing = contextlib.ExitStack()

    def note(self, step: int, metrics: Any) -> None:
        """Step `step` is on its way; `metrics` will be there when it is done."""
        if self.n and step == self.begin:
            jax.block_until_ready(metrics)
            self.tracing.enter_context(jax.profiler.trace(self.folder))
        if self.n and step == self.end:
            jax.block_until_ready(metrics)
            self.close()
            self.tell(f"profile        steps {self.begin + 1} to {step}: xprof {self.folder}")

    def close(self) -> None:
        """End the trace, if one is being made."""
        self.tracing.close()
