"""How fast a run goes: tokens a second, the share of the peak, how evenly. Knows only the clock."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from gpt import flops
from gpt.config import TrainConfig

PERCENTILES = (50, 90, 99)
FIELDS = ("since_step", "tokens_per_second", "mfu", *(f"step_seconds_p{p}" for p in PERCENTILES))


class Speed:
    """Times the steps of a run from step `first` on, over windows and over all of it.

    `peak`: FLOP/s of matrix products that were measured on all devices; None: no share is told.
    """

    def __init__(self, config: TrainConfig, first: int, peak: float | None):
        self.tokens = config.batch_size * config.window
        self.flops_per_token, self.peak = flops.train_flops_per_token(config.model), peak
        self.first = self.step = self.window_step = first
        self.window_times: list[float] = []
        self.times: list[float] = []
        self.start()

    def start(self) -> None:
        """Start the clock: call it when compilation is over and the first step begins."""
        self.started = self.window_started = self.last = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside, an evaluation or a sample, is no step's time."""
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self.window_started += passed
        self.last += passed

    def note(self, step: int) -> None:
        """Step `step` is done."""
        now, n = time.perf_counter(), max(step - self.step, 1)
        self.window_times.append((now - self.last) / n)
        self.step, self.last = step, now

    def measure(self) -> dict[str, float]:
        """The speed since the last call, and seconds since the first step of this process."""
        done, taken = (self.step - self.window_step) * self.tokens, self.last - self.window_started
        rate = done / max(taken, 1e-9)
        line = {"tokens_per_second": rate, "seconds": self.last - self.started}
        line |= {"since_step": self.first}
        line |= self.shares(rate) | percentiles(self.window_times)
        self.times += self.window_times
        self.window_step, self.window_started, self.window_times = self.step, self.last, []
        return line

    def shares(self, tokens_per_second: float) -> dict[str, float]:
        """The arithmetic of the model as a share of the peak (PaLM, app. B), if one is known."""
        return {"mfu": tokens_per_second * self.flops_per_token / self.peak} if self.peak else {}

    def summary(self) -> str:
        """A line about all steps so far; "" if there were none."""
        times = self.times + self.window_times
        if not times:
            return ""
        marks = percentiles(times)
        told = ", ".join(f"p{p} {marks[f'step_seconds_p{p}'] * 1e3:,.1f}" for p in PERCENTILES)
        share = self.shares(self.tokens / float(np.mean(times)))
        mfu = f"; {share['mfu']:.1%} of the measured peak" if share else ""
        return f"step time      {told} ms{mfu}"


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The steps' times that half, nine in ten and 99 in 100 of them keep within."""
    marks = np.percentile(seconds, PERCENTILES).tolist() if seconds else []
    return {f"step_seconds_p{p}": mark for p, mark in zip(PERCENTILES, marks, strict=False)}
