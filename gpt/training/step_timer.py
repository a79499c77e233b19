"""A run's speed: tokens per second, MFU, percentiles of step times. Uses the host's clock."""

import time

import numpy as np

from gpt import flops
from gpt.config import TrainConfig

PERCENTILES = (50, 90, 99)  # of the step times
# The speed fields of a metrics line, besides `seconds`. They depend on the machine and the process;
# all other fields depend on the computation alone.
SPEED_FIELDS = (
    "since_step",
    "tokens_per_second",
    "mfu",
    *(f"step_seconds_p{p}" for p in PERCENTILES),
)


class StepTimer:
    """Times the steps after `steps_done`, starting now.

    `peak_flops`: measured FLOP/s of matrix products on all devices.
    """

    def __init__(self, config: TrainConfig, steps_done: int, peak_flops: float):
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.flops_per_token = flops.train_flops_per_token(config.model)
        self.palm_factor = flops.palm_factor(config.model)
        self.peak_flops = peak_flops
        self.steps_done = steps_done
        self.window_seconds: list[float] = []  # per step since the last `measure`
        self.earlier_seconds: list[float] = []
        self.started_at = self.last_at = time.perf_counter()

    def skip_until_now(self) -> None:
        """Exclude the time since the last step, spent evaluating, saving or sampling."""
        self.last_at = time.perf_counter()

    def note_step(self) -> None:
        """Record that a step is done."""
        now = time.perf_counter()
        self.window_seconds.append(now - self.last_at)
        self.last_at = now

    def measure(self) -> dict[str, float]:
        """The speed since the last call, and seconds since this process began its first step."""
        tokens_per_second = self.tokens_per_step / max(np.mean(self.window_seconds), 1e-9)
        measured = {
            "tokens_per_second": float(tokens_per_second),
            "seconds": self.last_at - self.started_at,
            "since_step": self.steps_done,
            # Model FLOPs utilization: the model's FLOP/s as a fraction of the peak
            # (Chowdhery et al. 2022, PaLM, appendix B).
            "mfu": float(tokens_per_second * self.flops_per_token / self.peak_flops),
        }
        for p in PERCENTILES:
            measured[f"step_seconds_p{p}"] = float(np.percentile(self.window_seconds, p))
        self.earlier_seconds += self.window_seconds
        self.window_seconds = []
        return measured

    def summary(self) -> str:
        """A line about all steps so far, or "" if there were none."""
        all_seconds = self.earlier_seconds + self.window_seconds
        if not all_seconds:
            return ""
        times = [f"p{p} {np.percentile(all_seconds, p) * 1e3:,.1f}" for p in PERCENTILES]
        flops_per_second = self.tokens_per_step * self.flops_per_token / np.mean(all_seconds)
        mfu = flops_per_second / self.peak_flops
        return (
            f"step time      {', '.join(times)} ms; MFU {mfu:.1%} of the measured peak, "
            f"{mfu * self.palm_factor:.1%} as PaLM and nanoGPT count attention"
        )
