"""What a run reports: metrics.jsonl, samples.jsonl, TensorBoard, and progress on the terminal."""

import contextlib
import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gpt.config import TrainConfig
from gpt.errors import require
from gpt.training.step_timer import StepTimer

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal to show a bar on


class RunLog:
    """Takes the numbers of a run as it goes: into files below `out`, and onto `console`.

    `out` None keeps no files. `first_step`: the step after which the run continues.
    `peak_flops`: as in StepTimer. `tensorboard`: write event files too. Close it after use.
    """

    def __init__(
        self,
        out: Path | None,
        first_step: int,
        config: TrainConfig,
        console: Console,
        peak_flops: float | None = None,
        tensorboard: bool = False,
    ):
        self.out = out
        self.config = config
        self.console = console
        self.timer = StepTimer(config, first_step, peak_flops)
        self.file = None if out is None else open_metrics(out / "metrics.jsonl", first_step)
        self.board = None
        if tensorboard and out is not None:
            self.board = TensorBoard(out / "tensorboard", first_step)
        self.bar = ProgressBar(console, first_step, config.steps) if console.is_terminal else None
        self.last_line_at = -math.inf

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` has been computed. Every `log_every` steps, and at the last, write its line.

        `metrics`: scalars `loss` (nats per token), `learning_rate`, `grad_norm`, `skipped` (updates
        so far) and any others, on the device or not: they are fetched only for a line.
        """
        self.timer.note(step)
        if step % self.config.log_every and step != self.config.steps:
            if self.bar:
                self.bar.advance(step)
            return
        line = {"step": step}
        line |= {name: np.asarray(value).item() for name, value in metrics.items()}
        line["tokens"] = step * self.timer.tokens_per_step
        line |= self.timer.measure()
        self._write(line)

        # Advance the bar; where there is no terminal print a line now and then.
        speed = line["tokens_per_second"]
        tokens_left = (self.config.steps - step) * self.timer.tokens_per_step
        text = f"loss {line['loss']:.4f}  {speed:,.0f} tokens/s"
        if "mfu" in line:
            text += f", MFU {line['mfu']:.0%}"
        if line["skipped"]:
            text += f"  {line['skipped']} skipped"
        if tokens_left and speed:
            text += f"  {format_seconds(tokens_left / speed)} left"
        now = time.perf_counter()
        if self.bar:
            self.bar.advance(step, text)
        elif now - self.last_line_at >= SECONDS_BETWEEN_LINES or not tokens_left:
            self.last_line_at = now
            self.console.print(f"step {step:,}/{self.config.steps:,}  {text}")

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Write and show an evaluation on held-out text: nats per token, and bits per byte."""
        self._write({"step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte})
        self.console.print(
            f"step {step:,}  validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte"
        )

    def sample(self, step: int, text: str) -> None:
        """Show what the model wrote at `step`, and keep it in samples.jsonl, where samples that an
        earlier process wrote from this step on are dropped."""
        self.console.print(f"--- sample ---\n{text}\n---")
        if self.out is None:
            return
        try:
            with open_metrics(self.out / "samples.jsonl", step - 1) as file:
                file.write(to_line({"step": step, "text": text}))
        except OSError:
            if not self.config.keep_going:
                raise

    def _write(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, whole or not at all.

        Where there is no room for it raise OSError, or with `keep_going` leave it out.
        """
        if self.file is not None:
            line = to_line(record)
            end = self.file.seek(0, os.SEEK_END)
            try:
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self.file.truncate(end)
                if not self.config.keep_going:
                    raise OSError(error.errno, error.strerror, self.file.name) from None
        if self.board:
            self.board.add(record)

    def close(self) -> None:
        """Remove the bar, print how long steps took, close the files."""
        if self.bar:
            self.bar.progress.stop()
        if self.board:
            self.board.close()
        summary = self.timer.summary()
        if summary:
            self.console.print(summary)
        if self.file is not None:
            self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in order, without a torn line; none if there is no file."""
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
    """A .jsonl file ready to take the lines after `step`: later lines and a torn one are dropped.

    The lines that stay are written to another file that then takes its place, so that a crash loses
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
    """One line of JSON; NaN and infinities, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class TensorBoard:
    """Event files in `folder`, through tensorboardX: one scalar for each number of a line."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        # Later steps that an earlier process wrote were given up with them.
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def require_tensorboard() -> None:
    """Raise UserError unless tensorboardX can be imported."""
    require(
        importlib.util.find_spec("tensorboardX") is not None,
        "--tensorboard needs tensorboardX, which is not installed: "
        "pip install 'gpt-jax[tensorboard]', or train without it (metrics.jsonl has the same)",
    )


class ProgressBar:
    """A bar over the steps of a run, with the latest numbers beside it."""

    def __init__(self, console: Console, first_step: int, steps: int):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=console, refresh_per_second=4)
        self.task = self.progress.add_task("train", completed=first_step, total=steps, text="")
        self.progress.start()

    def advance(self, step: int, text: str | None = None) -> None:
        """Move to `step`; `text` replaces what stands beside the bar."""
        changed = {} if text is None else {"text": text}
        self.progress.update(self.task, completed=step, **changed)


@contextlib.contextmanager
def show_tokenizing(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over the bytes of text, shown from the first report on."""
    progress = Progress(console=console, transient=True)
    task = progress.add_task("tokenizing")

    def report(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if progress.live.is_started:
            progress.stop()


class LossyStream:
    """A stream on which no write fails: what cannot be written any more, because the terminal is
    gone or the disk of a log is full, is lost, and training goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, operation: Callable, *args: str) -> None:
        try:
            operation(*args)
        except OSError:
            # What the stream has buffered would fail again at exit, so send it nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_console(quiet: bool) -> Console:
    """Where a run reports: standard error, without colours in the text or broken lines."""
    return Console(
        file=LossyStream(sys.stderr),
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def print_once(console: Console) -> Callable[[str], None]:
    """A function that prints a note, unless it has printed it before."""
    printed = set()

    def log(note: str) -> None:
        if note not in printed:
            printed.add(note)
            console.print(note)

    return log
