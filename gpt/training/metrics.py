"""A run's reporting: metrics.jsonl, samples.jsonl, trackers, and progress on the terminal."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gpt.config import TrainConfig, to_json
from gpt.training.step_timer import StepTimer

SECONDS_BETWEEN_LINES = 10.0  # between progress lines without a terminal


class RunLog:
    """Writes a run's numbers to files in `out` and to `console` as they arrive.

    With `out=None` no files are kept. `steps_done`: the step after which the run continues.
    `peak_flops`: FLOP/s of all devices. `log_to`: tracker names. Close it after use.
    """

    def __init__(
        self,
        out: Path | None,
        steps_done: int,
        config: TrainConfig,
        console: Console,
        peak_flops: float,
        log_to: Sequence[str] = (),
    ):
        self.out = out
        self.config = config
        self.console = console
        self.timer = StepTimer(config, steps_done, peak_flops)
        self.file = None if out is None else open_metrics(out / "metrics.jsonl", steps_done)
        self.trackers = None
        if log_to and out is not None:
            from gpt.training.trackers import Trackers

            settings = flatten_dict(to_json(config), sep=".")
            self.trackers = Trackers(log_to, out, steps_done, settings, console.print)
        self.last_line_at = -math.inf
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                console=console,
                refresh_per_second=4,
            )
            self.bar_task = self.bar.add_task("", completed=steps_done, total=config.steps)
            self.bar.start()

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record that `step` is done; every `log_every` steps, and at the last one, write its line.

        `metrics`: scalars `loss` (nats per token), `learning_rate`, `grad_norm`, `skipped` (updates
        so far) and any others, on device or host; they are fetched only when a line is written.
        """
        self.timer.note_step()
        if self.bar:
            self.bar.update(self.bar_task, completed=step)
        if step % self.config.log_every and step != self.config.steps:
            return
        line = {"step": step}
        line |= {name: np.asarray(value).item() for name, value in metrics.items()}
        line["tokens"] = step * self.timer.tokens_per_step
        line |= self.timer.measure()
        self._write(line)

        # Shown next to the progress bar or, without a terminal, as a line every
        # SECONDS_BETWEEN_LINES.
        speed = line["tokens_per_second"]
        tokens_left = (self.config.steps - step) * self.timer.tokens_per_step
        text = f"loss {line['loss']:.4f}  {speed:,.0f} tokens/s, MFU {line['mfu']:.0%}"
        if line["skipped"]:
            text += f"  {line['skipped']} skipped"
        if tokens_left:
            text += f"  {timedelta(seconds=round(tokens_left / speed))} left"
        now = time.perf_counter()
        if self.bar:
            self.bar.update(self.bar_task, description=text)
        elif now - self.last_line_at >= SECONDS_BETWEEN_LINES or not tokens_left:
            self.last_line_at = now
            self.console.print(f"step {step:,}/{self.config.steps:,}  {text}")

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Write and show the held-out loss, in nats per token and in bits per byte."""
        self._write({"step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte})
        self.console.print(
            f"step {step:,}  validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte"
        )

    def tasks(self, step: int, figures: Mapping[str, float] | None) -> None:
        """Write and show task scores, such as hellaswag/acc. None: another process has them."""
        if figures is None:
            return
        self._write({"step": step} | figures)
        shown = [f"{name} {value:.4f}" for name, value in figures.items() if "/" in name]
        self.console.print(f"step {step:,}  {', '.join(shown)}")

    def sample(self, step: int, text: str | None) -> None:
        """Show what the model wrote at `step` and append it to samples.jsonl, dropping samples that
        an earlier process wrote at or after `step`. None: another process has the text."""
        if text is None:
            return
        self.console.print(f"--- sample ---\n{text}\n---")
        if self.out is not None:
            path = self.out / "samples.jsonl"
            with self._tolerating_full_disk(), open_metrics(path, step - 1) as file:
                file.write(to_line({"step": step, "text": text}))
        if self.trackers:
            self.trackers.sample(step, text)

    def _write(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, whole or not at all; send its numbers to the trackers."""
        if self.file is not None:
            with self._tolerating_full_disk():
                line = to_line(record)
                end = self.file.seek(0, os.SEEK_END)
                if self.file.write(line) < len(line):
                    self.file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.trackers:
            self.trackers.numbers(record)

    @contextlib.contextmanager
    def _tolerating_full_disk(self):
        """With `keep_going`, ignore failed writes so that training continues."""
        try:
            yield
        except OSError as error:
            if not self.config.keep_going:
                raise OSError(error.errno, error.strerror, str(self.out)) from None

    def close(self) -> None:
        """Remove the progress bar, print the step times, close the files."""
        if self.bar:
            self.bar.stop()
        if self.trackers:
            self.trackers.close()
        summary = self.timer.summary()
        if summary:
            self.console.print(summary)
        if self.file is not None:
            self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order, without torn lines; empty without a file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def open_metrics(path: Path, step: int) -> BinaryIO:
    """Open a .jsonl file to append the lines after `step`, dropping later lines and torn ones.

    The remaining lines are written to a new file that then replaces the old one, so a crash loses
    none of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [to_line(record) for record in read_metrics(path) if record["step"] <= step]
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path.open("ab", buffering=0)


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON; NaN and infinities become null, since JSON lacks them."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


class LossyStream:
    """A stream whose writes never fail: if the terminal is gone or the log's disk is full, the text
    is lost and training continues."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_console(quiet: bool) -> Console:
    """The console a run reports to: standard error, without coloured text or line wrapping."""
    return Console(
        file=LossyStream(sys.stderr),
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
